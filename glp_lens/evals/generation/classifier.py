"""The classifier two-sample test: how well a classifier tells sampled rows from real ones that it has not seen."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from glp_lens.evals.generation.measures import Bools, Ints, Rows
from glp_lens.intervals import Floats, Interval, auc_interval

_PENALTIES = (0.1, 1.0, 10.0)
_STEPS, _BATCH = 1000, 200


@dataclass(frozen=True, eq=False)
class Scored:
    """What a classifier says of rows that it was not trained on.

    Attributes:
        real, made: scores of real and of sampled rows, higher the more they look sampled.
        real_owners, made_owners: their documents; a sampled row is one of its own.
    """

    real: Floats
    made: Floats
    real_owners: Ints
    made_owners: Ints

    @property
    def auc(self) -> Interval:
        """The AUC, 0.5 where nothing tells them apart, with its interval by document."""
        owners = np.concatenate([self.real_owners, self.made_owners + 1 + self.real_owners.max()])
        labels = np.repeat([0, 1], [len(self.real), len(self.made)])
        return auc_interval(np.concatenate([self.real, self.made]), labels, owners)

    def placements(self) -> tuple[Floats, Floats]:
        """For each real row the share of sampled rows with a higher score, for each sampled one of real rows below."""
        n = len(self.real)
        ranks = rankdata(np.concatenate([self.real, self.made]))
        below = (ranks[:n] - rankdata(self.real)) / len(self.made)
        return 1 - below, (ranks[n:] - rankdata(self.made)) / n


def classify(real: Rows, made: Rows, trains: tuple[Bools, Bools], *, seed: int) -> dict[str, Scored]:
    """Train classifiers on some rows of both sets and score the others (Lopez-Paz & Oquab 2017).

    A logistic regression sees differences of means, a network of one layer of 128 units also those of shape. Both are
    of scikit-learn, on rows standardised by those they are trained on. The network's penalty is chosen among three on
    other documents of its training rows: many dimensions need a stronger one than few.

    Args:
        trains: for real and for sampled rows, whether they are trained on; no document may be on both sides.

    Returns:
        By name, `logistic` and `mlp`.
    """
    x = np.concatenate([side.rows[train].numpy() for side, train in zip((real, made), trains, strict=True)])
    labels = np.repeat([0, 1], [int(train.sum()) for train in trains])
    owners = [side.owners[train] for side, train in zip((real, made), trains, strict=True)]
    rng = np.random.default_rng(seed)
    inner = np.concatenate([balanced(own, 4, rng) > 0 for own in owners])
    order = rng.permutation(len(x))
    x, labels, inner = x[order], labels[order], inner[order]
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    found = {}
    for name, model in {"logistic": logistic.fit(x, labels), "mlp": _network(x, labels, inner, seed)}.items():
        on_real, on_made = (
            model.predict_proba(s.rows[~t].numpy())[:, 1] for s, t in zip((real, made), trains, strict=True)
        )
        found[name] = Scored(on_real, on_made, real.owners[~trains[0]], made.owners[~trains[1]])
    return found


def _network(x: NDArray[np.float32], labels: Ints, inner: Bools, seed: int) -> Any:
    """A network, its penalty chosen by what it says of rows that are not `inner`, and fitted on all."""

    def fit(penalty: float, rows: NDArray[np.float32], classes: Ints) -> Any:
        epochs = math.ceil(_STEPS * _BATCH / len(rows))
        network = MLPClassifier(
            (128,), alpha=penalty, batch_size=min(_BATCH, len(rows)), max_iter=epochs, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # so many epochs are meant
            return make_pipeline(StandardScaler(), network).fit(rows, classes)

    def auc(penalty: float) -> float:
        scores = fit(penalty, x[inner], labels[inner]).predict_proba(x[~inner])[:, 1]
        return float(roc_auc_score(labels[~inner], scores))

    return fit(max(_PENALTIES, key=auc), x, labels)


def balanced(owners: Ints, parts: int, rng: np.random.Generator) -> Ints:
    """`(n,)` numbers of parts with about equally many rows; rows of one owner are in one part.

    Owners come in random order, each into the part with the fewest rows so far.
    """
    _, index, sizes = np.unique(owners, return_inverse=True, return_counts=True)
    part, filled = np.empty(len(sizes), dtype=np.int64), np.zeros(parts)
    for owner in rng.permutation(len(sizes)):
        part[owner] = filled.argmin()
        filled[part[owner]] += sizes[owner]
    return part[index]


def auc_difference(first: Scored, second: Scored) -> Interval:
    """AUC of the first less that of the second, which scored the same real rows.

    The variance is that of DeLong et al. 1988 over documents, with the sampled rows of both taken as independent of
    each other: where they share their noise, the interval is too wide.
    """
    (real, made), (other_real, other_made) = first.placements(), second.placements()
    parts = [
        _variance(real - other_real, first.real_owners),
        _variance(made, first.made_owners),
        _variance(other_made, second.made_owners),
    ]
    value, half = float(made.mean() - other_made.mean()), float(ndtri(0.975) * np.sqrt(sum(parts)))
    return Interval(value, value - half, value + half, len(np.unique(first.real_owners)))


def _variance(values: Floats, owners: Ints) -> float:
    """Of the mean of values that depend on each other within an owner."""
    index = np.unique(owners, return_inverse=True)[1]
    sums = np.bincount(index, weights=values - values.mean()) / len(values)
    return float(sums @ sums * len(sums) / max(len(sums) - 1, 1))
