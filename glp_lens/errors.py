"""The exception for bad input, and the words of messages: others' exceptions cut short, counts, what ran out."""

from __future__ import annotations

import errno
import math
import re
import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
DISK_FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""Error numbers of a disk, a quota or a largest size of files that is used up."""
_NO_MEMORY = re.compile(
    r"out of memory|not enough memory|can(?:no|')t allocate memory|unable to allocate|bad_alloc|alloc of size"
    r"|alloc_failed|size calculation overflowed",
    re.IGNORECASE,
)
"""What libraries say when memory is used up: torch raises a plain RuntimeError on the CPU."""
_AMOUNT = re.compile(r"(?:allocate|alloc of size|mmap) ([\d.]+)(?: ?([KMGTPE]?i?B)\b)?")
_DISK_ERROR = re.compile(r"os error (\d+)")


class InputError(ValueError):
    """Bad input, said in one line: what was expected, what came, and what to do.

    The command line prints the message and exits with code 2; any other exception is a bug of ours and
    keeps its traceback.
    """


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """A number of things: `1 row`, `2,048 rows`.

    Args:
        plural: of a noun that does not take an s.
    """
    return f"{n:,} {noun if n == 1 else plural or f'{noun}s'}"


def one_line(error: BaseException, most: int = 200) -> str:
    """An exception's message on one line of at most `most` characters; the name of its class if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def first_line(error: BaseException, most: int = 200) -> str:
    """The first line of an exception's message, likewise."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def or_warning(what: str, make: Callable[[], T]) -> T | None:
    """What `make` returns; if it fails, None and a warning of one line: for what only shows results.

    Raises:
        OSError: what it writes to is full or cannot be written.
    """
    try:
        return make()
    except OSError:
        raise
    except Exception as error:
        warnings.warn(f"{what} could not be made ({type(error).__name__}: {one_line(error)})", stacklevel=2)
        return None


def readable_size(bytes: float) -> str:
    """A number of bytes in a unit that suits it: `89.4 TB`."""
    if bytes < 1000:
        return f"{bytes:.0f} bytes"
    power = min(int(math.log10(bytes) / 3), 4)
    return f"{bytes / 1000**power:.1f} {' kMGT'[power]}B"


def memory_wanted(error: BaseException) -> str | None:
    """What an allocation that failed had asked for, `memory` where it is not said; None for any other error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError | OSError)
        and (_NO_MEMORY.search(text) or getattr(error, "errno", None) == errno.ENOMEM)
    ):
        return None
    found = _AMOUNT.search(text)
    if found is None:
        return "memory"
    return f"{found[1]} {found[2]}" if found[2] else readable_size(float(found[1]))


def disk_error(error: BaseException) -> int | None:
    """The error number of the system behind an error of writing or reading a file; None if there is none."""
    if isinstance(error, OSError):
        return error.errno
    found = _DISK_ERROR.search(str(error))  # as safetensors says it
    return int(found[1]) if found else None


def pass_shortage(error: BaseException) -> None:
    """Raise an error again that memory or disk space is used up, which is no fault of the file that was being read."""
    if memory_wanted(error) is not None or disk_error(error) in DISK_FULL:
        raise error
