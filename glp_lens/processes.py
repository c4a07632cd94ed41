"""Work in several processes: how they end with the one that began them, and what is said when one is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from glp_lens.errors import InputError

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event


def end_with_parent(stop: Event) -> None:
    """In a new process: end when the parent ends, or says so."""
    import multiprocessing
    import os
    import threading

    parent = multiprocessing.parent_process()

    def end() -> None:
        while not stop.wait(1) and (parent is None or parent.is_alive()):
            pass
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


@contextmanager
def stopping(stop: Event, advice: str) -> Iterator[None]:
    """Around the work of a pool: where it fails, the others stop too, and a process that was killed is told of.

    Args:
        stop: what the processes end with, see `end_with_parent`.
        advice: what to do when one was killed.

    Raises:
        InputError: one of the processes was ended from outside.
    """
    from concurrent.futures.process import BrokenProcessPool

    try:
        yield
    except BrokenProcessPool:
        raise InputError(
            f"one of the processes was ended from outside, perhaps for lack of memory: what is saved is safe; {advice}"
        ) from None
    except BaseException:
        stop.set()  # what the others are at is continued by the next run
        raise
