"""Principal components, as features, as a rank-k bottleneck, and as a density (probabilistic PCA)."""

from __future__ import annotations

import math
import time
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Generator, Tensor

from glp_lens import numerics
from glp_lens.activations.store import ActivationStore
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel, check_shapes
from glp_lens.errors import InputError
from glp_lens.files import is_number
from glp_lens.interface import Decoder, Featurizer, Projector, Reconstructor, Sampler, Scorer
from glp_lens.models.normalizer import mean_and_std
from glp_lens.models.row_checks import check_rows, draw_noise
from glp_lens.types import Acts, Features, Json, PerRow

_VARIANCE_FLOOR = 1e-6
"""Smallest variance of a direction, as a share of the average: a density must not divide by zero."""
_BLOCK = 16_384
"""Rows read at once for a fit."""


class PCA(ActivationModel, Featurizer, Decoder, Reconstructor, Projector, Sampler, Scorer):
    """Principal components of the (standardised) activations.

    As a density it is probabilistic PCA (Tipping & Bishop 1999): the fitted variance along the first `k` components,
    and the variance that they leave spread evenly over all other directions.

    Attributes:
        mean, std: `(d_in,)`; components are those of `(x - mean) / std`. `std` is 1 if not standardised.
        components: `(n_features, d_in)`, orthonormal rows, the largest variance first.
        explained_variance: `(n_features,)`.
        discarded_variance: the sum over the directions that were not kept.
        k: the rank that `reconstruct`, `project`, `sample` and `score` use by default.

    Example:
        >>> import torch, glp_lens as gl
        >>> from glp_lens.activations import write_store
        >>> generator = torch.Generator().manual_seed(0)
        >>> rows = torch.randn(500, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
        >>> pca = gl.PCA.fit(write_store("acts", rows, hook="blocks.3.hook_resid_post"))
        >>> pca.encode(rows[:5]).shape, pca.k
        (torch.Size([5, 8]), 2)
        >>> bool((rows - pca.reconstruct(rows)).abs().max() < 1e-4)
        True
    """

    kind: ClassVar[str] = "pca"
    scores_density: ClassVar[bool] = True

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        components: Tensor,
        explained_variance: Tensor,
        *,
        discarded_variance: float,
        k: int,
    ) -> None:
        self.mean, self.std = mean, std
        self.components, self.explained_variance = components, explained_variance
        self.discarded_variance = discarded_variance
        self.k = k
        self.d_in = len(mean)
        self.provenance = {}

    @classmethod
    @numerics.own()
    @checked
    def fit(
        cls,
        store: ActivationStore,
        *,
        n_components: int | None = None,
        keep_variance: float = 0.9,
        standardize: bool = True,
        max_rows: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Fit scikit-learn's PCA on rows drawn from the store.

        Args:
            store: training activations.
            n_components: components kept; by default all.
            keep_variance: `k` is the smallest number of components that explain this share of the variance.
            standardize: scale each dimension to variance 1 first, as the GLP does.
            max_rows: most rows to fit on; by default all. They are held in memory, in float64.
            seed: of the choice of rows.

        Raises:
            InputError: fewer than two rows, or more components than rows or dimensions.
        """
        from sklearn.decomposition import PCA as Estimator

        rows = len(store) if max_rows is None else min(len(store), max_rows)
        most = min(rows, store.d_in)
        if rows < 2:
            raise InputError(f"PCA needs at least 2 rows, got {rows}: collect more")
        if n_components is not None and not 1 <= n_components <= most:
            raise InputError(f"n_components must be between 1 and {most} here, got {n_components}")
        if not 0 < keep_variance <= 1:
            raise InputError(f"keep_variance must be above 0 and at most 1, got {keep_variance}")
        began = time.perf_counter()
        mean, std = mean_and_std(store)
        if not standardize:
            std = torch.ones_like(std)
        # In float64, since the density needs the smallest variances to their last digits too.
        z, index = np.empty((rows, store.d_in)), store.sample_index(rows, seed)
        for start in range(0, rows, _BLOCK):
            part = slice(start, start + _BLOCK)
            z[part] = (store.take(index[part]) - mean) / std
        fitted = Estimator(n_components, svd_solver="covariance_eigh").fit(z)
        share = fitted.explained_variance_ratio_.cumsum()
        model = cls(
            mean + std * torch.from_numpy(fitted.mean_).float(),
            std,
            torch.from_numpy(fitted.components_).float().contiguous(),
            torch.from_numpy(fitted.explained_variance_).float(),
            discarded_variance=float(fitted.noise_variance_) * (most - fitted.n_components_),
            k=min(int((share < keep_variance).sum()) + 1, len(share)),
        )
        return model._record_fit(
            store.provenance(), rows=rows, flops=2.0 * rows * store.d_in**2, began=began, seed=seed
        )

    @property
    def n_features(self) -> int:
        """Number of components kept."""
        return len(self.components)

    def noise_variance(self, k: int | None = None) -> float:
        """Mean variance of the directions beyond the first `k` components."""
        k = self._rank(k)
        # Sums in float64 run on the CPU: not every accelerator has the type.
        left = float(self.explained_variance[k:].cpu().double().sum()) + self.discarded_variance
        return max(left / max(self.d_in - k, 1), self._floor)

    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """Scores on all components, `(n, n_features)`."""
        return (self._standardize(x) @ self.components.T).to(x.device)

    def decode(self, features: Features) -> Acts:
        """The rows with these scores on all components, and none on the directions that were not kept."""
        scores = check_rows(features, self.n_features).to(self.mean.device)
        return (scores @ self.components * self.std + self.mean).to(features.device)

    def reconstruct(
        self,
        x: Acts,
        *,
        k: int | None = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> Acts:
        """The rows rebuilt from their first `k` components."""
        basis = self.components[: self._rank(k)]
        return (self._standardize(x) @ basis.T @ basis * self.std + self.mean).to(x.device)

    def project(
        self,
        x: Acts,
        *,
        k: int | None = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> Acts:
        """The nearest rows in the span of the first `k` components; the same as `reconstruct`."""
        return self.reconstruct(x, k=k)

    def sample(
        self,
        n: int,
        *,
        k: int | None = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> Acts:
        """`n` draws from probabilistic PCA of rank `k`: noise times the root of its covariance."""
        basis, variance = self._leading(k)
        noise = draw_noise(n, self.d_in, noise, generator).to(self.mean.device)
        inside = noise @ basis.T
        z = (inside * variance.sqrt()) @ basis + math.sqrt(self.noise_variance(k)) * (noise - inside @ basis)
        return z * self.std + self.mean

    def score(
        self,
        x: Acts,
        *,
        method: Literal["log_density", "reconstruction"] = "log_density",
        k: int | None = None,
        noise: Acts | None = None,
        generator: Generator | None = None,
    ) -> PerRow:
        """Log-density under probabilistic PCA of rank `k`, or the negative squared error of reconstruction.

        Both in activation units.
        """
        if method == "reconstruction":
            x = check_rows(x, self.d_in)
            return -(x - self.reconstruct(x, k=k)).square().sum(1)
        if method != "log_density":
            raise InputError(f"method must be 'log_density' or 'reconstruction', got {method!r}")
        basis, variance = self._leading(k)
        outside_variance = self.noise_variance(k)
        z = self._standardize(x)
        inside = z @ basis.T
        outside = (z - inside @ basis).square().sum(1)
        distance = (inside.square() / variance).sum(1) + outside / outside_variance
        volume = (
            float(variance.cpu().double().log().sum() + 2 * self.std.cpu().double().log().sum())
            + (self.d_in - len(basis)) * math.log(outside_variance)
            + self.d_in * math.log(2 * math.pi)
        )
        return -0.5 * (distance + volume).to(x.device)

    @property
    def _floor(self) -> float:
        total = float(self.explained_variance.sum()) + self.discarded_variance
        return _VARIANCE_FLOOR * total / self.d_in

    def _standardize(self, x: Acts) -> Acts:
        return (check_rows(x, self.d_in).to(self.mean.device) - self.mean) / self.std

    def _rank(self, k: int | None) -> int:
        if k is None:
            return self.k
        if not 1 <= k <= self.n_features:
            raise InputError(f"k must be between 1 and {self.n_features}, the components kept, got {k}")
        return k

    def _leading(self, k: int | None) -> tuple[Tensor, Tensor]:
        k = self._rank(k)
        return self.components[:k], self.explained_variance[:k].clamp(min=self._floor)

    def _config(self) -> Json:
        return {"discarded_variance": self.discarded_variance, "k": self.k}

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "mean": self.mean,
            "std": self.std,
            "components": self.components,
            "explained_variance": self.explained_variance,
        }

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        model = cls(**tensors, discarded_variance=config["discarded_variance"], k=config["k"])
        if type(model.k) is not int or not is_number(model.discarded_variance) or model.discarded_variance < 0:
            raise ValueError("k or discarded_variance is no such number")
        shapes: dict[str, tuple[int, ...]] = {"mean": (model.d_in,), "std": (model.d_in,)}
        shapes |= {"components": (model.n_features, model.d_in), "explained_variance": (model.n_features,)}
        check_shapes(tensors, shapes)
        model._rank(model.k)
        return model
