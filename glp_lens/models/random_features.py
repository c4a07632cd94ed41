"""Random features of the activations: a control for probing, as it has as many features and no training."""

from __future__ import annotations

import time
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor

from glp_lens import numerics
from glp_lens.activations.store import ActivationStore
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel, check_shapes
from glp_lens.errors import InputError
from glp_lens.interface import Featurizer
from glp_lens.limits import PARAMETERS, check_limit
from glp_lens.models.normalizer import mean_and_std
from glp_lens.models.row_checks import check_rows
from glp_lens.types import Acts, Features, Json


class RandomFeatures(ActivationModel, Featurizer):
    """Rectified projections on random directions, `relu(W z)` of the standardised activations `z`.

    They depend on the data by the mean and scale of each dimension only. There is no bias, whose size would have to be
    tuned: without one each feature is active on about half of the rows.

    Attributes:
        mean, std: `(d_in,)`, so that `z = (x - mean) / std`.
        weights: `(n_features, d_in)`, rows drawn uniformly from the unit sphere.
    """

    kind: ClassVar[str] = "random"

    def __init__(self, mean: Tensor, std: Tensor, weights: Tensor) -> None:
        self.mean, self.std, self.weights = mean, std, weights
        self.d_in = len(mean)
        self.provenance = {}

    @classmethod
    @checked
    def draw(cls, mean: Tensor, std: Tensor, n_features: int, *, seed: int = 0) -> Self:
        """Features for activations of a known mean and standard deviation `(d_in,)`.

        Raises:
            InputError: no features asked for.
        """
        if n_features < 1:
            raise InputError(f"n_features must be at least 1, got {n_features}")
        check_limit(PARAMETERS, n_features * len(mean), "the number of weights of random features is")
        weights = torch.randn(n_features, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        weights /= weights.norm(dim=1, keepdim=True)
        return cls(mean.float(), std.float(), weights.to(mean.device))

    @classmethod
    @numerics.own()
    @checked
    def fit(cls, store: ActivationStore, *, n_features: int | None = None, seed: int = 0) -> Self:
        """Features for the activations of a store.

        Args:
            store: only its statistics are read.
            n_features: by default `4 * d_in`; a fair control has as many as the model it is compared with.
            seed: of the directions.

        Raises:
            InputError: no features asked for.
        """
        began = time.perf_counter()
        model = cls.draw(*mean_and_std(store), 4 * store.d_in if n_features is None else n_features, seed=seed)
        return model._record_fit(store.provenance(), rows=len(store), flops=0.0, began=began, seed=seed)

    @property
    def n_features(self) -> int:
        """Number of directions."""
        return len(self.weights)

    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """Projection of each row on each direction, negative ones as 0, `(n, n_features)`."""
        z = (check_rows(x, self.d_in).to(self.mean.device) - self.mean) / self.std
        return (z @ self.weights.T).relu().to(x.device)

    def _config(self) -> Json:
        return {}

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "std": self.std, "weights": self.weights}

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        _, d_in = tensors["weights"].shape
        check_shapes(tensors, {"mean": (d_in,), "std": (d_in,)})
        return cls(**tensors)
