"""Times the ways of doing one piece of work side by side, and prints the ratios at the end of the run."""

import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pytest
import torch

Key = TypeVar("Key")
OURS = "glp-lens"


@dataclass(frozen=True)
class Timing:
    """Median speed of one way of doing a piece of work, or another of its sizes."""

    work: str
    way: str
    value: float
    unit: str

    def __str__(self) -> str:
        scale, suffix = next(s for s in ((1e6, "M"), (1e3, "k"), (1, "")) if self.value >= s[0] or s[0] == 1)
        return f"{self.value / scale:.3g}{suffix} {self.unit}"


class Timed(Protocol):
    """What the fixture `timed` gives."""

    def __call__(
        self,
        work: str,
        way: str,
        function: Callable[..., Any],
        *arguments: Any,
        amount: float,
        unit: str,
        rounds: int = 3,
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    ) -> Any: ...


Sized = Callable[[str, str, float, str], None]
"""What the fixture `sized` gives."""
TIMINGS = pytest.StashKey[list[Timing]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TIMINGS] = []
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Timed:
    """`timed(work, way, function, *arguments, amount=..., unit=...)` gives back what the last round returned.

    `work` groups the ways that are compared, one of which is `glp-lens`. `amount` is how many of `unit` one
    call handles. `setup`, untimed, makes the arguments of each round if they cannot be used twice. Several rounds come
    after one that does not count.
    """

    def run(
        work: str,
        way: str,
        function: Callable[..., Any],
        *arguments: Any,
        amount: float,
        unit: str,
        rounds: int = 3,
        setup: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    ) -> Any:
        benchmark.group = work
        result = benchmark.pedantic(function, arguments, setup=setup, rounds=rounds, warmup_rounds=int(rounds > 1))
        if benchmark.stats:
            rate = amount / benchmark.stats.stats.median
            request.config.stash[TIMINGS].append(Timing(work, way, rate, f"{unit}/s"))
        return result

    return run


def turns(functions: Mapping[Key, Callable[[], Any]], rounds: int) -> tuple[dict[Key, float], dict[Key, Any]]:
    """Median processor time of functions that take turns, and what each gave.

    Processor time, of all threads, does not count what other processes take.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    results = {}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            results[name] = function()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}, results


@pytest.fixture
def sized(request: pytest.FixtureRequest) -> Sized:
    """`sized(work, way, value, unit)` puts something other than a speed, such as memory, in the table."""

    def run(work: str, way: str, value: float, unit: str) -> None:
        request.config.stash[TIMINGS].append(Timing(work, way, value, unit))

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    timings = config.stash[TIMINGS]
    ours = {timing.work: timing for timing in timings if timing.way == OURS}
    peers = [timing for timing in timings if timing.way != OURS and timing.work in ours]
    if not peers:
        return
    terminalreporter.section("ratios: rows of the table in benchmarks/README.md")
    terminalreporter.line("| work | compared with | glp-lens | the other way | ratio |")
    terminalreporter.line("|---|---|---|---|---|")
    for peer in peers:
        mine = ours[peer.work]
        ratio = mine.value / peer.value
        terminalreporter.line(f"| {peer.work} | {peer.way} | {mine} | {peer} | {ratio:.3g} |")
