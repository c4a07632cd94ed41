"""Tasks that are scored side by side: few of them in threads, many in processes.

Most of the work on one task uses one core. Threads share everything, but of Python's own work only one does some at a
time, and a task is many short steps. Processes do without that, at one core each. They are forked, as the workers of
torch's DataLoader are, so that they share the models' memory; where they cannot be, threads it is.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

from glp_lens import numerics
from glp_lens.evals.probing import scoring
from glp_lens.processes import end_with_parent, stopping

T = TypeVar("T")
R = TypeVar("R")

_IN_THREADS, _IN_PROCESSES = 4, 8
"""Most tasks that are scored at once."""
_MANY = 2
"""Tasks for each core from which there are processes: with fewer, some cores would be idle at the end."""
_POLL = 0.5
"""Seconds between two looks at how far the tasks are."""


class Count(Protocol):
    """A number that threads or processes add to."""

    value: int

    def get_lock(self) -> Any:
        """Held by whoever changes it."""


class _Threads:
    """The `Count` of threads."""

    def __init__(self) -> None:
        self.value, self._lock = 0, Lock()

    def get_lock(self) -> Any:
        return self._lock


def add_one(count: Count) -> None:
    """One more."""
    with count.get_lock():
        count.value += 1


def side_by_side(
    work: Callable[[Count, T], R], items: Iterable[T], n: int, bar: tqdm[Any], *, device: str = "cpu"
) -> Generator[R]:
    """`work` of each item, in their order; only some items at a time are read from the iterable.

    Args:
        work: is given a count of what the bar shows, and an item that can be pickled.
        items: `n` of them.
        n: how many.
        bar: shows the count.
        device: of the models; processes need the CPU.

    Raises:
        InputError: a process was ended from outside.
    """
    with ExitStack() as stack:
        # Filters of warnings belong to the process: what fits that end in another order make of them is undone here.
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(numerics.blas_threads(1))
        cores = torch.get_num_threads()
        if _may_fork(device) and n >= _MANY * cores > _MANY:
            workers = min(_IN_PROCESSES, cores)
            pool, call, count = stack.enter_context(_processes(workers, work))
        else:
            workers, count = min(_IN_THREADS, cores, n), _Threads()
            # Only encoding uses several of torch's threads, in one task at a time.
            each = partial(numerics.threads, cores - workers + 1)
            pool = stack.enter_context(ThreadPoolExecutor(workers, "probing", each))
            call = partial(work, count)
        waiting: deque[Future[R]] = deque()
        stack.callback(lambda: [future.cancel() for future in waiting])  # before the pool waits for them

        def first() -> R:
            while not wait([waiting[0]], _POLL).done:
                bar.update(count.value - bar.n)
            found = waiting.popleft().result()
            bar.update(count.value - bar.n)
            return found

        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > 2 * workers:
                yield first()
        while waiting:
            yield first()


def _may_fork(device: str) -> bool:
    """Whether processes can be forked: not beside a GPU, in a process that may have none, or on other systems."""
    accelerators = (torch.cuda, torch.xpu)
    return (
        sys.platform == "linux"
        and device == "cpu"
        and not any(each.is_initialized() for each in accelerators)
        and not multiprocessing.current_process().daemon
    )


@contextmanager
def _processes(workers: int, work: Callable[[Count, T], R]) -> Iterator[tuple[Executor, Callable[[T], R], Count]]:
    """A pool of processes, what to call in one of them, and what they count in."""
    # Python warns of locks that other threads may hold. Those of torch and BLAS are not used with one thread each.
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    context = multiprocessing.get_context("fork")
    stop, count, turn = context.Event(), context.Value("q", 0), context.Lock()
    pool = ProcessPoolExecutor(workers, context, _begin, (partial(work, count), stop, turn))
    with pool, stopping(stop, "run again with a larger memory, or with OMP_NUM_THREADS=1, which scores task by task"):
        yield pool, _call, count


_work: list[Callable[[Any], Any]] = []
"""What this process was forked for."""


def _begin(work: Callable[[Any], Any], stop: Any, turn: Any) -> None:
    """In a new process."""
    _work.append(work)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that began it is told, and says stop
    end_with_parent(stop)
    torch.set_num_threads(1)  # more would wait for threads that were not forked
    scoring.take_turns(turn)


def _call(item: Any) -> Any:
    return _work[0](item)
