"""Random features of the activations: what a large number of features alone is worth, a control for probing."""

from __future__ import annotations

import time
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor

from glp_lens import numerics
from glp_lens.activations.store import ActivationStore
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.interface import Featurizer
from glp_lens.models.inputs import check_rows
from glp_lens.models.normalizer import mean_and_std
from glp_lens.types import Acts, Features, Json


class RandomFeatures(ActivationModel, Featurizer):
    """Rectified projections on random directions, `relu(W z)` of the standardised activations `z`.

    They know the mean and the scale of each dimension, and nothing else of the data. There is no bias: its size
    would be a setting to tune, and without one each feature fires on about half of the rows.

    Attributes:
        mean, std: `(d_in,)`, so that `z = (x - mean) / std`.
        weights: `(n_features, d_in)`, rows drawn evenly from the unit sphere.
    """

    kind: ClassVar[str] = "random"

    def __init__(self, mean: Tensor, std: Tensor, weights: Tensor) -> None:
        self.mean, self.std, self.weights = mean, std, weights
        self.d_in = len(mean)
        self.provenance = {}

    @classmethod
    def draw(cls, mean: Tensor, std: Tensor, n_features: int, *, seed: int = 0) -> Self:
        """Features for activations of a known mean and standard deviation `(d_in,)`.

        Raises:
            InputError: no features asked for.
        """
        if n_features < 1:
            raise InputError(f"n_features must be at least 1, got {n_features}")
        weights = torch.randn(n_features, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        weights /= weights.norm(dim=1, keepdim=True)
        return cls(mean.float(), std.float(), weights.to(mean.device))

    @classmethod
    @numerics.own()
    def fit(cls, store: ActivationStore, *, n_features: int | None = None, seed: int = 0) -> Self:
        """Features for the activations of a store.

        Args:
            store: only its statistics are read.
            n_features: by default `4 * d_in`; a fair control has as many as the model it stands beside.
            seed: of the directions.

        Raises:
            InputError: no features asked for.
        """
        started = time.perf_counter()
        model = cls.draw(*mean_and_std(store), 4 * store.d_in if n_features is None else n_features, seed=seed)
        model.provenance = {
            "store": store.provenance(),
            "training": {
                "rows_seen": len(store),
                "rows_distinct": len(store),
                "parameters": sum(t.numel() for t in model._tensors().values()),
                "flops": 0.0,
                "seconds": time.perf_counter() - started,
                "seed": seed,
            },
        }
        return model

    @property
    def n_features(self) -> int:
        """Number of directions."""
        return len(self.weights)

    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """How far each row lies along each direction, or 0 on the far side, `(n, n_features)`."""
        z = (check_rows(x, self.d_in).to(self.mean.device) - self.mean) / self.std
        return (z @ self.weights.T).relu().to(x.device)

    def _config(self) -> Json:
        return {}

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "std": self.std, "weights": self.weights}

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        return cls(**tensors)
