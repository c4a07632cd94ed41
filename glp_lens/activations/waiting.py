"""Waiting for another process, with a progress line."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tqdm.auto import tqdm

from glp_lens.errors import InputError

T = TypeVar("T")
QUIET_SECONDS = 3.0


def wait_until(ready: Callable[[], T | None], note: Callable[[], str], *, patience: float | None = None) -> T:
    """Poll until there is an answer; after a few seconds a line says what is waited for.

    Args:
        ready: gives the answer, or None.
        note: what is waited for.
        patience: seconds after which to give up; None waits for ever.

    Raises:
        InputError: patience came to its end.
    """
    if (answer := ready()) is not None:
        return answer
    began, pause = time.monotonic(), 0.005
    with tqdm(bar_format="{desc} ({elapsed})", delay=QUIET_SECONDS, mininterval=2, miniters=1, leave=False) as bar:
        while (answer := ready()) is None:
            if patience is not None and time.monotonic() - began > patience:
                raise InputError(f"gave up after {patience:g} seconds of {note()}")
            bar.set_description_str(note(), refresh=False)
            bar.update()
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
    return answer
