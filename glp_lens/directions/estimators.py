"""Directions between two classes of activation rows: difference of means, logistic probe, PCA of differences."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glp_lens import numerics
from glp_lens.arguments import checked
from glp_lens.errors import InputError

Method = Literal["mean", "probe", "pca"]
_INVERSE_PENALTIES = np.logspace(-4, 1, 6)
_FOLDS = 5
_ROUNDING = 1e-6
"""Means nearer to each other than this share of the rows' root mean square norm are equal but for rounding."""


@numerics.own()
@checked
def estimate(positive: Tensor, negative: Tensor, method: Method = "mean", *, seed: int = 0) -> Tensor:
    """A vector `(d,)` float64, not scaled, that leads from the negative rows to the positive ones.

    - `mean`: mean of the positives less mean of the negatives (Marks and Tegmark 2023, "mass mean"; the caller's
      means, so their distance is the vector's norm).
    - `probe`: the weights of a logistic regression on standardised dimensions, in activation units: what a unit step
      adds to the log-odds. Its L2 penalty is chosen by 5-fold cross-validation of AUROC inside these rows.
    - `pca`: first principal direction of the differences `positive[i] - negative[i]` without centring (Zou et al.
      2023, "Representation engineering", take centred PCA of differences with random signs, which is the same in
      expectation); its norm is the root mean square of the differences along it, its sign that of their mean.

    Args:
        positive: `(n, d)`.
        negative: `(m, d)`; for `pca` paired with `positive`, `m = n`.
        method: see above.
        seed: of the folds.

    Raises:
        InputError: no rows, rows that do not differ, or numbers of rows that the method cannot use.
    """
    check_rows(positive, negative)
    a, b = positive.double().cpu(), negative.double().cpu()
    if not len(a) or not len(b):
        raise InputError("a direction needs at least one positive and one negative row")
    size = torch.cat([a, b]).square().sum(1).mean().sqrt()
    if (a.mean(0) - b.mean(0)).norm() <= _ROUNDING * size:
        raise InputError(
            "positive and negative texts have the same mean activation: pass texts that differ, or another hook point"
        )
    if method == "mean":
        return a.mean(0) - b.mean(0)
    if method == "pca":
        return _pca(a, b)
    if method == "probe":
        return _probe(a, b, seed)
    raise InputError(f"method must be mean, probe or pca, got {method!r}")


def check_rows(*rows: Tensor) -> None:
    """Refuse what are no rows `(n, d)` of one width (InputError)."""
    shapes = [tuple(each.shape) for each in rows]
    if any(len(shape) != 2 for shape in shapes):
        raise InputError(f"expected rows of shape (n, d), got {', '.join(map(str, shapes))}")
    if len({width for _, width in shapes}) > 1:
        raise InputError(f"expected rows of one width, got {', '.join(map(str, shapes))}")


def _pca(a: Tensor, b: Tensor) -> Tensor:
    if len(a) != len(b):
        raise InputError(f"pca needs pairs, as many positive rows as negative ones, got {len(a)} and {len(b)}")
    differences = a - b
    _, values, vectors = torch.linalg.svd(differences, full_matrices=False)
    first: Tensor = vectors[0] * values[0] / len(a) ** 0.5
    return first if float(differences.mean(0) @ first) >= 0 else -first


def _probe(a: Tensor, b: Tensor, seed: int) -> Tensor:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.preprocessing import StandardScaler

    if min(len(a), len(b)) < _FOLDS:
        raise InputError(f"a probe needs at least {_FOLDS} rows of each class, got {len(a)} and {len(b)}")
    x = torch.cat([a, b]).numpy()
    y = np.repeat([1, 0], [len(a), len(b)])
    scaler = StandardScaler().fit(x)
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    search = GridSearchCV(LogisticRegression(max_iter=2000), {"C": _INVERSE_PENALTIES}, scoring="roc_auc", cv=folds)
    search.fit(scaler.transform(x), y)
    return torch.from_numpy(search.best_estimator_.coef_[0] / scaler.scale_)
