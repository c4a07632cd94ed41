"""How well automatic labels predict where features are active in texts that they were not made of.

The rule is fixed: the score of a passage is the sum of the log-odds of those tokens of the label that it holds, once
each. A feature is active in the passages where it rises highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import stdtrit

from glp_lens.errors import counted
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.statistics import bootstrap_mean
from glp_lens.features.folder import FeatureFolder
from glp_lens.features.labels import Distinctive, stand_out
from glp_lens.features.passages import ACTIVE, Flags, Passages, Watched, active, of_end
from glp_lens.features.sample import Sample, sample_path
from glp_lens.intervals import Interval, auc_interval, placements

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SUITE = "features"
AMONG = ("alive", "sparse")
"""Which features are drawn: those that are not constant; of them, those that are on in a tenth of tokens or less."""
_LEAST = 5
"""Fewest active, and inactive, passages of a feature whose AUC is taken."""
_FEWEST = 10
"""Fewest features of a model that takes part in a comparison, or a quarter of those asked for, if that is more: the
model with the fewest decides how many all others have."""


def draw(
    folder: FeatureFolder, labels: Sequence[str], most: int, seed: int
) -> tuple[dict[str, dict[str, Ints]], list[str]]:
    """Equal numbers of features of each model, drawn at random.

    Args:
        folder: of the features.
        labels: of the models.
        most: features of a model; 0 for as many as the model with the fewest has.
        seed: of the draw.

    Returns:
        Features by model, for each of `AMONG`; and a sentence for each model that has too few.
    """
    drawn: dict[str, dict[str, Ints]] = {}
    notes, fewest = [], max(_FEWEST, most // 4)
    for among in AMONG:
        able = {}
        for label in labels:
            known = folder.table(label, "features")
            left = known[~known["dead"] & ~(known["dense"] & (among == "sparse"))]["feature"].to_numpy(np.int64)
            if len(left) < fewest:
                own = counted(len(left), f"{among} feature")
                notes.append(f"{label}: {own}, fewer than {fewest}: left out among {among}")
            else:
                able[label] = left
        n = min([len(left) for left in able.values()] + [most] * (most > 0), default=0)
        drawn[among] = {
            label: np.sort(np.random.default_rng([seed, i]).permutation(left)[:n])
            for i, (label, left) in enumerate(able.items())
        }
    return drawn, notes


@dataclass(frozen=True, eq=False)
class Scores:
    """AUCs of some features, and what each text added to their mean.

    Attributes:
        auc: `(n_features,)`, NaN for a feature with too few active or inactive passages.
        influence: `(n_texts, n_features)`, by how much a text moved the AUC.
        texts: number of texts with passages.
        least: 0, or -1 of differences.
    """

    auc: Floats
    influence: Floats
    texts: int
    least: float = 0.0

    def of(self, features: Ints) -> Scores:
        """Those of some features, by their places, that have an AUC."""
        features = features[np.isfinite(self.auc[features])]
        return Scores(self.auc[features], self.influence[:, features], self.texts, self.least)

    def minus(self, other: Scores) -> Scores:
        """Differences of the same features' AUCs."""
        return Scores(self.auc - other.auc, self.influence - other.influence, self.texts, -1.0)


def mean(scores: Scores, less: Scores | None = None) -> Interval:
    """Mean AUC of features, or the difference between the means of two sets of them on the same texts.

    Both features and texts count as drawn at random. The variance over texts is that of DeLong et al. 1988, with texts
    as clusters (Obuchowski 1997), the variance over features that between their AUCs; as these are estimates
    themselves, the interval errs on the wide side. It is Student's, with one degree of freedom less than there are
    features, or texts if these are fewer.
    """
    sets = [scores] if less is None else [scores, less]
    if min(len(each.auc) for each in sets) < 2:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    signs = (1, -1)
    value = sum(sign * each.auc.mean() for sign, each in zip(signs, sets, strict=False))
    moved = sum(sign * each.influence.mean(1) for sign, each in zip(signs, sets, strict=False))
    texts = scores.texts
    variance = texts / max(texts - 1, 1) * np.square(moved).sum() + sum(each.auc.var(ddof=1) / len(each.auc)
                                                                       for each in sets)  # fmt: skip
    least = min([texts, *(len(each.auc) for each in sets)])
    half = float(stdtrit(max(least - 1, 1), 0.975) * np.sqrt(variance))
    low = scores.least if less is None else -1.0
    return Interval(float(value), max(float(value) - half, low), min(float(value) + half, 1.0), texts)


def aucs(scores: Floats, active: Flags, document: Ints) -> Scores:
    """AUC of each feature's scores of passages `(n, n_features)`, against the passages where it is active.

    Args:
        scores: of the rule.
        active: of the same shape.
        document: `(n,)`, number of the text of each passage, from 0.
    """
    n, features = int(document.max()) + 1, scores.shape[1]
    auc, influence = np.full(features, np.nan), np.zeros((n, features))
    for j in range(features):
        on = active[:, j]
        if min(on.sum(), (~on).sum()) < _LEAST:
            continue
        above, below = placements(scores[:, j], on)
        auc[j] = above.mean()
        for part, rows in ((above, on), (below, ~on)):
            influence[:, j] += np.bincount(document[rows], part - part.mean(), minlength=n) / len(part)
    return Scores(auc, influence, len(np.unique(document)))


def rule(weights: Sequence[Distinctive], features: Ints, passages: Sequence[Ints]) -> Floats:
    """The rule's score of each passage for each feature, `(n_passages, n_features)`.

    Args:
        weights: tokens of the labels; those of several lists add up.
        features: whose labels are used, in the order of columns.
        passages: token ids.
    """
    width = 1 + max([int(each.token.max(initial=0)) for each in weights] + [int(ids.max()) for ids in passages])
    owner = np.repeat(np.arange(len(passages)), [len(ids) for ids in passages])
    pairs = np.unique(np.stack([owner, np.concatenate(passages)]), axis=1)
    holds = sparse.csr_matrix((np.ones(pairs.shape[1]), pairs), shape=(len(passages), width))
    total = sparse.csc_matrix((width, len(features)))
    place = {feature: i for i, feature in enumerate(features.tolist())}
    for each in weights:
        mine = np.isin(each.feature, features)
        columns = [place[feature] for feature in each.feature[mine].tolist()]
        total = total + sparse.csc_matrix((each.log_odds[mine], (each.token[mine], columns)), shape=total.shape)
    found: Floats = (holds @ total).toarray()
    return found


def measure(
    folder: FeatureFolder,
    passages: Passages,
    watched: Mapping[str, Watched],
    drawn: Mapping[str, Mapping[str, Ints]],
    *,
    seed: int,
) -> tuple[Results, pd.DataFrame]:
    """All numbers, and the AUC of each feature.

    Args:
        folder: with the examples that labels are made of and the samples of tokens that these are compared with.
        passages: of texts that no example is of.
        watched: the features, by the label of their model.
        drawn: of these, the features that are compared; see `draw`.
        seed: of the exchange of labels.

    Returns:
        Results, and rows of `model`, `feature`, `active`, `auc`, `ci_low`, `ci_high`, `n`: the active passages.
    """
    results, rows = Results(SUITE), []
    own: dict[tuple[str, str], Scores] = {}
    other: dict[tuple[str, str], Scores] = {}
    for label, each in watched.items():
        sample = Sample.read(sample_path(folder.path, each.about.hook)).token_ids
        examples = of_end(folder.table(label, "examples", each.features.tolist()), each.features, each.sign)
        scores = rule(_weights(examples, sample), each.features, passages.token_ids)
        exchanged = scores[:, _exchange(len(each.features), np.random.default_rng(seed))]
        peaks = passages.peaks[label]
        for how in ACTIVE:
            where = active(peaks[0], each.on, how)
            own[label, how] = aucs(scores, where, passages.document)
            other[label, how] = aucs(exchanged, where, passages.document)
            rows += _by_feature(label, how, each.features, scores, where, passages.document)
        repeated = _correlation(peaks[0], peaks[-1])
        overlap = _overlap(examples, sample, each.features, seed)
        for among, models in drawn.items():
            if label in models:
                at = np.searchsorted(each.features, models[label])
                setting = Setting(among=among, features=len(at))
                results.add(label, "all", setting, "seed_correlation", **bootstrap_mean(repeated[at])._asdict())
                for metric, values in overlap.items():
                    results.add(label, "all", setting, metric, **bootstrap_mean(values[at])._asdict())
    for among, models in drawn.items():
        places = {label: np.searchsorted(watched[label].features, mine) for label, mine in models.items()}
        for how in ACTIVE:
            found = {label: own[label, how].of(at) for label, at in places.items()}
            chance = {label: other[label, how].of(at) for label, at in places.items()}
            for label, mine in found.items():
                setting = Setting(among=among, features=len(places[label]), active=how)
                results.add(label, "all", setting, "n_measured", len(mine.auc), n=len(mine.auc))
                results.add(label, "all", setting, "auc", **mean(mine)._asdict())
                results.add(label, "all", setting, "auc_exchanged", **mean(chance[label])._asdict())
                gain = mean(mine.minus(chance[label]))
                results.add(label, "all", setting, "auc_diff:exchanged", **gain._asdict())
            for a, b in permutations(found, 2):
                setting = Setting(among=among, features=len(places[a]), active=how)
                results.add(a, "all", setting, f"auc_diff:{b}", **mean(found[a], found[b])._asdict())
    return results, pd.DataFrame(rows, columns=["model", "feature", "active", "auc", "ci_low", "ci_high", "n"])


def _weights(examples: pd.DataFrame, sample: Ints) -> list[Distinctive]:
    """The tokens of labels, of either group of examples."""
    return [each for side in stand_out(examples, sample).values() for each in side]


def _exchange(n: int, rng: np.random.Generator) -> Ints:
    """For each of `n` features another one, whose label it is given: one cycle through all of them at random."""
    order = rng.permutation(n)
    given = np.empty(n, dtype=np.int64)
    given[order] = np.roll(order, 1)
    return given


def _by_feature(
    label: str, how: str, features: Ints, scores: Floats, where: Flags, document: Ints
) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for j, feature in enumerate(features.tolist()):
        on = where[:, j]
        value = (np.nan, np.nan, np.nan)
        if min(on.sum(), (~on).sum()) >= _LEAST:
            value = auc_interval(scores[:, j], on, document)[:3]
        rows.append((label, feature, how, *value, int(on.sum())))
    return rows


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> Floats:
    """Pearson's correlation of columns, over the rows that are finite; NaN where one is constant."""
    finite = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    x, y = (each[finite].astype(np.float64) for each in (a, b))
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt(np.square(x).sum(0) * np.square(y).sum(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(scale > 0, (x * y).sum(0) / scale, np.nan))


def _overlap(examples: pd.DataFrame, sample: Ints, features: Ints, seed: int) -> dict[str, Floats]:
    """Share of tokens that labels from two halves of the examples have in common, of all that either has.

    Halves are examples of even and of odd rank: of different texts. 0 where neither half gives a label; `exchanged` is
    the overlap with the other half's label of another feature.
    """
    halves = []
    for odd in (0, 1):
        weights = _weights(examples[examples["rank"] % 2 == odd], sample)
        halves.append([{token for each in weights for token in each.of(f)[0].tolist()} for f in features.tolist()])
    given = _exchange(len(features), np.random.default_rng(seed))

    def shared(a: set[int], b: set[int]) -> float:
        return len(a & b) / len(a | b) if a | b else 0.0

    return {
        "label_overlap": np.array([shared(a, b) for a, b in zip(*halves, strict=True)]),
        "label_overlap_exchanged": np.array([shared(a, halves[1][i]) for a, i in zip(halves[0], given, strict=True)]),
    }
