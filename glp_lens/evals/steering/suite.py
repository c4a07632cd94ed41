"""The steering suite: whether repairing a steered activation keeps the concept and restores fluency."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from glp_lens import corpus, lm, provenance
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.entries import Entry, usable
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import bootstrap_mean
from glp_lens.evals.steering import concepts
from glp_lens.evals.steering.concepts import Concept
from glp_lens.evals.steering.directions import difference_of_means, random_direction
from glp_lens.evals.steering.fluency import FluencyJudge, NGramModel, encode_corpus
from glp_lens.evals.steering.generate import generate
from glp_lens.evals.steering.judges import ADMISSION_WORDS, ConceptJudge, SentenceEmbedder, fit_judges
from glp_lens.evals.steering.scores import Frontier, chosen_elsewhere, halves, harmonic_mean
from glp_lens.evals.steering.settings import PLAIN, PROMPTS, RANDOM, UNSTEERED, SteeringSettings
from glp_lens.interface import Projector

_HUMAN_TEXTS = 400
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class SteeringData:
    """What steering is measured on.

    Attributes:
        model: a HookedTransformer or TransformerBridge.
        hook: the hook point to steer at, the one the entries were trained on.
        act_norm: median norm of activations there (`ActivationStore.median_norm`): a strength of 1 adds a vector of
            this length.
        concept: your own texts instead of those of `SteeringSettings.concept`.
        prompts: your own prompts, at least two, instead of the packaged ones.
        fluency_texts: texts for the n-gram model, the packaged corpus by default; the last ones validate it.
        embedder: the sentence model of the concept judge, loaded by default.
    """

    model: lm.Model
    hook: str
    act_norm: float
    concept: Concept | None = None
    prompts: Sequence[str] | None = None
    fluency_texts: Sequence[str] | None = None
    embedder: SentenceEmbedder | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be steered."""
        if not (np.isfinite(self.act_norm) and self.act_norm > 0):
            raise InputError(f"act_norm must be a positive number, got {self.act_norm}: pass the store's median_norm")
        if self.prompts is not None and (len(self.prompts) < 2 or not all(text.strip() for text in self.prompts)):
            raise InputError("steering needs at least two prompts that are not empty: they are split in halves")


@dataclass(frozen=True)
class _Condition:
    """One way to steer: a direction in activation units (or none) and who repairs the result (or nobody)."""

    label: str
    strengths: tuple[float, ...]
    direction: Tensor | None = None
    entry: Entry | None = None

    @property
    def options(self) -> Setting:
        """Those of the repair, as part of the setting of a metric."""
        return self.entry.setting if self.entry else Setting()

    def at(self, strength: float | str) -> Setting:
        """The setting of a metric at one strength."""
        return Setting(alpha=strength) | self.options


@dataclass(frozen=True)
class _Generations:
    """Of one condition: continuations by prompt and strength, and their loss under the unsteered model."""

    texts: list[list[str]]
    nll_own: NDArray[np.float64]


def run(
    entries: Sequence[Entry],
    data: SteeringData,
    settings: SteeringSettings | None = None,
    *,
    folder: str | Path | None = None,
    allow_mismatch: bool = False,
) -> Results:
    """Steer generations towards a concept, plain and repaired by each entry, and score concept and fluency.

    Conditions are `unsteered`, `plain`, one for each entry under its label, and `random`: a random direction
    of equal norm, unrepaired. Concept and fluency run from 0 to 2 (see `judges` and `fluency`); `harmonic`
    is their harmonic mean in each text. Metrics, with intervals by bootstrap over prompts:

    - at each strength (`alpha=0.4`): `concept`, `concept_tfidf`, `fluency`, `harmonic`, `distinct_2`,
      `nll_ngram`, `slor`, `nll_own` (loss of the text under the unsteered language model), and paired differences
      `concept_minus:unsteered`, `harmonic_minus:unsteered`, `concept_minus:random`, `harmonic_minus:random`;
    - at the strength chosen on the other half of the prompts (`alpha=chosen`): `concept`, `fluency`,
      `harmonic`, and `harmonic_diff:OTHER` against every other condition;
    - `concept_at_fluency` at 80% of the unsteered fluency, and `concept_at_fluency_diff:plain`: whether a
      repair beats a smaller strength;
    - `judge_auroc:*` and `judge_agreement:*` on how far to trust the judges.

    `extras` holds the chosen strengths, example texts, and every generation with its scores.

    Args:
        entries: models with the `Projector` capability; others are noted in `failures`.
        data: the language model, where and how strongly to steer, and your own texts, if any.
        settings: by default `SteeringSettings()`.
        folder: where directions and generations are kept, each under a hash of all its inputs, so that a later or
            interrupted run continues; nothing is kept without it.
        allow_mismatch: use models trained at another hook point, or on another language model or weight
            processing; each is noted in `failures`.

    Raises:
        InputError: labels that repeat, an entry trained elsewhere, or a concept that cannot be judged.
    """
    began = time.monotonic()
    settings, model, hook = settings or SteeringSettings(), data.model, data.hook
    prompts = PROMPTS[: settings.prompts] if data.prompts is None else data.prompts
    notes = provenance.check_edit(model, hook, allow_mismatch=allow_mismatch)
    concept = data.concept or concepts.load(settings.concept, settings.seed)
    embedder = data.embedder or SentenceEmbedder.load()
    judges = fit_judges(concept, embedder, seed=settings.seed)  # first: it refuses concepts that cannot be judged
    here = provenance.here(model, hook)
    able, accepted = usable(
        entries,
        Projector,
        lambda _: here,
        reserved=(UNSTEERED, PLAIN, RANDOM),
        left_out="{label} cannot project activations: left out of steering",
        allow_mismatch=allow_mismatch,
    )
    positive, negative = (list(side[: settings.texts_per_side]) for side in (concept.positive, concept.negative))
    results = Results(
        "steering",
        config={
            "concept": concept.name, "hook": hook, "act_norm": data.act_norm, "strengths": list(settings.strengths),
            "prompts": list(prompts), "new_tokens": settings.new_tokens, "seed": settings.seed,
            "texts_per_side": settings.texts_per_side, "fluency_tokens": settings.fluency_tokens,
            "entries": {e.label: str(e.setting) for e in entries},
        },
        data={
            "model": here["model"],
            "direction_texts": [len(positive), len(negative)],
            "models": {e.label: e.model.provenance for e in entries},
        },
        failures=notes + accepted,
    )  # fmt: skip
    cache = ResultCache(folder, lambda: here)
    direction = cache.get(
        f"direction-{concept.name}",
        lambda: [positive, negative],
        lambda: difference_of_means(model, positive, negative, hook).tolist(),
        lambda values: torch.tensor(values, dtype=torch.float32).reshape(here["d_in"] or -1),
    )
    conditions = _conditions(able, direction, data.act_norm, settings)
    generations = {
        c.label: _generations(model, hook, c, prompts, settings, cache, allow_mismatch=allow_mismatch)
        for c in conditions
    }
    unsteered = [row[0] for row in generations[UNSTEERED].texts]
    fluency = _fluency_judge(embedder, prompts, unsteered, data.fluency_texts, settings, results)
    scores = {c.label: _score(prompts, generations[c.label], judges, fluency) for c in conditions}
    for label, own in scores.items():
        if short := int(np.isnan(own["distinct_2"]).sum()):
            results.failures.append(f"{label}: {short} texts are under two tokens long, so fluency 0")
    _add_judges(judges, scores, concept, results)
    _add_strengths(conditions, scores, concept.name, results, settings.seed)
    _add_chosen(conditions, scores, concept.name, results, settings.seed)
    _add_frontier(conditions, scores, concept.name, results, settings.seed)
    texts = [
        {"model": c.label, "alpha": alpha, "prompt": prompt, "text": generations[c.label].texts[i][j],
         "concept": round(float(scores[c.label]["concept"][i, j]), 3),
         "fluency": round(float(scores[c.label]["fluency"][i, j]), 3)}
        for c in conditions for j, alpha in enumerate(c.strengths) for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    results.extras["generations"] = texts
    results.extras["examples"] = [text for text in texts if text["prompt"] == prompts[0]]
    results.seconds = time.monotonic() - began
    return results


def _conditions(
    entries: Sequence[Entry], direction: Tensor, act_norm: float, settings: SteeringSettings
) -> list[_Condition]:
    strengths, towards = settings.strengths, act_norm * direction
    control = act_norm * random_direction(len(direction), settings.seed)
    conditions = [_Condition(UNSTEERED, (0.0,)), _Condition(PLAIN, strengths, towards)]
    conditions += [_Condition(entry.label, strengths, towards, entry) for entry in entries]
    conditions.append(_Condition(RANDOM, strengths, control))
    if settings.random_repaired:
        conditions += [_Condition(f"{RANDOM}+{e.label}", strengths, control, e) for e in entries]
    return conditions


def _generations(
    model: lm.Model,
    hook: str,
    condition: _Condition,
    prompts: Sequence[str],
    settings: SteeringSettings,
    cache: ResultCache,
    *,
    allow_mismatch: bool,
) -> _Generations:
    """Generate, or read what an equal run has generated before."""
    entry, direction, seed = condition.entry, condition.direction, settings.seed

    def inputs() -> list[Any]:
        projector = None if entry is None else [entry.options, entry.model.fingerprint()]
        return [prompts, settings.new_tokens, seed, condition.strengths, direction, projector]

    def make() -> list[Any]:
        ids = generate(
            model, prompts, condition.strengths, hook=hook, direction=direction, entry=entry,
            new_tokens=settings.new_tokens, seed=seed, desc=f"steer {condition.label}", allow_mismatch=allow_mismatch,
        )  # fmt: skip
        return [ids.tolist(), _own_nll(model, prompts, ids).tolist()]

    def read(value: Any) -> tuple[list[list[list[int]]], NDArray[np.float64]]:
        ids, nll_own = value
        shape = (len(prompts), len(condition.strengths))
        return np.reshape(ids, (*shape, settings.new_tokens)).tolist(), np.reshape(nll_own, shape).astype(np.float64)

    ids, nll_own = cache.get(f"generations-{condition.label}", inputs, make, read)
    assert model.tokenizer is not None  # texts were made of ids with it
    special = set(model.tokenizer.all_special_ids)
    texts = [[_decode(model.tokenizer, text, special) for text in row] for row in ids]
    return _Generations(texts, nll_own)


def _decode(tokenizer: Any, ids: Sequence[int], special: set[int]) -> str:
    """The text up to the first special token, after which the model believes to be somewhere else."""
    end = next((i for i, token in enumerate(ids) if token in special), len(ids))
    return str(tokenizer.decode(ids[:end]))


def _own_nll(model: lm.Model, prompts: Sequence[str], ids: Tensor, block: int = 16) -> Tensor:
    """Mean loss a token of each continuation under the unsteered model, `(n_prompts, n_strengths)`."""
    before = lm.to_ids(model, prompts, max_length=1024)
    rows = [before[i] + text.tolist() for i, texts in enumerate(ids) for text in texts]
    starts = torch.tensor([len(before[i]) for i in range(len(prompts))]).repeat_interleave(ids.shape[1])
    means = []
    for at in range(0, len(rows), block):
        tokens, mask = lm.pad(rows[at : at + block])
        nll = lm.token_nll(model, tokens, mask)
        new = torch.arange(nll.shape[1]) >= starts[at : at + block, None] - 1
        means.append((nll * new).sum(1) / ids.shape[2])
    return torch.cat(means).reshape(ids.shape[:2])


def _fluency_judge(
    embedder: SentenceEmbedder,
    prompts: Sequence[str],
    unsteered: Sequence[str],
    texts: Sequence[str] | None,
    settings: SteeringSettings,
    results: Results,
) -> FluencyJudge:
    seed = settings.seed
    texts = [document.text for document in corpus.packaged(seed)] if texts is None else list(texts)
    n_human = min(_HUMAN_TEXTS, len(texts) // 2)
    human = texts[len(texts) - n_human :]
    ids = encode_corpus(texts[: len(texts) - n_human], embedder.tokenize, settings.fluency_tokens)
    ngrams = NGramModel(ids, embedder.vocab)
    judge = FluencyJudge.calibrate(ngrams, embedder.tokenize, prompts, unsteered, human, seed=seed)
    for name, value in judge.validate(human, seed=seed).items():
        results.add("judge:ngram", "all", "", "judge_auroc", value, n=n_human, other=name)
    results.data["fluency_judge"] = {"tokens": sum(map(len, ids)), "order": ngrams.order}
    return judge


def _score(
    prompts: Sequence[str],
    generations: _Generations,
    judges: tuple[ConceptJudge, ConceptJudge],
    fluency: FluencyJudge,
) -> Scores:
    """Every score of one condition, each `(n_prompts, n_strengths)`."""
    texts = [text for row in generations.texts for text in row]
    shape = generations.nll_own.shape
    repeated = [prompt for prompt in prompts for _ in range(shape[1])]
    of_texts = {"concept": judges[0].score(texts), "concept_tfidf": judges[1].score(texts)}
    of_texts |= fluency.measure(repeated, texts)
    scores = {name: values.reshape(shape) for name, values in of_texts.items()}
    scores["nll_own"] = generations.nll_own
    scores["harmonic"] = harmonic_mean(scores["concept"], scores["fluency"])
    return scores


def _add_judges(
    judges: tuple[ConceptJudge, ConceptJudge], scores: dict[str, Scores], concept: Concept, results: Results
) -> None:
    for judge in judges:
        label, setting = f"judge:{judge.name}", Setting(words=ADMISSION_WORDS)
        results.add(label, concept.name, setting, "judge_auroc", judge.auroc, n=judge.n, other="held_out")
    pooled = {
        name: np.concatenate([s[name].ravel() for s in scores.values()])
        for name in ("concept", "concept_tfidf", "fluency", "nll_own")
    }
    for label, second, a, b in (
        ("judge:tfidf", "minilm", pooled["concept"], pooled["concept_tfidf"]),
        ("judge:ngram", "nll_own", pooled["fluency"], -pooled["nll_own"]),
    ):
        keep = np.isfinite(a) & np.isfinite(b)
        if len(set(a[keep])) > 1 and len(set(b[keep])) > 1:
            for name, statistic in (("spearman", spearmanr), ("pearson", pearsonr)):
                value, setting = float(statistic(a[keep], b[keep])[0]), Setting({"with": second})
                results.add(label, concept.name, setting, "judge_agreement", value, n=int(keep.sum()), other=name)


def _add_strengths(
    conditions: Sequence[_Condition], scores: dict[str, Scores], task: str, results: Results, seed: int
) -> None:
    """Means at each strength, and what changed against no steering and against a random direction."""
    for c in conditions:
        own = scores[c.label]
        for j, alpha in enumerate(c.strengths):
            for name, values in own.items():
                if np.isfinite(values[:, j]).any():
                    results.add(c.label, task, c.at(alpha), name, **_mean(values[:, j], seed))
            for other in (UNSTEERED, RANDOM):
                if c.label in (UNSTEERED, other):
                    continue
                for name in ("concept", "harmonic"):
                    change = own[name][:, j] - scores[other][name][:, 0 if other == UNSTEERED else j]
                    results.add(c.label, task, c.at(alpha), f"{name}_minus", **_mean(change, seed), other=other)


def _add_chosen(
    conditions: Sequence[_Condition], scores: dict[str, Scores], task: str, results: Results, seed: int
) -> None:
    """Scores at the strength that the other half of the prompts prefers, and their paired differences."""
    n = len(scores[UNSTEERED]["harmonic"])
    parts = halves(n, seed)
    at_chosen: dict[str, Scores] = {}
    results.extras["chosen"] = {}
    for c in conditions:
        chosen = chosen_elsewhere(scores[c.label]["harmonic"], parts)
        at_chosen[c.label] = {
            name: scores[c.label][name][np.arange(n), chosen] for name in ("concept", "fluency", "harmonic")
        }
        if c.label != UNSTEERED:
            results.extras["chosen"][c.label] = [c.strengths[chosen[part[0]]] for part in parts]
            for name, values in at_chosen[c.label].items():
                results.add(c.label, task, c.at("chosen"), name, **_mean(values, seed))
    for a, b in permutations(conditions, 2):
        if a.label != UNSTEERED:
            difference = at_chosen[a.label]["harmonic"] - at_chosen[b.label]["harmonic"]
            results.add(a.label, task, a.at("chosen"), "harmonic_diff", **_mean(difference, seed), other=b.label)


def _add_frontier(
    conditions: Sequence[_Condition], scores: dict[str, Scores], task: str, results: Results, seed: int
) -> None:
    """Concept at equal fluency, which using less strength cannot improve."""
    start = scores[UNSTEERED]
    frontier = Frontier(start["fluency"][:, 0], seed=seed)
    values = {
        c.label: frontier.values(
            np.hstack([start["concept"], scores[c.label]["concept"]]),
            np.hstack([start["fluency"], scores[c.label]["fluency"]]),
        )
        for c in conditions
        if c.label != UNSTEERED
    }
    for c in conditions:
        if c.label == UNSTEERED:
            continue
        setting = Setting({"fluency>": "80% of unsteered"}) | c.options  # in files, fluency>=80% of unsteered
        at_fluency = frontier.interval(values[c.label])
        results.add(c.label, task, setting, "concept_at_fluency", **at_fluency._asdict())
        if c.label != PLAIN:
            gap = frontier.interval(values[c.label] - values[PLAIN])
            results.add(c.label, task, setting, "concept_at_fluency_diff", **gap._asdict(), other=PLAIN)


def _mean(values: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """Mean over prompts with its interval, as the value columns of a metric."""
    return bootstrap_mean(values, seed=seed)._asdict()
