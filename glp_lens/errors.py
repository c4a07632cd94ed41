"""The exception for bad input, and other exceptions' messages made short enough to quote."""

import warnings
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Bad input, said in one line: what was expected, what came, and what to do.

    The command line prints the message and exits with code 2; any other exception is a bug of ours and
    keeps its traceback.
    """


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
