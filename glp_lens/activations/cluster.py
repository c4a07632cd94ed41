"""Collect activations on a Ray cluster: actors make the parts of a collection, and `merge` joins them."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from glp_lens import lm
from glp_lens.activations.collect import PARTS, collect
from glp_lens.activations.merge import ShortParts, merge
from glp_lens.activations.store import ActivationStore
from glp_lens.corpus import Document
from glp_lens.errors import InputError, first_line, one_line
from glp_lens.types import Json

T = TypeVar("T")
PARTS_PER_ACTOR = 4
"""More parts than actors, so that a slow machine makes fewer of them."""


def collect_on_ray(
    open_model: Callable[[], lm.Model],
    open_texts: Callable[[], Iterable[str | Document]],
    hooks: str | Sequence[str] | None = None,
    out: str | Path = "activations",
    *,
    actors: int = 2,
    parts: int | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    retries: int = 3,
    **options: Any,
) -> ActivationStore | dict[str, ActivationStore]:
    """Collect activations with Ray actors; the store is that of one process, row for row.

    Uses the cluster that `ray.init` connected to, or else that of `RAY_ADDRESS`, or else this machine. A part whose
    actor died or failed is made again by a new actor, which continues after the last shard that was saved. Repeating
    the call continues too, with the same parts.

    Args:
        open_model: opens the model, once in each actor.
        open_texts: opens the texts, once for each part; always the same ones in the same order.
        hooks: as for `collect`.
        out: folder of the store, under a path that all machines of the cluster see.
        actors: processes that hold a model each.
        parts: parts of the work; by default 4 for each actor.
        num_cpus: CPU cores of an actor.
        num_gpus: GPUs of an actor.
        retries: how often a failed part is tried again.
        options: further arguments of `collect`, but for `part` and `window`.

    Returns:
        The store, or with several hook points a dictionary of them.

    Raises:
        InputError: Ray is not installed; bad options; what `collect` refuses; a part that failed too often.
    """
    if actors < 1 or (parts is not None and parts < 1) or retries < 0:
        raise InputError(f"a cluster needs actors and parts >= 1 and retries >= 0, got {actors}, {parts}, {retries}")
    for name in ("part", "window"):
        if options.pop(name, None) is not None:
            raise InputError(f"{name} cannot be chosen on a cluster: leave it out")
    out = Path(out).absolute()
    n = parts or _parts_there(out) or PARTS_PER_ACTOR * actors
    with _ray() as ray:

        @ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, runtime_env={"env_vars": {"TQDM_DISABLE": "1"}})
        class Collector:
            def __init__(self) -> None:
                self.model: lm.Model | None = None
                self.identity: Json | None = None

            def work(self, i: int) -> str | None:
                """Make a part; returns the message of an InputError, so that it is not retried."""
                try:
                    self.model = open_model() if self.model is None else self.model
                    texts = open_texts()
                    self.identity = self.identity or lm.identity(self.model)
                    collect(self.model, texts, hooks, out, part=(i, n), identity=self.identity, **options)
                except InputError as error:
                    return str(error)
                return None

        name = "part {}/" + str(n)
        _make(ray, Collector, range(n), name, actors, retries)
        try:
            return merge(out, _folders(out, n))
        except ShortParts as short:
            _make(ray, Collector, short.parts, name, actors, retries)
            return merge(out, _folders(out, n))


def do_on_ray(
    work: Callable[[T], None],
    items: Iterable[T],
    *,
    actors: int,
    num_cpus: float,
    num_gpus: float,
    retries: int = 3,
    done: Callable[[T], None] = lambda _: None,
) -> None:
    """Call a function with each of some items in Ray actors, on the cluster that `collect_on_ray` would use.

    Args:
        work: must be safe to repeat: an item whose actor died or failed is given to another one.
        items: hashable, and told from each other by their text in messages.
        done: called here with each item that is done.

    Raises:
        InputError: Ray is not installed; what `work` raises; an item that failed too often.
    """
    with _ray() as ray:

        @ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, runtime_env={"env_vars": {"TQDM_DISABLE": "1"}})
        class Worker:
            def work(self, item: T) -> str | None:
                """Returns the message of an InputError, so that it is not retried."""
                try:
                    work(item)
                except InputError as error:
                    return str(error)
                return None

        _make(ray, Worker, items, "{}", actors, retries, done)


def _make(
    ray: Any,
    worker: Any,
    items: Iterable[T],
    name: str,
    actors: int,
    retries: int,
    done: Callable[[T], None] = lambda _: None,
) -> None:
    """Have the actors, of class `worker`, do these items, which messages call by `name`."""
    waiting = deque(items)
    failures: Counter[T] = Counter()
    busy: dict[Any, tuple[Any, T]] = {}

    def give(actor: Any) -> None:
        item = waiting.popleft()
        busy[actor.work.remote(item)] = actor, item

    try:
        with tqdm(total=len(waiting), desc="parts", unit="part", mininterval=2) as bar:
            for _ in range(min(actors, len(waiting))):
                give(worker.remote())
            while busy:
                (ended,), _ = ray.wait(list(busy), num_returns=1)
                actor, item = busy.pop(ended)
                try:
                    mistake = ray.get(ended)
                except ray.exceptions.RayError as error:
                    ray.kill(actor)
                    failures[item] += 1
                    if failures[item] > retries:
                        raise InputError(
                            f"{name.format(item)} failed {failures[item]} times, last with {_reason(error)}; "
                            "what is saved is safe: run the same command again"
                        ) from error
                    tqdm.write(f"{name.format(item)} failed ({_reason(error)}): trying it again")
                    waiting.append(item)
                    give(worker.remote())
                    continue
                if mistake is not None:
                    raise InputError(mistake)
                bar.update()
                done(item)
                if waiting:
                    give(actor)
                else:
                    ray.kill(actor)  # makes room for one that still waits for a place
    finally:
        for actor, _ in busy.values():
            ray.kill(actor)


@contextmanager
def _ray() -> Iterator[Any]:
    """Ray, connected to a cluster; shut down again if it was not running before."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise InputError('a cluster needs Ray: pip install "glp-lens[cluster]"') from None
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # a plain Exception when its processes do not start in time
        raise InputError(f"Ray does not start ({one_line(error)}): try again, or check RAY_ADDRESS") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _parts_there(out: Path) -> int | None:
    """How many parts an earlier run cut the work into, if one did."""
    counts = {int(match[1]) for f in out.glob(f"{PARTS}/*") if (match := re.fullmatch(r"\d+-of-(\d+)", f.name))}
    return counts.pop() if len(counts) == 1 else None


def _folders(out: Path, n: int) -> list[Path]:
    return sorted((out / PARTS).glob(f"*-of-{n:04d}"))


def _reason(error: Exception) -> str:
    """The cause of a failure on one line."""
    cause = getattr(error, "cause", None) or error
    name = type(cause).__name__
    return f"{name}: {first_line(cause)}" if str(cause).strip() else name
