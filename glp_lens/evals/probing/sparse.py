"""k-sparse probes: logistic regression on the k features with the largest class-mean difference.

Selection and regression are those of sae-probes 0.4.2 (Kantamneni et al. 2025, "Are Sparse Autoencoders Useful? A Case
Study in Sparse Probing"), so that its `run_sae_evals(reg_type="l2", setting="normal")` gives the same numbers for the
same features and rows: to the last digit, since every sum is done in its order and number format. Three things differ:

- Among features with equal differences, as those that fire on one row of one class often have, the earlier column goes
  first. sae-probes leaves their order to an unstable sort, which depends on the processor.
- A k above the number of features is left out. sae-probes fits all features again under each such k.
- All features, where they are more than the train rows, are fitted in as many coordinates as there are train rows: the
  same regression, at the cost of that many features, by another sum.

Whoever compares must compare the same activations: sae-probes adds BOS only if the tokenizer does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.model_selection import LeavePOut, StratifiedKFold
from torch import Tensor

from glp_lens.errors import InputError
from glp_lens.evals.probing.settings import Size

Rows = NDArray[np.int64]

PENALTIES = tuple(np.logspace(5, -5, 10))
"""Inverse L2 strengths C to choose from; of equals in validation, the first."""
_BLOCK = 8192
_TINY = 1e-6


class SparseProbe(NamedTuple):
    """A fitted probe and what it scores.

    Attributes:
        k: number of features, or "dense" for all of them.
        features: columns of the features used, the largest difference first.
        c: the inverse L2 strength chosen; NaN of under four train rows, where there is no choice and it is 1.
        scores: `(n_test,)`, probability of class 1; where it saturates, rows tie.
        auc: of the scores.
        accuracy: share of test rows on the right side of probability 1/2.
        f1: of the same decisions, each class weighted by its number of test rows.
        auc_validation: mean over the validation folds; of under four train rows, on the train rows.
    """

    k: Size
    features: Rows
    c: float
    scores: NDArray[np.float64]
    auc: float
    accuracy: float
    f1: float
    auc_validation: float

    @property
    def n_features(self) -> int:
        """Number of features used."""
        return len(self.features)


def fit(
    x_train: NDArray[np.float32],
    y_train: Rows,
    x_test: NDArray[np.float32],
    y_test: Rows,
    ks: Sequence[Size] = (1, 2, 5, 16, 64, 128, "dense"),
    *,
    normalize: bool = True,
    seed: int = 42,
) -> list[SparseProbe]:
    """Rank the features, then fit a probe on the first k, for each k that there are features for.

    There is no scaler. C is chosen by validation AUC on the last min(20%, 100) train rows; of under 128 rows, by 6
    shuffled folds, and of up to 12, on every pair of rows. The probe is then fitted on all train rows in an order
    shuffled by the seed. The solver is lbfgs of sklearn with 1,000 steps, which may stop short of the optimum.

    Args:
        x_train: `(n_train, n_features)`, rows in random order, since the last are the validation rows.
        y_train: `(n_train,)`, 0 or 1.
        x_test, y_test: likewise.
        ks: numbers of features; "dense" for all.
        normalize: as `rank_features`.
        seed: of the folds and the shuffle; sae-probes uses 42.

    Raises:
        InputError: a k that is no number of features, or validation rows of one class only.
    """
    if bad := [k for k in ks if k != "dense" and (not isinstance(k, int) or k < 1)]:
        raise InputError(f"k must be a number of features from 1, or 'dense', got {bad[0]!r}")
    y_train, y_test = np.asarray(y_train), np.asarray(y_test)
    folds = list(_folds(y_train, seed))
    order = rank_features(x_train, y_train, normalize=normalize)
    probes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for k in ks:
            if k == "dense" or k <= len(order):
                features = order if k == "dense" else order[:k]
                train, test = _columns(x_train, x_test, features)
                probes.append(_fit(k, features, train, y_train, test, y_test, folds, seed))
    return probes


def rank_features(x: NDArray[np.float32], y: Rows, *, normalize: bool = True) -> Rows:
    """Columns of `x` `(n, n_features)` by absolute difference of the class means, the largest first; ties by column.

    Args:
        normalize: divide each feature by the mean of its non-zero absolute values first, as sae-probes does, so that
            features of any scale compete; without, the rule of the GLP paper.
    """
    rows, positive = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), torch.from_numpy(np.asarray(y) == 1)
    # Blocks of a round width, the last one wider: torch adds up the rows in another order in narrow or odd ones.
    blocks = rows.tensor_split(tuple(range(_BLOCK, rows.shape[1] - _BLOCK, _BLOCK)), dim=1)
    difference = torch.cat([_difference(part, positive, normalize) for part in blocks])
    return torch.argsort(difference.abs(), descending=True, stable=True).numpy()


def _difference(x: Tensor, positive: Tensor, normalize: bool) -> Tensor:
    if normalize:
        size = x.abs().sum(0) / ((x != 0).sum(0) + _TINY)
        x = x / (size + _TINY)
    return x[positive].mean(0) - x[~positive].mean(0)


def _columns(
    x_train: NDArray[np.float32], x_test: NDArray[np.float32], features: Rows
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Some features of train and test rows, or where they are more than train rows, coordinates that stand for them.

    The weights of a regression with an L2 penalty are a sum of train rows, so that all it knows of the features is the
    inner products with those. The coordinates, in an orthonormal basis of their span, have the same inner products.
    """
    n, rows = len(x_train), (x_train, x_test)
    if len(features) <= n:
        # In float64, since that is what sklearn makes of the tensors that sae-probes hands to it.
        train, test = (np.take(x, features, axis=1).astype(np.float64) for x in rows)
        return train, test
    products = np.zeros((n + len(x_test), n))
    for start in range(0, len(features), _BLOCK):
        part = np.concatenate([x[:, features[start : start + _BLOCK]] for x in rows]).astype(np.float64)
        products += part @ part[:n].T
    values, vectors = np.linalg.eigh(products[:n])
    kept = values >= n * np.finfo(np.float64).eps * values[-1]
    scale = np.sqrt(values[kept].clip(min=np.finfo(np.float64).tiny))  # features that are all 0 stay so
    coordinates = products @ (vectors[:, kept] / scale)
    return coordinates[:n], coordinates[n:]


def _folds(y: Rows, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """Train and validation rows; none where there are too few rows to choose C."""
    n, rows = len(y), np.arange(len(y))
    if n <= 3:
        return
    if n >= 128:
        cut = n - min(n // 5, 100)
        if len(np.unique(y[cut:])) < 2:
            raise InputError(f"expected both classes among the last {n - cut} train rows: put the rows in random order")
        yield rows[:cut], rows[cut:]
        return
    splitter = LeavePOut(2) if n <= 12 else StratifiedKFold(6, shuffle=True, random_state=seed)
    for train, validation in splitter.split(rows, y):
        if len(np.unique(y[validation])) == 2:
            yield train, validation


def _fit(
    k: Size,
    features: Rows,
    x_train: NDArray[np.float64],
    y_train: Rows,
    x_test: NDArray[np.float64],
    y_test: Rows,
    folds: list[tuple[Rows, Rows]],
    seed: int,
) -> SparseProbe:
    c, auc_validation = np.nan, np.nan
    if folds:
        aucs = np.zeros((len(PENALTIES), len(folds)))
        for j, (train, validation) in enumerate(folds):
            parts = x_train[train], y_train[train], x_train[validation], y_train[validation]
            aucs[:, j] = [_validate(penalty, *parts) for penalty in PENALTIES]
        means = aucs.mean(1)
        c, auc_validation = float(PENALTIES[means.argmax()]), float(means.max())
    shuffled = np.random.RandomState(seed).permutation(len(x_train))  # the generator of sae-probes
    probe = _regression(c if folds else 1.0).fit(x_train[shuffled], y_train[shuffled])
    if not folds:
        auc_validation = float(roc_auc_score(y_train, probe.predict_proba(x_train)[:, 1]))
    scores, decisions = probe.predict_proba(x_test)[:, 1], probe.predict(x_test)
    return SparseProbe(
        k,
        features,
        c,
        scores,
        auc=float(roc_auc_score(y_test, scores)),
        accuracy=float(accuracy_score(y_test, decisions)),
        f1=float(f1_score(y_test, decisions, average="weighted")),
        auc_validation=auc_validation,
    )


def _validate(c: float, x_train: NDArray[np.float64], y_train: Rows, x: NDArray[np.float64], y: Rows) -> float:
    """Validation AUC of a probe; 1/2 where the fold trains on one class."""
    if len(np.unique(y_train)) < 2:
        return 0.5
    return float(roc_auc_score(y, _regression(c).fit(x_train, y_train).predict_proba(x)[:, 1]))


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000)
