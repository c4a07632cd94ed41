"""An n-gram language model of word pieces, as the judge of fluency where no second language model can be opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from glp_lens.errors import InputError
from glp_lens.evals.cache import digest
from glp_lens.types import Json

Ids = Sequence[int]
Tokenize = Callable[[Sequence[str]], list[list[int]]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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

    def hash(self) -> str:
        """Hash of the counts, which decide every probability."""
        top = self._orders[-1]
        return digest(top.grams, top.counts, self.log_frequency)

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


class NGramScorer:
    """How likely the order of a continuation's words is under an n-gram model, in nats a token.

    `slor` is its log-likelihood less that under token frequencies (Pauls and Klein 2012; Lau, Clark and Lappin 2017):
    about the order of the words and not about their rarity, for a topic may bring rare names.
    """

    name = "ngram"

    def __init__(self, ngrams: NGramModel, tokenize: Tokenize) -> None:
        self.ngrams, self.tokenize = ngrams, tokenize

    def identity(self) -> Json:
        """What its numbers depend on, for caches and provenance."""
        return {"kind": self.name, "order": self.ngrams.order, "vocab": self.ngrams.vocab, "counts": self.ngrams.hash()}

    def measure(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
        """`nll_ngram` and `slor` of each text given its prompt, in nats a token; NaN where the text is too short."""
        nll, nll_unigram = self.ngrams.losses(self.tokenize(prompts), self.tokenize(texts))
        return {"nll_ngram": nll, "slor": nll_unigram - nll}

    @staticmethod
    def likelihood(measures: dict[str, Floats]) -> Floats:
        """What the scale of fluency rests on, higher for better text."""
        return measures["slor"]


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
