"""Detection: how well scores of activations tell odd texts from normal ones of the same lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from tqdm.auto import tqdm

from glp_lens import lm, provenance
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.detect import detectors
from glp_lens.evals.detect.lengths import match_lengths
from glp_lens.evals.detect.measures import Separation, bounded, conformal_threshold
from glp_lens.evals.detect.reading import Tokens, read
from glp_lens.evals.detect.settings import ALL, OWN, PROBE, DetectSettings
from glp_lens.evals.detect.tasks import DetectTask
from glp_lens.evals.entries import Entry, usable
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import GroupResampling, holm, intervals, p_values, resampling
from glp_lens.interface import Scorer, VelocityField
from glp_lens.intervals import auc_interval
from glp_lens.types import Acts, Json

Floats = NDArray[np.float64]
MEAN, QUANTILE, TOKEN = Setting(pool="mean"), Setting(pool="quantile"), Setting(pool="token")
PARTS = ("calibration", "normal", "odd")
FEWEST = 8
"""Texts of each class without which a task is left out."""
_BAND = 400
"""Resamples of the bands of ROC curves."""
_GRID = np.concatenate([[0.0], np.geomspace(0.01, 1, 40)])
"""False-positive rates at which curves are kept."""
_SHOWN = (("normal", 0.5), ("odd", 0.5), ("odd", 0.8))
"""Texts of a task that are kept token by token for the page: part, and place in the order of lengths."""


@dataclass(frozen=True, eq=False)
class DetectData:
    """What detection is measured on.

    Attributes:
        model: a HookedTransformer or TransformerBridge.
        hook: where activations are read.
        tasks: see `job.open_tasks`.
        training: `(m, d_in)` activations like those that the models were trained on, among which neighbours are
            sought; None leaves that detector out.
        reference: the prior that entries with noise levels were finetuned from; None if none was.
        context: most tokens of a text, BOS included.
    """

    model: lm.Model
    hook: str
    tasks: Sequence[DetectTask]
    training: Acts | None = None
    reference: ActivationModel | None = None
    context: int = 64


@dataclass(frozen=True, eq=False)
class TaskScores:
    """Scores of one task's texts.

    Attributes:
        about: numbers of texts and tokens.
        mean, quantile: by detector, the pooled scores of the parts `calibration`, `normal` and `odd`.
        token: by detector, AUROC of single tokens with its interval over texts.
        examples: texts for the page, token by token.
    """

    about: Json
    mean: dict[str, dict[str, Floats]]
    quantile: dict[str, dict[str, Floats]]
    token: dict[str, list[float]]
    examples: list[Json]

    @classmethod
    def from_json(cls, value: Json) -> TaskScores:
        """What was kept; KeyError or TypeError if it is something else."""
        mean, quantile = (
            {
                label: {part: np.array(parts[part], dtype=np.float64) for part in PARTS}
                for label, parts in value[pool].items()
            }
            for pool in ("mean", "quantile")
        )
        return cls(value["about"], mean, quantile, value["token"], value["examples"])


@checked
def run(
    entries: Sequence[Entry],
    data: DetectData,
    settings: DetectSettings | None = None,
    *,
    folder: str | Path | None = None,
    allow_mismatch: bool = False,
) -> Results:
    """Score the texts of every task by every detector.

    Texts of both classes are cut to the same lengths (`match_lengths`), and half of the normal ones set the thresholds.
    A text's score is the mean of its tokens' or a high quantile; BOS and massive activations are left out.

    Metrics of each task, by `pool=mean|quantile`: `auroc`, `auprc` (with as many odd texts as normal ones) and
    `tpr_at_1` (at 1% false positives), with intervals over texts; `pool=token`: `auroc` of single tokens. By
    `rate=R`: `false_positive_rate`, that of a threshold set for the rate R with a finite-sample guarantee
    (`conformal_threshold`), and `true_positive_rate` of the same. Of means of tokens, `auroc_diff:G` is the paired
    difference to the Gaussian G, which ranks as the Mahalanobis distance of the training activations does, or to that
    of the task's own texts where there is none; `p_holm:G` its p after Holm over all detectors and tasks but single
    noise levels and the probe. Task `all` holds means over tasks.

    Args:
        entries: models, see `detectors.score_tokens`.
        data: the language model and the tasks.
        settings: by default `DetectSettings()`.
        folder: where the scores of each task are kept, so that a later or interrupted run continues.
        allow_mismatch: use models trained on other activations than those read; each is noted in `failures`.

    Raises:
        InputError: no tasks or two of one name, labels that repeat, a model trained on other activations.
    """
    settings, started = settings or DetectSettings(), time.perf_counter()
    names = [task.name for task in data.tasks]
    if not names or len({*names, ALL}) <= len(names):
        raise InputError(f"expected tasks of distinct names other than {ALL!r}, got {', '.join(names) or 'none'}")
    identity = lm.identity(data.model)
    here = provenance.here(data.model, data.hook, identity)
    able, notes = usable(
        entries,
        (Scorer, VelocityField),
        lambda _: here,
        reserved=OWN,
        left_out="{label}: gives no score of an activation ({kind})",
        allow_mismatch=allow_mismatch,
    )
    if data.reference is not None:
        notes += provenance.check_models({"the reference": data.reference}, here, allow_mismatch=allow_mismatch)
    limits = [limit for e in able if (limit := e.model.max_norm) is not None]
    limit = min(limits) if limits else None
    results = Results("detect", failures=notes)
    results.config = {**settings.to_json(), "hook": data.hook, "context": data.context}
    results.data = {"model": lm.describe(data.model), "max_norm": limit, "tasks": {}}
    reference = data.reference

    def inputs() -> list[Any]:
        about = None if reference is None else reference.fingerprint()
        chosen = settings.to_json() | {"false_positive_rates": None}
        return [chosen, identity, data.hook, data.context, data.training, about, [e.identity() for e in able]]

    cache = ResultCache(folder, inputs)
    neighbours = None if data.training is None else detectors.nearest(data.training, settings.neighbours)
    scored: dict[str, TaskScores] = {}
    for task in tqdm(data.tasks, desc="detection", unit="task", mininterval=2):
        parts = [list(side) for side in (task.normal, task.odd, task.fit_normal, task.fit_odd)]
        try:
            scored[task.name] = cache.get(
                task.name,
                lambda parts=parts, push=task.push: [parts, push],  # type: ignore[misc]
                lambda task=task: _score(task, able, data, settings, limit, neighbours),  # type: ignore[misc]
                TaskScores.from_json,
            )
        except _TooFew as error:
            results.failures.append(str(error))
            continue
        results.data["tasks"][task.name] = {"about": task.about, **scored[task.name].about}
    if not scored:
        raise InputError("no task has enough texts: pass more texts, or other --tasks")
    baseline = next((e.label for e in able if e.model.kind == "gaussian"), OWN[4])
    _add(results, scored, [e.label for e in able], baseline, settings)
    results.seconds = time.perf_counter() - started
    return results


class _TooFew(InputError):
    """A task that is left out."""


def _score(
    task: DetectTask,
    entries: Sequence[Entry],
    data: DetectData,
    settings: DetectSettings,
    limit: float | None,
    neighbours: detectors.Detector | None,
) -> Json:
    """The scores of a task's texts, as `TaskScores` has them."""
    seed = settings.seed

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return lm.to_ids(data.model, texts, data.context)

    (calibration, normal), odd = match_lengths(
        ids(task.normal), ids(task.odd), normals=2, most=settings.detect_texts, seed=seed
    )
    (fit_normal,), fit_odd = match_lengths(
        ids(task.fit_normal), ids(task.fit_odd), normals=1, most=settings.detect_fit, seed=seed + 1
    )
    n = len(odd)
    if min(n, len(fit_odd)) < FEWEST:
        raise _TooFew(
            f"{task.name}: {n} odd texts and {len(fit_odd)} to fit to are left once lengths are matched, expected "
            f"{FEWEST} at least"
        )

    def tokens(texts: list[list[int]], *, push: bool) -> Tokens:
        return read(data.model, data.hook, texts, push=task.push if push else None, limit=limit, desc=task.name)

    parts = dict(zip(PARTS, (tokens(calibration, push=False), tokens(normal, push=False), tokens(odd, push=True)),
                     strict=True))  # fmt: skip
    fit = tokens(fit_normal, push=False), tokens(fit_odd, push=True)
    own = detectors.fitted(fit[0], settings.neighbours)
    scores: dict[str, dict[str, Floats]] = {}
    for place, (part, each) in enumerate(parts.items()):
        found = detectors.score_tokens(
            each, entries, settings, reference=data.reference, neighbours=neighbours, seed=seed + place
        )
        found |= {label: detector(each) for label, detector in own.items()}
        if settings.detect_ode_steps:
            found |= detectors.log_density_scores(each, entries)
        for label, values in found.items():
            scores.setdefault(label, {})[part] = values

    def pool(quantile: float | None) -> dict[str, dict[str, Floats]]:
        return {
            label: {part: detectors.pooled(values[part], parts[part].text, n, quantile) for part in PARTS}
            for label, values in scores.items()
        }

    mean = pool(None)
    decide = detectors.probe(_texts(fit[0], len(fit_normal)), _texts(fit[1], len(fit_odd)), seed)
    mean[PROBE] = {part: _probed(decide, _texts(each, n)) for part, each in parts.items()}
    lengths = [len(text) for text in odd]
    return {
        "about": {
            "texts": n,
            "tokens": len(parts["odd"]),
            "shortest": min(lengths),
            "median_length": float(np.median(lengths)),
            "longest": max(lengths),
            "fitted_to": len(fit_odd),
            "massive": sum(each.massive for each in parts.values()),
        },
        "mean": _plain(mean),
        "quantile": _plain(pool(settings.token_quantile)),
        "token": {
            label: list(_of_tokens(values, parts))
            for label, values in scores.items()
            if np.isfinite(values["odd"]).all()
        },
        "examples": _examples(data.model, parts, scores, [e.label for e in entries]),
    }


def _texts(tokens: Tokens, n: int) -> Floats:
    """Mean activations of texts `(n, d)`; NaN for those without a token."""
    sums = torch.zeros(n, tokens.rows.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(tokens.text), tokens.rows.double())
    count = np.bincount(tokens.text, minlength=n)
    means: Floats = sums.numpy() / np.where(count, count, np.nan)[:, None]
    return means


def _probed(decide: Callable[[Floats], Floats], rows: Floats) -> Floats:
    known = np.isfinite(rows).all(1)
    out = np.full(len(rows), np.nan)
    out[known] = decide(rows[known])
    return out


def _plain(scores: dict[str, dict[str, Floats]]) -> Json:
    """As lists, without texts that lost all their tokens."""
    return {
        label: {part: values[np.isfinite(values)].tolist() for part, values in parts.items()}
        for label, parts in scores.items()
    }


def _of_tokens(values: dict[str, Floats], parts: dict[str, Tokens]) -> tuple[float, float, float, int]:
    """AUROC of single tokens; their texts are the clusters."""
    sides = [values["normal"], values["odd"]]
    texts = [parts["normal"].text, parts["odd"].text + parts["normal"].text.max() + 1]
    labels = np.repeat([0, 1], [len(side) for side in sides])
    return auc_interval(np.concatenate(sides), labels, np.concatenate(texts))


def _examples(
    model: lm.Model, parts: dict[str, Tokens], scores: dict[str, dict[str, Floats]], labels: Sequence[str]
) -> list[Json]:
    """A few texts with the scores of each token by the models: shares of normal tokens with a lower score."""
    tokenizer = lm.tokenizer_of(model)
    made = []
    for part, place in _SHOWN:
        texts = np.unique(parts[part].text)
        own = np.flatnonzero(parts[part].text == texts[int(place * len(texts))])
        shares = {
            label: np.searchsorted(np.sort(scores[label]["calibration"]), scores[label][part][own])
            / len(scores[label]["calibration"])
            for label in labels
            if label in scores and np.isfinite(scores[label][part][own]).all()
        }
        made.append(
            {
                "part": part,
                "tokens": [str(tokenizer.decode([int(token)])) for token in parts[part].ids[own]],
                "shares": {label: np.round(values, 3).tolist() for label, values in shares.items()},
            }
        )
    return made


def _add(
    results: Results, scored: dict[str, TaskScores], models: Sequence[str], baseline: str, settings: DetectSettings
) -> None:
    """All metrics of the tasks, and of their means."""
    curves: dict[str, Json] = {}
    areas: dict[str, dict[str, Floats]] = {}
    gaps: list[tuple[str, str, Floats, int]] = []
    for place, (task, each) in enumerate(scored.items()):
        curves[task], areas[task] = {}, {}
        for setting, pool in ((MEAN, each.mean), (QUANTILE, each.quantile)):
            for label, parts in pool.items():
                # One seed for all detectors of a task, so that their resamples are the same texts.
                draws = [
                    resampling(len(parts[part]), seed=[settings.seed, place, side])
                    for side, part in enumerate(("normal", "odd"))
                ]
                found = Separation(parts["normal"], parts["odd"], *draws)
                _add_separation(results, label, task, setting, found, parts)
                if setting == MEAN:
                    areas[task][label] = found.auroc()
                    curves[task][label] = _curve(found)
        for label, values in each.token.items():
            value, low, high, n = values
            results.add(label, task, TOKEN, "auroc", value, ci_low=low, ci_high=high, n=int(n))
        for label, parts in each.mean.items():
            _add_thresholds(results, label, task, parts, settings.false_positive_rates)
        for label, draw in areas[task].items():
            if label != baseline and baseline in areas[task]:
                size = len(each.mean[label]["normal"]) + len(each.mean[label]["odd"])
                gaps.append((label, task, draw - areas[task][baseline], size))
    results.extras |= {
        "curves": curves,
        "baseline": baseline,
        "models": list(models),
        "examples": {task: each.examples for task, each in scored.items()},
        "calibration_texts": {task: each.about["texts"] for task, each in scored.items()},
    }
    _add_means(results, areas, baseline, settings.seed)
    compared = [" sigma=" not in label and label != PROBE for label, *_ in gaps]
    p = np.array([float(p_values(draw, n)) if keep else math.nan for keep, (_, _, draw, n) in
                  zip(compared, gaps, strict=True)])  # fmt: skip
    for (label, task, draw, n), adjusted in zip(gaps, holm(p), strict=True):
        value, low, high = (float(x) for x in intervals(draw, n))
        results.add(label, task, MEAN, "auroc_diff", value, ci_low=low, ci_high=high, n=n, other=baseline)
        if math.isfinite(adjusted):
            results.add(label, task, MEAN, "p_holm", adjusted, n=n, other=baseline)


def _add_separation(
    results: Results, label: str, task: str, setting: Setting, found: Separation, parts: dict[str, Floats]
) -> None:
    normal, odd = parts["normal"], parts["odd"]
    n, smaller = len(normal) + len(odd), min(len(normal), len(odd))
    area = auc_interval(np.concatenate([normal, odd]), np.repeat([0, 1], [len(normal), len(odd)]))
    results.add(label, task, setting, "auroc", **area._asdict())
    results.add(label, task, setting, "auprc", **bounded(found.auprc(), n, smaller)._asdict())
    results.add(label, task, setting, "tpr_at_1", **bounded(found.tpr_at(0.01), n, smaller)._asdict())


def _add_thresholds(results: Results, label: str, task: str, parts: dict[str, Floats], rates: Sequence[float]) -> None:
    """What thresholds from the calibration texts do on the others."""
    for rate in rates:
        threshold = conformal_threshold(parts["calibration"], rate)
        for metric, part in (("false_positive_rate", "normal"), ("true_positive_rate", "odd")):
            flagged, n = int((parts[part] > threshold).sum()), len(parts[part])
            ends = binomtest(flagged, n).proportion_ci(method="wilson")
            results.add(label, task, Setting(rate=rate), metric, flagged / n, ci_low=ends.low, ci_high=ends.high, n=n)


def _curve(found: Separation) -> Json:
    """True-positive rates at the rates of `_GRID`, with their 95% bands over texts."""
    few = np.stack([found.tpr_at(rate, 1 + _BAND) for rate in _GRID], axis=1)
    low, high = np.quantile(few[1:], [0.025, 0.975], axis=0)
    return {name: np.round(values, 4).tolist() for name, values in
            (("fpr", _GRID), ("tpr", few[0]), ("low", low), ("high", high))}  # fmt: skip


def _add_means(results: Results, areas: dict[str, dict[str, Floats]], baseline: str, seed: int) -> None:
    """Mean AUROC over three tasks or more, and its difference to the baseline's, resampling tasks and texts."""
    n = len(areas)
    shared = [label for label in next(iter(areas.values())) if all(label in each for each in areas.values())]
    if n < 3:
        return
    groups = GroupResampling(n, seed=seed)
    means = {label: groups.mean(np.stack([each[label] for each in areas.values()])) for label in shared}
    for label, draws in means.items():
        value, low, high = (float(x) for x in intervals(draws, n))
        results.add(label, ALL, MEAN, "auroc", value, ci_low=max(low, 0), ci_high=min(high, 1), n=n)
        if label != baseline and baseline in means:
            value, low, high = (float(x) for x in intervals(draws - means[baseline], n))
            results.add(label, ALL, MEAN, "auroc_diff", value, ci_low=low, ci_high=high, n=n, other=baseline)
