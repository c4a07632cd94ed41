"""A fluency judge that is not the steered model: an n-gram language model with a gate against loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from glp_lens.errors import InputError

Ids = Sequence[int]
Tokenize = Callable[[Sequence[str]], list[list[int]]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CUT = (5, 18)
"""Words of a prompt and of a continuation: 24 tokens are about 18 words."""


@dataclass(frozen=True)
class _Order:
    """Counts of the n-grams of one length: all that one level of the interpolation needs."""

    grams: Ints
    counts: Ints
    contexts: Ints
    totals: Ints
    types: Ints
    discount: float


class NGramModel:
    """Interpolated Kneser-Ney over token ids (Kneser and Ney 1995; Chen and Goodman 1999, equation 24).

    An n-gram is stored as one int64, its ids being the digits in base `vocab`, in sorted arrays: fitting is
    a sort, a look-up a binary search.
    """

    def __init__(self, sequences: Sequence[Ids], vocab: int, order: int = 3) -> None:
        """Count the n-grams of `sequences`; ids lie in `[0, vocab)`.

        Raises:
            InputError: no sequence has `order` tokens, or `vocab ** order` overflows an int64.
        """
        if order < 1 or order * np.log2(vocab) >= 63:
            raise InputError(f"n-grams of order {order} over {vocab} tokens do not fit in 63 bits: lower the order")
        windows = [_windows(np.asarray(ids), order) for ids in sequences if len(ids) >= order]
        if not windows:
            raise InputError(f"the n-gram model needs texts of at least {order} tokens")
        self.vocab, self.order = vocab, order
        frequency = np.bincount(np.concatenate([np.asarray(ids) for ids in sequences]), minlength=vocab) + 1
        self.log_frequency: Floats = np.log(frequency / frequency.sum())
        grams, counts = np.unique(_encode(np.concatenate(windows), vocab), return_counts=True)
        self._orders = [_order(grams, counts, vocab)]
        for k in range(order - 1, 0, -1):
            # Below the highest order an n-gram counts once for each distinct token before it.
            grams, counts = np.unique(grams % vocab**k, return_counts=True)
            self._orders.insert(0, _order(grams, counts, vocab))

    def log_prob(self, windows: Ints) -> Floats:
        """Natural log-probability of the last id of each row of `windows` `(n, order)` given the others."""
        p = np.full(len(windows), 1 / self.vocab)
        for k, level in enumerate(self._orders, start=1):
            grams = _encode(windows[:, -k:], self.vocab)
            at = _find(level.contexts, grams // self.vocab)
            seen = at >= 0
            total = np.where(seen, level.totals[at], 1)
            count = level.counts[_find(level.grams, grams)] * (_find(level.grams, grams) >= 0)
            lower = level.discount * level.types[at] / total
            p = np.where(seen, np.maximum(count - level.discount, 0) / total + lower * p, p)
        return np.asarray(np.log(p))

    def losses(self, contexts: Sequence[Ids], continuations: Sequence[Ids]) -> tuple[Floats, Floats]:
        """Mean loss in nats a token of each continuation: given the text before it, and without context.

        The second is that of the smoothed token frequencies. Tokens with fewer than `order - 1` tokens before
        them are left out; NaN if none remains.
        """
        parts, owners = [], []
        for i, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
            before = list(context)[max(len(context) - self.order + 1, 0) :]
            ids = np.asarray([*before, *continuation], dtype=np.int64)
            if len(continuation) and len(ids) >= self.order:
                parts.append(_windows(ids, self.order))
                owners += [i] * len(parts[-1])
        if not parts:
            return np.full(len(continuations), np.nan), np.full(len(continuations), np.nan)
        windows = np.concatenate(parts)
        n = np.bincount(owners, minlength=len(continuations)).astype(float)
        n[n == 0] = np.nan
        ngram, unigram = (
            -np.bincount(owners, weights=log_p, minlength=len(n)) / n
            for log_p in (self.log_prob(windows), self.log_frequency[windows[:, -1]])
        )
        return ngram, unigram


def distinct_2(ids: Ids) -> float:
    """Distinct bigrams as a share of all bigrams; NaN with fewer than two tokens."""
    pairs = list(itertools.pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else float("nan")


@dataclass(frozen=True)
class FluencyJudge:
    """Scores continuations from 0 to 2, as `2 * order * gate`.

    `order` is about the order of the words and not about their rarity, for a topic may bring rare names: it
    rests on SLOR, the log-likelihood a token under the n-gram model less that under token frequencies (Pauls
    and Klein 2012; Lau, Clark and Lappin 2017). It is 1 from the median SLOR of the unsteered continuations
    upwards and falls linearly to 0 at the median of the same texts with their words shuffled.

    `gate` is 1 where the share of distinct bigrams is at least the 5th percentile of human text, and falls
    linearly to 0 below it: loops are likely text to a language model, so likelihood alone rewards them.

    Attributes:
        ngrams: the language model.
        tokenize: texts to token ids, not necessarily the steered model's.
        full: SLOR from which `order` is 1, in nats a token.
        zero: SLOR up to which it is 0.
        gate_full: distinct-2 from which the gate is fully open.
    """

    ngrams: NGramModel
    tokenize: Tokenize
    full: float
    zero: float
    gate_full: float

    @classmethod
    def calibrate(
        cls,
        ngrams: NGramModel,
        tokenize: Tokenize,
        prompts: Sequence[str],
        unsteered: Sequence[str],
        human: Sequence[str],
        *,
        seed: int = 0,
    ) -> FluencyJudge:
        """A judge whose scale is set by unsteered continuations of `prompts` and by human text.

        Raises:
            InputError: shuffling the words of the unsteered text does not lower its SLOR: there is no scale.
        """
        contexts = tokenize(prompts)
        full, zero = (
            float(np.nanmedian(_slor(ngrams, contexts, tokenize(texts))))
            for texts in (unsteered, shuffle_words(unsteered, seed))
        )
        if not zero < full:
            raise InputError(
                f"unsteered text (median SLOR {full:.2f}) is no likelier than shuffled text ({zero:.2f}): "
                "the fluency judge needs more training text in the language of the generations"
            )
        continuations = [continuation for _, continuation in _cut(human)]
        if not continuations:
            raise InputError(f"the fluency judge needs human texts of at least {sum(_CUT)} words, got none")
        gate = float(np.nanquantile([distinct_2(ids) for ids in tokenize(continuations)], 0.05))
        return cls(ngrams, tokenize, full, zero, gate)

    def measure(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
        """Of each continuation: `fluency` (0 to 2), `nll_ngram`, `slor` (nats a token) and `distinct_2`.

        A continuation too short for the others has fluency 0 and NaN for them.
        """
        ids = self.tokenize(texts)
        nll, nll_unigram = self.ngrams.losses(self.tokenize(prompts), ids)
        slor = nll_unigram - nll
        distinct = np.array([distinct_2(row) for row in ids])
        order = np.clip((slor - self.zero) / (self.full - self.zero), 0, 1)
        gate = np.clip(distinct / self.gate_full, 0, 1)
        return {
            "fluency": np.nan_to_num(2 * order * gate),
            "nll_ngram": nll,
            "slor": slor,
            "distinct_2": distinct,
        }

    def validate(self, human: Sequence[str], *, seed: int = 0) -> dict[str, float]:
        """AUROC of the score between human text, which the n-gram model has not seen, and bad text.

        Returns:
            `shuffled`: against the same words in random order; `loops`: against the first three words
            repeated; `loops_ungated`: the latter by SLOR alone.
        """
        pairs = _cut(human)
        prompts, good_text = [prompt for prompt, _ in pairs], [text for _, text in pairs]
        loops = [" ".join((text.split()[:3] * _CUT[1])[: _CUT[1]]) for text in good_text]
        good = self.measure(prompts, good_text)
        shuffled, looped = (self.measure(prompts, bad) for bad in (shuffle_words(good_text, seed), loops))
        return {
            "shuffled": _auroc(good["fluency"], shuffled["fluency"]),
            "loops": _auroc(good["fluency"], looped["fluency"]),
            "loops_ungated": _auroc(good["slor"], looped["slor"]),
        }


def _cut(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(prompt, continuation) from each text that is long enough, as long as the suite's generations."""
    prompt, length = _CUT
    words = [row for row in map(str.split, texts) if len(row) >= prompt + length]
    return [(" ".join(row[:prompt]), " ".join(row[prompt : prompt + length])) for row in words]


def _slor(ngrams: NGramModel, contexts: Sequence[Ids], continuations: Sequence[Ids]) -> Floats:
    nll, nll_unigram = ngrams.losses(contexts, continuations)
    return nll_unigram - nll


def shuffle_words(texts: Sequence[str], seed: int = 0) -> list[str]:
    """The words of each text in a random order."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.permutation(text.split())) for text in texts]


def encode_corpus(texts: Sequence[str], tokenize: Tokenize, max_tokens: int, block: int = 2048) -> list[list[int]]:
    """Token ids of the first texts that together have about `max_tokens` tokens, or of all."""
    rows: list[list[int]] = []
    with tqdm(total=max_tokens, desc="fluency judge", unit="tok", mininterval=2) as bar:
        for start in range(0, len(texts), block):
            new = tokenize(texts[start : start + block])
            rows += new
            bar.update(sum(map(len, new)))
            if bar.n >= max_tokens:
                break
        bar.total = bar.n  # the texts may have ended before the budget
    return rows


def _auroc(good: Floats, bad: Floats) -> float:
    return float(roc_auc_score(np.repeat([1, 0], [len(good), len(bad)]), np.concatenate([good, bad])))


def _windows(ids: Ints, order: int) -> Ints:
    return np.lib.stride_tricks.sliding_window_view(ids.astype(np.int64), order)


def _encode(windows: Ints, vocab: int) -> Ints:
    """Each row of ids as one number, the ids being its digits in base `vocab`."""
    return np.asarray(windows @ (vocab ** np.arange(windows.shape[1] - 1, -1, -1, dtype=np.int64)))


def _order(grams: Ints, counts: Ints, vocab: int) -> _Order:
    contexts, first, types = np.unique(grams // vocab, return_index=True, return_counts=True)
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    return _Order(grams, counts, contexts, np.add.reduceat(counts, first), types, discount)


def _find(values: Ints, wanted: Ints) -> Ints:
    """Position of each wanted number in sorted `values`, -1 where it is not there."""
    at = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[at] == wanted, at, -1)
