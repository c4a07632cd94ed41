"""How fluent a continuation is, by a language model that did not write it and a gate against repetition."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from glp_lens import corpus, lm
from glp_lens.defaults import DEFAULT_DEVICE, DEFAULT_DTYPE
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache, digest
from glp_lens.evals.steering import checks
from glp_lens.evals.steering.ngrams import Floats, Ids, NGramModel, NGramScorer, Tokenize, encode_corpus
from glp_lens.evals.steering.second_model import SecondModel
from glp_lens.intervals import Interval
from glp_lens.types import Json

Kind = Literal["auto", "lm", "ngram"]
ADMISSION = {
    "lm": {"shuffled": 0.90, "loops": 0.90, "number_runs": 0.90, "spliced": 0.75},
    "ngram": {"shuffled": 0.85, "loops": 0.85, "number_runs": 0.85},
}
"""Least AUROC of each kind of judge against bad text. Gemma 3 270M has .97, .96, .93 and .88 on continuations of 24
tokens; the trigram model about .90 on shuffled words, and no n-gram model can tell spliced text."""
_GATE = 0.05
"""Share of human texts that the gate takes something off."""
_CHARACTERS = 4
_HUMAN_TEXTS = {"lm": 200, "ngram": 400}
"""Human texts of the checks: a language model takes a second for a few."""
_LEAST_TEXTS, _LEAST_WORDS = 20, 8


class Scorer(Protocol):
    """A language model that says how likely a continuation is."""

    @property
    def name(self) -> str:
        """`lm` or `ngram`."""

    def identity(self) -> Json:
        """What its numbers depend on."""

    def measure(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
        """Its measures of each text given its prompt, NaN where a text is too short."""

    def likelihood(self, measures: dict[str, Floats]) -> Floats:
        """What the scale of fluency rests on, higher for better text."""


class Embedder(Protocol):
    """What is used of `judges.SentenceEmbedder` here: its word pieces."""

    @property
    def vocab(self) -> int:
        """Number of token ids."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Word-piece ids of each text, without special tokens."""


def distinct_2(ids: Ids) -> float:
    """Distinct bigrams as a share of all bigrams; NaN with fewer than two tokens."""
    pairs = list(itertools.pairwise(ids))
    return len(set(pairs)) / len(pairs) if pairs else float("nan")


def distinct_characters(text: str) -> float:
    """Distinct sequences of four characters as a share of all, whatever the case; NaN with fewer than four characters.

    Word pieces hide a run of digits: `100000000000` is three of them, all different.
    """
    text = text.strip().casefold()
    grams = [text[i : i + _CHARACTERS] for i in range(len(text) - _CHARACTERS + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


@dataclass(frozen=True)
class Scale:
    """What turns a likelihood and two shares of distinct pieces into a score.

    Attributes:
        full: likelihood from which `order` is 1: the median of unsteered continuations.
        zero: likelihood up to which it is 0: the median of the same with their words shuffled.
        distinct_2: share of distinct bigrams from which the gate is fully open.
        distinct_characters: share of distinct sequences of characters, likewise.
    """

    full: float
    zero: float
    distinct_2: float
    distinct_characters: float


@dataclass(frozen=True)
class FluencyJudge:
    """Scores continuations from 0 to 2, as `2 * order * gate`.

    `order` is 1 from the likelihood of the median unsteered continuation upwards, and falls linearly to 0 at that of
    the median of the same texts with their words shuffled. The likelihood is minus nats per byte of a second language
    model (`second_model`), or SLOR of a trigram model (`ngrams`).

    `gate` is 1 where the shares of distinct bigrams and of distinct sequences of four characters are both at least
    the 5th percentile of human text, and falls linearly to 0 with the lower of the two: loops and runs of digits are
    likely text to a language model, so likelihood alone rewards them.

    Attributes:
        scorer: the language model.
        tokenize: texts to word pieces, for `distinct_2`.
        scale: what scores are measured on.
        checks: AUROC between human text and text that is bad in a known way: `shuffled`, `loops`, `number_runs`,
            `spliced`.
        calibration: hash of the texts that the scale was set by.
        note: why this kind of judge was taken, where another was wanted.
    """

    scorer: Scorer
    tokenize: Tokenize
    scale: Scale
    checks: dict[str, Interval] = field(default_factory=dict)
    calibration: str = ""
    note: str | None = None

    @property
    def name(self) -> str:
        """`lm` or `ngram`."""
        return self.scorer.name

    def identity(self) -> Json:
        """What scores depend on, for caches and provenance."""
        return {**self.scorer.identity(), "calibration": self.calibration}

    def measure(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
        """Of each continuation `fluency` (0 to 2), `distinct_2`, `distinct_characters` and the scorer's own measures.

        Those are `nll_per_byte`, or `nll_ngram` and `slor` in nats a token. A continuation too short for the others
        has fluency 0 and NaN for them.
        """
        measures = self.scorer.measure(prompts, texts)
        distinct = _distinct(self.tokenize, texts)
        order = np.clip(
            (self.scorer.likelihood(measures) - self.scale.zero) / (self.scale.full - self.scale.zero), 0, 1
        )
        gate = np.minimum(*(distinct[name] / getattr(self.scale, name) for name in distinct)).clip(max=1)
        return {"fluency": np.nan_to_num(2 * order * gate), **measures, **distinct}

    def check(self, prompts: Sequence[str], texts: Sequence[str], *, seed: int = 0) -> dict[str, Interval]:
        """AUROC of the score between human continuations and bad ones: see `checks.check`."""
        return checks.check(lambda p, t: self.measure(p, t)["fluency"], prompts, texts, seed)

    def failed(self) -> str:
        """The first check by which the judge is not admitted, in words; empty if none."""
        for name, least in ADMISSION[self.name].items():
            if self.checks[name].value < least:
                return f"AUROC {self.checks[name].value:.2f} against {name.replace('_', ' ')}, expected {least:.2f}"
        return ""


def make_judge(
    prompts: Sequence[str],
    unsteered: Sequence[str],
    *,
    embedder: Embedder,
    kind: Kind = "auto",
    steered: str | lm.Model | None = None,
    model: str | None = None,
    texts: Sequence[str] | None = None,
    tokens: int = 1_500_000,
    seed: int = 0,
    dtype: str = DEFAULT_DTYPE,
    device: str = DEFAULT_DEVICE,
    cache: ResultCache | None = None,
) -> FluencyJudge:
    """A judge of fluency, its scale set by unsteered continuations and by human text, and its checks.

    Args:
        prompts: what the unsteered continuations go on from.
        unsteered: one continuation of each.
        embedder: gives word pieces, `judges.SentenceEmbedder`.
        kind: `lm` for a second language model, `ngram` for a trigram model, `auto` for the first where one can be
            opened and passes its checks, else the second.
        steered: the model that wrote the texts, or its name: neither it nor one of its family may judge.
        model: name or folder of the second model, by default the first packaged one that may judge.
        texts: human texts, by default the packaged corpus; the last ones are kept for the scale and the checks.
        tokens: about how many the trigram model is trained on, at most.
        seed: of what is done to texts.
        dtype: of the second model.
        device: it runs on.
        cache: keeps scale and checks.

    Raises:
        InputError: the second model cannot be opened or is of the steered model's family, too few human texts, or a
            judge that fails its checks.
    """
    if kind not in ("auto", "lm", "ngram"):
        raise InputError(f"the kind of fluency judge must be auto, lm or ngram, got {kind!r}")
    texts = [document.text for document in corpus.packaged(seed)] if texts is None else list(texts)
    cache = cache or ResultCache(None)
    note = None
    if kind != "ngram":
        try:
            second = SecondModel.open(model, steered=steered, dtype=dtype, device=device)
            return _calibrated(second, embedder.tokenize, prompts, unsteered, texts, seed, cache)
        except InputError as error:
            if kind == "lm" or model is not None:
                raise
            note = f"fluency is judged by a trigram model: {error}"
    kept = texts[: len(texts) - min(_HUMAN_TEXTS["ngram"], len(texts) // 2)]
    ngrams = NGramModel(encode_corpus(kept, embedder.tokenize, tokens), embedder.vocab)
    scorer = NGramScorer(ngrams, embedder.tokenize)
    return _calibrated(scorer, embedder.tokenize, prompts, unsteered, texts, seed, cache, note)


def _calibrated(
    scorer: Scorer,
    tokenize: Tokenize,
    prompts: Sequence[str],
    unsteered: Sequence[str],
    texts: Sequence[str],
    seed: int,
    cache: ResultCache,
    note: str | None = None,
) -> FluencyJudge:
    held_out = texts[len(texts) - min(_HUMAN_TEXTS["ngram"], len(texts) // 2) :]
    human = human_continuations(held_out, prompts, unsteered)[: _HUMAN_TEXTS[scorer.name]]
    calibration = digest(list(prompts), list(unsteered), human, seed)

    def make() -> Json:
        scale = calibrate(scorer, tokenize, prompts, unsteered, human, seed)
        own = FluencyJudge(scorer, tokenize, scale).check(*_columns(human), seed=seed)
        return {"scale": vars(scale), "checks": {name: list(value) for name, value in own.items()}}

    def read(value: Any) -> FluencyJudge:
        own = {name: Interval(*numbers) for name, numbers in value["checks"].items()}
        return FluencyJudge(scorer, tokenize, Scale(**value["scale"]), own, calibration, note)

    judge = cache.get(f"fluency-judge-{scorer.name}", lambda: [scorer.identity(), calibration], make, read)
    if reason := judge.failed():
        raise InputError(
            f"the fluency judge ({judge.name}) cannot tell human text from bad text ({reason}): it needs human texts "
            "in the language of the generations, texts of 16 tokens at least, or a second language model"
        )
    return judge


def calibrate(
    scorer: Scorer,
    tokenize: Tokenize,
    prompts: Sequence[str],
    unsteered: Sequence[str],
    human: Sequence[tuple[str, str]],
    seed: int = 0,
) -> Scale:
    """The scale that unsteered continuations of `prompts` and human continuations set.

    Raises:
        InputError: shuffling the words of the unsteered text does not make it less likely: there is no scale.
    """
    shuffled = checks.shuffle_words(unsteered, seed)
    measures = scorer.measure([*prompts, *prompts], [*unsteered, *shuffled])
    full, zero = (float(np.nanmedian(half)) for half in np.split(scorer.likelihood(measures), 2))
    if not zero < full:
        raise InputError(
            f"unsteered text (median likelihood {full:.2f}) is no likelier than shuffled text ({zero:.2f}): "
            "the fluency judge needs a language model that knows the language of the generations"
        )
    distinct = _distinct(tokenize, [text for _, text in human])
    return Scale(full, zero, **{name: float(np.nanquantile(values, _GATE)) for name, values in distinct.items()})


def human_continuations(
    texts: Sequence[str], prompts: Sequence[str], unsteered: Sequence[str]
) -> list[tuple[str, str]]:
    """(prompt, continuation) from each text that is long enough, of as many words as the median of the generations.

    A continuation has eight words at least: less can neither loop nor be spliced.

    Raises:
        InputError: fewer than 20 texts are.
    """
    begin, length = (int(np.median([len(text.split()) for text in side])) for side in (prompts, unsteered))
    begin, length = max(begin, 1), max(length, _LEAST_WORDS)
    words = [row for row in map(str.split, texts) if len(row) >= begin + length]
    if len(words) < _LEAST_TEXTS:
        raise InputError(
            f"the fluency judge needs {_LEAST_TEXTS} held-out human texts of at least {begin + length} words, "
            f"got {len(words)} in {len(texts)}: pass more texts, or longer ones"
        )
    return [(" ".join(row[:begin]), " " + " ".join(row[begin : begin + length])) for row in words]


def _columns(pairs: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [prompt for prompt, _ in pairs], [text for _, text in pairs]


def _distinct(tokenize: Tokenize, texts: Sequence[str]) -> dict[str, Floats]:
    return {
        "distinct_2": np.array([distinct_2(ids) for ids in tokenize(texts)]),
        "distinct_characters": np.array([distinct_characters(text) for text in texts]),
    }
