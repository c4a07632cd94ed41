"""What the shell completes in options that take names from a list, or several of them separated by commas."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal, get_args, get_origin

from glp_lens.settings import Option

_AT_BLOCK = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


def completion(option: Option) -> Callable[[str], list[str]] | None:
    """What offers the values of a setting that begin as typed; None if they are not known without work.

    Paths are left to the shell, and choices of one value to typer.
    """
    if get_origin(option.type) is Literal:
        choices = get_args(option.type)
        return _one_of(lambda _: map(str, choices)) if option.several or option.parse else None
    known = _KNOWN.get(option.name)
    return None if known is None else _one_of(known)


def _one_of(known: Callable[[str], Iterable[str]]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + each for each in known(last) if each.startswith(last)]

    return complete


def _suites(_: str) -> Iterable[str]:
    from glp_lens.evals.registry import SUITES

    return [suite.name for suite in SUITES]


def _concepts(_: str) -> Iterable[str]:
    from glp_lens.evals.steering.settings import ConceptName

    return get_args(ConceptName)


def _tasks(_: str) -> Iterable[str]:
    from glp_lens.evals.probing.tasks import all_names

    return all_names()


def _hooks(typed: str) -> Iterable[str]:
    """The usual points of a block that is named: how many blocks there are is known to the language model alone."""
    block = re.match(r"blocks\.\d+\.", typed)
    return [block.group() + name for name in _AT_BLOCK] if block else []


task_names = _one_of(_tasks)
"""Names of the packaged probing tasks."""
_KNOWN: dict[str, Callable[[str], Iterable[str]]] = {
    "suites": _suites,
    "concepts": _concepts,
    "tasks": _tasks,
    "hook": _hooks,
    "device": lambda _: ("cpu", "cuda", "mps"),
}
