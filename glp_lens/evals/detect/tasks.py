"""Detection tasks: normal and odd texts, and other texts of both classes for what is fitted to a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

SHUFFLED, CODE, STEERED = "shuffled", "code", "steered"
"""Words in random order; program code against news; activations pushed along a direction."""
DEFAULT_TASKS = (SHUFFLED, CODE, STEERED, "96_spam_is", "106_hate_hate", "92_glue_sst2", "87_glue_cola")
"""Made from held-out texts and from the datasets of sae-probes: of these, class 0 is normal and class 1 is odd."""
FAMILY = "family:"
"""Begins the name of a task whose odd texts are of one family of datasets, and whose normal ones are of all others."""


@dataclass(frozen=True, eq=False)
class DetectTask:
    """Texts of two classes; the lengths are matched later, in tokens.

    Attributes:
        name: of the task.
        normal, odd: texts that are tested, or that set thresholds.
        fit_normal, fit_odd: other texts.
        about: one sentence on what is normal and what is odd.
        push: `(d_in,)`, added to the activations of odd texts.
    """

    name: str
    normal: tuple[str, ...]
    odd: tuple[str, ...]
    fit_normal: tuple[str, ...]
    fit_odd: tuple[str, ...]
    about: str
    push: Tensor | None = None


def of_texts(name: str, texts: Sequence[str], about: str, *, seed: int, tested: int, fitted: int) -> DetectTask:
    """A task whose odd texts are not made odd yet: no text is in two of its parts.

    Args:
        texts: in any order.
        seed: of the draw.
        tested: odd texts wanted, and half the normal ones.
        fitted: other texts wanted of each class.
    """
    drawn = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    wanted = np.cumsum([2 * tested, tested, fitted, fitted])
    ends = (wanted * min(1.0, len(drawn) / wanted[-1])).astype(int)
    normal, odd, fit_normal, fit_odd = (
        tuple(drawn[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)
    )
    return DetectTask(name, normal, odd, fit_normal, fit_odd, about)


def shuffled(task: DetectTask, seed: int) -> DetectTask:
    """The task with the words of its odd texts in random order."""
    rng = np.random.default_rng(seed)

    def mix(text: str) -> str:
        words = text.split()
        return " ".join(words[i] for i in rng.permutation(len(words)))

    return replace(task, odd=tuple(map(mix, task.odd)), fit_odd=tuple(map(mix, task.fit_odd)))
