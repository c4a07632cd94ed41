"""Checks of judges on labelled text: how well a score tells good text from texts that are bad in a known way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from glp_lens.errors import InputError
from glp_lens.intervals import Interval

_STRETCH = (6, 8)
"""Words of a stretch of spliced text: long enough that n-grams see nothing wrong."""
_LOOP = 3


def auroc(good: ArrayLike, bad: ArrayLike, *, paired: bool = False, resamples: int = 2000, seed: int = 0) -> Interval:
    """Probability that a good text scores above a bad one (ties count half), with a 95% bootstrap interval over texts.

    Args:
        good: scores `(n,)`, higher for better. NaNs are left out.
        bad: scores `(m,)`.
        paired: bad text `i` is the bad version of good text `i`: the two are drawn together, and left out together.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        InputError: one side has no score, or pairs without a partner.
    """
    x, y = np.asarray(good, dtype=np.float64), np.asarray(bad, dtype=np.float64)
    if paired and len(x) != len(y):
        raise InputError(f"pairs need as many good texts as bad ones, got {len(x)} and {len(y)}")
    keep = np.isfinite(x) & np.isfinite(y) if paired else np.True_
    x, y = (side[np.isfinite(side) & keep] for side in (x, y))
    if not len(x) or not len(y):
        raise InputError(f"an AUROC needs scores on both sides, got {len(x)} good and {len(y)} bad texts")
    ranks = rankdata(np.concatenate([x, y]), method="dense")
    wins = (np.sign(ranks[: len(x), None] - ranks[None, len(x) :]) + 1) / 2
    rng = np.random.default_rng(seed)
    rows, columns = (rng.multinomial(k, np.full(k, 1 / k), size=resamples) / k for k in (len(x), len(y)))
    samples = np.einsum("ri,ri->r", rows @ wins, rows if paired else columns)
    low, high = np.quantile(samples, [0.025, 0.975]).clip(0, 1)  # rounding leads out of it
    return Interval(float(wins.mean()), float(low), float(high), len(x))


def shuffle_words(texts: Sequence[str], seed: int = 0) -> list[str]:
    """The words of each text in a random order."""
    rng = np.random.default_rng(seed)
    return [_lead(text) + " ".join(rng.permutation(text.split())) for text in texts]


def loops(texts: Sequence[str]) -> list[str]:
    """The first three words of each text, over and over, up to its number of words."""
    looped = []
    for text in texts:
        words = text.split()
        looped.append(_lead(text) + " ".join((words[:_LOOP] * len(words))[: len(words)]))
    return looped


def number_runs(texts: Sequence[str], seed: int = 0) -> list[str]:
    """The first half of each text's words, and a run of digits or of another character in place of the rest.

    Runs are one digit and zeros, one digit over and over, a short group of digits between commas, dots or dashes, or
    one character that is no digit: what a language model that is pushed too far falls into.
    """
    rng = np.random.default_rng(seed)
    ran = []
    for text in texts:
        words = text.split()
        kept = " ".join(words[: len(words) // 2])
        room = max(len(text) - len(kept), 12)
        digit, mark = str(rng.integers(1, 10)), str(rng.choice([",", ".", "-", ", "]))
        group = "".join(map(str, rng.integers(0, 10, size=int(rng.integers(1, 4)))))
        runs = (digit + "0" * room, digit * room, (group + mark) * room, str(rng.choice(list("!.-_=aeZ*#"))) * room)
        ran.append(_lead(text) + f"{kept} {runs[rng.integers(len(runs))]}"[: max(len(text), 12)])
    return ran


def spliced(texts: Sequence[str], others: Sequence[str], seed: int = 0) -> list[str]:
    """Stretches of six to eight words of each text and of another in turn: fluent in places, and nonsense as a whole.

    Args:
        texts: each begins its spliced version.
        others: the other text of each; where it is too short, its words begin again.
        seed: of the stretches' lengths.
    """
    rng = np.random.default_rng(seed)
    result = []
    for pair in zip(texts, others, strict=True):
        words, joined, at = [text.split() for text in pair], [], 0
        sources = [words[0], words[1] * (len(words[0]) // max(len(words[1]), 1) + 1)]
        turn = 0
        while at < len(words[0]):
            step = int(rng.integers(_STRETCH[0], _STRETCH[1] + 1))
            joined += sources[turn][at : at + step]
            at, turn = at + step, 1 - turn
        result.append(_lead(pair[0]) + " ".join(joined[: len(words[0])]))
    return result


def check(
    score: Callable[[Sequence[str], Sequence[str]], ArrayLike],
    prompts: Sequence[str],
    texts: Sequence[str],
    seed: int = 0,
) -> dict[str, Interval]:
    """AUROC of a score between human continuations and four kinds of bad ones.

    Args:
        score: of continuations, given prompts and texts; higher is better.
        prompts: beginnings of human texts.
        texts: how they go on.
        seed: of what is done to them.

    Returns:
        `shuffled`, `loops`, `number_runs` and `spliced` (each text with the next one).
    """
    bad = {
        "shuffled": shuffle_words(texts, seed),
        "loops": loops(texts),
        "number_runs": number_runs(texts, seed),
        "spliced": spliced(texts, [*texts[1:], *texts[:1]], seed),
    }
    scores = np.asarray(score([*prompts] * (len(bad) + 1), [*texts, *(t for kind in bad.values() for t in kind)]))
    good, *others = np.split(scores, len(bad) + 1)
    return {name: auroc(good, values, paired=True, seed=seed) for name, values in zip(bad, others, strict=True)}


def _lead(text: str) -> str:
    return " " if text[:1].isspace() else ""
