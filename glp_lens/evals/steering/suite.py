"""The steering suite: whether repairing a steered activation keeps the concept and restores fluency."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from glp_lens import corpus, lm, provenance
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.results import Results
from glp_lens.evals.statistics import bootstrap_mean
from glp_lens.evals.steering import concepts
from glp_lens.evals.steering.concepts import Concept
from glp_lens.evals.steering.directions import difference_of_means, random_direction
from glp_lens.evals.steering.fluency import FluencyJudge, NGramModel, encode_corpus
from glp_lens.evals.steering.generate import PROMPTS, generate
from glp_lens.evals.steering.judges import ADMISSION_WORDS, ConceptJudge, SentenceEmbedder, fit_judges
from glp_lens.evals.steering.scores import Frontier, chosen_elsewhere, halves, harmonic_mean
from glp_lens.files import read_json, write_json
from glp_lens.interface import Projector
from glp_lens.types import Json

SUITE = "steering"
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
UNSTEERED, PLAIN, RANDOM = "unsteered", "plain", "random"
_HUMAN_TEXTS = 400
Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class _Condition:
    """One way to steer: a direction in activation units (or none) and who repairs the result (or nobody)."""

    label: str
    strengths: tuple[float, ...]
    direction: Tensor | None = None
    entry: Entry | None = None

    def setting(self, strength: float | str) -> str:
        """The `setting` of a metric at one strength."""
        alpha = f"alpha={strength:g}" if isinstance(strength, float) else f"alpha={strength}"
        return ";".join([alpha, *([self.entry.setting] if self.entry and self.entry.setting else [])])


@dataclass(frozen=True)
class _Generations:
    """Of one condition: continuations by prompt and strength, and their loss under the unsteered model."""

    texts: list[list[str]]
    nll_own: NDArray[np.float64]


def run(
    model: lm.Model,
    entries: Sequence[Entry],
    concept: str | Concept = "sports",
    *,
    hook: str,
    act_norm: float,
    strengths: Sequence[float] = STRENGTHS,
    prompts: int | Sequence[str] = 32,
    new_tokens: int = 24,
    seed: int = 0,
    folder: str | Path | None = None,
    texts_per_side: int = 256,
    random_repaired: bool = False,
    own_nll: bool = True,
    fluency_texts: Sequence[str] | None = None,
    fluency_tokens: int = 1_500_000,
    embedder: SentenceEmbedder | None = None,
    allow_mismatch: bool = False,
) -> Results:
    """Steer generations towards a concept, plain and repaired by each entry, and score concept and fluency.

    Conditions are `unsteered`, `plain`, one for each entry under its label, and `random`: a random direction
    of equal norm, unrepaired. Concept and fluency run from 0 to 2 (see `judges` and `fluency`); `harmonic`
    is their harmonic mean in each text. Metrics, with intervals by bootstrap over prompts:

    - at each strength (`alpha=0.4`): `concept`, `concept_tfidf`, `fluency`, `harmonic`, `distinct_2`,
      `nll_ngram`, `slor`, `nll_own`, and paired differences `concept_minus:unsteered`,
      `harmonic_minus:unsteered`, `concept_minus:random`, `harmonic_minus:random`;
    - at the strength chosen on the other half of the prompts (`alpha=chosen`): `concept`, `fluency`,
      `harmonic`, and `harmonic_diff:OTHER` against every other condition;
    - `concept_at_fluency` at 80% of the unsteered fluency, and `concept_at_fluency_diff:plain`: whether a
      repair beats a smaller strength;
    - `judge_auroc:*` and `judge_agreement:*` on how far to trust the judges.

    `extras` holds the chosen strengths, example texts, and every generation with its scores.

    Args:
        model: a HookedTransformer or TransformerBridge.
        entries: models with the `Projector` capability; others are noted in `failures`.
        concept: a name in `concepts.NAMES`, or your own texts.
        hook: the hook point to steer at, the one the entries were trained on.
        act_norm: median norm of activations there (`ActivationStore.median_norm`): a strength of 1 adds a
            vector of this length.
        strengths: rising and positive.
        prompts: how many of the packaged prefixes, or your own.
        new_tokens: tokens generated after each prefix, greedily.
        seed: for texts, noise, the random direction, halves and bootstrap.
        folder: where directions and generations are kept, so that a later or interrupted run with the same
            settings continues; nothing is kept without it.
        texts_per_side: texts with and texts without the concept that give the direction.
        random_repaired: also repair the random direction with each entry, as `random+LABEL`.
        own_nll: also measure the loss of the texts under the unsteered language model itself.
        fluency_texts: texts for the n-gram model, the packaged corpus by default; the last ones validate it.
        fluency_tokens: most tokens for the n-gram model.
        embedder: the sentence model of the concept judge, loaded by default.
        allow_mismatch: use models trained at another hook point, or on another language model or weight
            processing; each is noted in `failures`.

    Raises:
        InputError: bad arguments, an entry trained elsewhere, or a concept that cannot be judged.
    """
    began = time.monotonic()
    prompts = _check_prompts(prompts)
    strengths = _check_strengths(strengths)
    notes = provenance.check_edit(model, hook, allow_mismatch=allow_mismatch)
    if not (np.isfinite(act_norm) and act_norm > 0):
        raise InputError(f"act_norm must be a positive number, got {act_norm}: pass the store's median_norm")
    folder = None if folder is None else Path(folder)
    concept = concepts.load(concept, seed) if isinstance(concept, str) else concept
    results = Results(
        SUITE,
        config={
            "concept": concept.name, "hook": hook, "act_norm": act_norm, "strengths": list(strengths),
            "prompts": prompts, "new_tokens": new_tokens, "seed": seed, "texts_per_side": texts_per_side,
            "fluency_tokens": fluency_tokens, "entries": {e.label: e.setting for e in entries},
        },
        data={
            "model": lm.describe(model),
            "direction_texts": [min(texts_per_side, len(s)) for s in (concept.positive, concept.negative)],
            "models": {e.label: e.model.provenance for e in entries},
        },
        failures=notes,
    )  # fmt: skip
    embedder = embedder or SentenceEmbedder.load()
    judges = fit_judges(concept, embedder, seed=seed)  # first: it refuses concepts that cannot be judged
    here = provenance.here(model, hook)
    usable = _usable(entries, here, results, allow_mismatch=allow_mismatch)
    direction = _direction(model, concept, here, texts_per_side, folder)
    conditions = _conditions(usable, direction, act_norm, strengths, seed=seed, random_repaired=random_repaired)
    generations = {
        c.label: _generations(
            model,
            c,
            prompts,
            here=here,
            new_tokens=new_tokens,
            seed=seed,
            folder=folder,
            own_nll=own_nll,
            allow_mismatch=allow_mismatch,
        )
        for c in conditions
    }
    unsteered = [row[0] for row in generations[UNSTEERED].texts]
    fluency = _fluency_judge(
        embedder, prompts, unsteered, fluency_texts, max_tokens=fluency_tokens, results=results, seed=seed
    )
    scores = {c.label: _score(prompts, generations[c.label], judges, fluency) for c in conditions}
    for label, own in scores.items():
        if short := int(np.isnan(own["distinct_2"]).sum()):
            results.failures.append(f"{label}: {short} texts are under two tokens long, so fluency 0")
    _report_judges(judges, scores, concept, results)
    _report_strengths(conditions, scores, concept.name, results, seed)
    _report_chosen(conditions, scores, concept.name, results, seed)
    _report_frontier(conditions, scores, concept.name, results, seed)
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


def _check_prompts(prompts: int | Sequence[str]) -> list[str]:
    if isinstance(prompts, int):
        if not 2 <= prompts <= len(PROMPTS):
            raise InputError(f"prompts must lie between 2 and {len(PROMPTS)}, got {prompts}: or pass your own")
        return list(PROMPTS[:prompts])
    if len(prompts) < 2 or not all(text.strip() for text in prompts):
        raise InputError("steering needs at least two prompts that are not empty: they are split in halves")
    return list(prompts)


def _check_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(s) for s in strengths)
    if not values or values[0] <= 0 or any(b <= a for a, b in pairwise(values)):
        raise InputError(f"strengths must be positive and rising, got {list(strengths)}")
    return values


def _usable(entries: Sequence[Entry], here: Json, results: Results, *, allow_mismatch: bool) -> list[Entry]:
    """The entries that can repair; refuses labels used twice and models trained on other activations."""
    labels = [UNSTEERED, PLAIN, RANDOM, *(entry.label for entry in entries)]
    if len(set(labels)) != len(labels):
        raise InputError(f"entries need distinct labels other than {', '.join(labels[:3])}, got {labels[3:]}")
    usable = [entry for entry in entries if isinstance(entry.model, Projector)]
    for entry in entries:
        if entry not in usable:
            results.failures.append(f"{entry.label} cannot project activations: left out of steering")
    models = {entry.label: entry.model for entry in usable}
    results.failures += provenance.check_models(models, here, allow_mismatch=allow_mismatch)
    return usable


def _direction(model: lm.Model, concept: Concept, here: Json, n: int, folder: Path | None) -> Tensor:
    positive, negative = list(concept.positive[:n]), list(concept.negative[:n])
    fingerprint = {
        "model": here["model"],
        "weights": here["weights"],
        "hook": here["hook"],
        "texts": _digest(json.dumps([positive, negative]).encode()),
    }

    def make() -> list[float]:
        return difference_of_means(model, positive, negative, here["hook"]).tolist()

    return torch.tensor(_cached(folder, f"direction-{concept.name}", fingerprint, make), dtype=torch.float32)


def _conditions(
    entries: Sequence[Entry],
    direction: Tensor,
    act_norm: float,
    strengths: tuple[float, ...],
    *,
    seed: int,
    random_repaired: bool,
) -> list[_Condition]:
    towards = act_norm * direction
    control = act_norm * random_direction(len(direction), seed)
    conditions = [_Condition(UNSTEERED, (0.0,)), _Condition(PLAIN, strengths, towards)]
    conditions += [_Condition(entry.label, strengths, towards, entry) for entry in entries]
    conditions.append(_Condition(RANDOM, strengths, control))
    if random_repaired:
        conditions += [_Condition(f"{RANDOM}+{e.label}", strengths, control, e) for e in entries]
    return conditions


def _generations(
    model: lm.Model,
    condition: _Condition,
    prompts: Sequence[str],
    *,
    here: Json,
    new_tokens: int,
    seed: int,
    folder: Path | None,
    own_nll: bool,
    allow_mismatch: bool,
) -> _Generations:
    """Generate, or read what an equal run has generated before."""
    entry, direction = condition.entry, condition.direction
    fingerprint = {
        "model": here["model"], "weights": here["weights"], "hook": here["hook"],
        "prompts": list(prompts), "new_tokens": new_tokens,
        "seed": seed, "strengths": list(condition.strengths), "own_nll": own_nll,
        "direction": None if direction is None else _digest(direction.numpy().tobytes()),
        "projector": None if entry is None else [entry.setting, entry.model.fingerprint()],
    }  # fmt: skip

    def make() -> Json:
        ids = generate(
            model, prompts, condition.strengths, hook=here["hook"], direction=direction, entry=entry,
            new_tokens=new_tokens, seed=seed, desc=f"steer {condition.label}", allow_mismatch=allow_mismatch,
        )  # fmt: skip
        return {"ids": ids.tolist(), "nll_own": _own_nll(model, prompts, ids).tolist() if own_nll else None}

    value = _cached(folder, f"generations-{condition.label}", fingerprint, make)
    special = set(model.tokenizer.all_special_ids)
    texts = [[_decode(model.tokenizer, ids, special) for ids in row] for row in value["ids"]]
    shape = (len(prompts), len(condition.strengths))
    own = np.full(shape, np.nan) if value["nll_own"] is None else np.array(value["nll_own"])
    return _Generations(texts, own)


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
    *,
    max_tokens: int,
    results: Results,
    seed: int,
) -> FluencyJudge:
    texts = [document.text for document in corpus.packaged(seed)] if texts is None else list(texts)
    n_human = min(_HUMAN_TEXTS, len(texts) // 2)
    human = texts[len(texts) - n_human :]
    ids = encode_corpus(texts[: len(texts) - n_human], embedder.tokenize, max_tokens)
    ngrams = NGramModel(ids, embedder.vocab)
    judge = FluencyJudge.calibrate(ngrams, embedder.tokenize, prompts, unsteered, human, seed=seed)
    for name, value in judge.validate(human, seed=seed).items():
        results.add("judge:ngram", "all", "", f"judge_auroc:{name}", value, n=n_human)
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
    found = {"concept": judges[0].score(texts), "concept_tfidf": judges[1].score(texts)}
    found |= fluency.measure(repeated, texts)
    scores = {name: values.reshape(shape) for name, values in found.items()}
    scores["nll_own"] = generations.nll_own
    scores["harmonic"] = harmonic_mean(scores["concept"], scores["fluency"])
    return scores


def _report_judges(
    judges: tuple[ConceptJudge, ConceptJudge], scores: dict[str, Scores], concept: Concept, results: Results
) -> None:
    for judge in judges:
        setting = f"words={ADMISSION_WORDS}"
        results.add(f"judge:{judge.name}", concept.name, setting, "judge_auroc:held_out", judge.auroc, n=judge.n)
    pooled = {
        name: np.concatenate([s[name].ravel() for s in scores.values()])
        for name in ("concept", "concept_tfidf", "fluency", "nll_own")
    }
    for label, a, b in (
        ("judge:tfidf", pooled["concept"], pooled["concept_tfidf"]),
        ("judge:ngram", pooled["fluency"], -pooled["nll_own"]),
    ):
        keep = np.isfinite(a) & np.isfinite(b)
        if len(set(a[keep])) > 1 and len(set(b[keep])) > 1:
            for name, statistic in (("spearman", spearmanr), ("pearson", pearsonr)):
                value = float(statistic(a[keep], b[keep])[0])
                other = "minilm" if label == "judge:tfidf" else "nll_own"
                results.add(label, concept.name, f"with={other}", f"judge_agreement:{name}", value, n=int(keep.sum()))


def _report_strengths(
    conditions: Sequence[_Condition], scores: dict[str, Scores], task: str, results: Results, seed: int
) -> None:
    """Means at each strength, and what changed against no steering and against a random direction."""
    for c in conditions:
        own = scores[c.label]
        for j, alpha in enumerate(c.strengths):
            columns = {name: values[:, j] for name, values in own.items() if np.isfinite(values[:, j]).any()}
            for other in (UNSTEERED, RANDOM):
                if c.label in (UNSTEERED, other):
                    continue
                for name in ("concept", "harmonic"):
                    base = scores[other][name][:, 0 if other == UNSTEERED else j]
                    columns[f"{name}_minus:{other}"] = own[name][:, j] - base
            for name, values in columns.items():
                results.add(c.label, task, c.setting(alpha), name, **_mean(values, seed))


def _report_chosen(
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
                results.add(c.label, task, c.setting("chosen"), name, **_mean(values, seed))
    for a, b in permutations(conditions, 2):
        if a.label != UNSTEERED:
            difference = at_chosen[a.label]["harmonic"] - at_chosen[b.label]["harmonic"]
            name = f"harmonic_diff:{b.label}"
            results.add(a.label, task, a.setting("chosen"), name, **_mean(difference, seed))


def _report_frontier(
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
        setting = ";".join(["fluency>=80% of unsteered", *c.setting("any").split(";")[1:]])
        found = {"concept_at_fluency": values[c.label]}
        if c.label != PLAIN:
            found[f"concept_at_fluency_diff:{PLAIN}"] = values[c.label] - values[PLAIN]
        for name, numbers in found.items():
            interval = frontier.interval(numbers)
            results.add(c.label, task, setting, name, **interval._asdict())


def _mean(values: NDArray[np.float64], seed: int) -> dict[str, Any]:
    """Mean over prompts with its interval, as the value columns of a metric."""
    return bootstrap_mean(values, seed=seed)._asdict()


def _cached(folder: Path | None, name: str, fingerprint: Json, make: Callable[[], Any]) -> Any:
    """What `make` returns, kept in `folder` as JSON; made anew if the fingerprint has changed."""
    if folder is None:
        return make()
    path = folder / (re.sub(r"[^\w.+=-]+", "_", name) + ".json")
    fingerprint = json.loads(json.dumps(fingerprint))
    if path.is_file():
        stored = read_json(path, "cached generations")
        if stored.get("fingerprint") == fingerprint:
            return stored["value"]
    value = make()
    write_json(path, {"fingerprint": fingerprint, "value": value})
    return value


def _digest(value: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(value)
