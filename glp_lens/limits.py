"""Bounds on what a file may ask for, checked before anything is built of it; docs/limits.md lists them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from glp_lens.errors import InputError

PARAMETERS = "GLP_LENS_MAX_PARAMETERS"
LAYERS = "GLP_LENS_MAX_LAYERS"
EXPANSION = "GLP_LENS_MAX_EXPANSION"
DEFAULTS = {PARAMETERS: 20_000_000_000, LAYERS: 1000, EXPANSION: 100}
"""The bounds by the environment variable that raises each."""
NESTING = 100
"""Levels of objects and lists in JSON and YAML: beyond it, what reads or writes them runs out of stack."""
YAML_BYTES = 16_000_000
YAML_EXPANDED = 32_000_000
"""Bytes of a YAML file, and characters of it once its aliases are written out."""
MOST_STEPS = 10_000
"""Steps of an integration."""
LARGEST_INTEGER = 2**53 - 1
"""Largest whole number of a setting: larger ones are not exact in JSON."""
LARGEST_NUMBER = 1e12
"""Largest other number of a setting: its square still has room in float32."""
LARGEST_SEED = 2**31 - 1
"""Largest seed that all libraries take, with room for those that are counted up from it."""
MASSIVE = (1.0, 1e6)
"""Multiples of the median norm that massive activations may begin at, without the ends."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
UNCHECKED = 64 * 2**20
"""Bytes that a compressed file may always unpack to, whatever its own size."""


def limit(name: str) -> int:
    """The bound of that name, of the environment or the default.

    Raises:
        InputError: the environment variable is no positive whole number.
    """
    value = os.environ.get(name, str(DEFAULTS[name]))
    if not value.isdecimal() or not int(value):
        raise InputError(f"{name} must be a whole number from 1, got {value!r}")
    return int(value)


def check_limit(name: str, value: int, what: str) -> None:
    """Refuse what is beyond a bound.

    Args:
        name: of the bound.
        value: to compare with it.
        what: has it, for the message.

    Raises:
        InputError: it is beyond; the message names the environment variable that raises the bound.
    """
    if value > (most := limit(name)):
        raise InputError(f"{what} {value:,}, and the bound is {most:,}: if it is meant, set {name} to raise it")


def check_expansion(unpacked: int, packed: int, place: str) -> None:
    """Refuse a compressed file that unpacks to very many times its size.

    Args:
        unpacked: bytes so far, or as the file declares.
        packed: bytes that they were unpacked from.
        place: the file.

    Raises:
        InputError: it does.
    """
    if unpacked > UNCHECKED and unpacked > limit(EXPANSION) * packed:
        raise InputError(
            f"{place} unpacks to over {limit(EXPANSION)} times its size: if it is meant, set {EXPANSION} to raise the "
            "bound, or unpack it yourself"
        )


def check_nesting(value: Any, data: bytes, place: str) -> None:
    """Refuse JSON that is nested deeply.

    Args:
        value: what was read.
        data: what it was read from.
        place: the file.

    Raises:
        InputError: more than `NESTING` levels.
    """
    brackets = data.translate(None, _NO_BRACKETS)
    for _ in range(NESTING // 2):  # each time the innermost level is left out, or two
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if not brackets:
            return
    # Nested deeply, or there are brackets in texts: each value is looked at, which takes as long as reading them.
    level = [value]
    for _ in range(NESTING):
        level = [child for each in level for child in _children(each) if isinstance(child, dict | list)]
        if not level:
            return
    raise InputError(f"{place} is nested over {NESTING} levels deep: expected plain values, lists and objects")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
