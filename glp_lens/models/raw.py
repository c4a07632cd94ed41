"""The raw activations: the identity as features, reconstruction and projection, the baseline of every model."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Self

import torch
from torch import Generator, Tensor

from glp_lens import numerics
from glp_lens.activations.store import ActivationStore
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.interface import Decoder, Featurizer, Projector, Reconstructor, Sampler
from glp_lens.models.row_checks import check_rows, draw_noise
from glp_lens.types import Acts, Features, Json


class Raw(ActivationModel, Featurizer, Decoder, Reconstructor, Projector, Sampler):
    """Features, reconstruction and projection are the activations themselves; samples are real rows.

    Attributes:
        reservoir: `(n_rows, d_in)`, the real rows that `sample` draws from.
    """

    kind: ClassVar[str] = "raw"

    def __init__(self, reservoir: Tensor) -> None:
        self.reservoir = reservoir
        self.d_in = reservoir.shape[1]
        self.provenance = {}

    @classmethod
    @numerics.own()
    @checked
    def fit(cls, store: ActivationStore, *, n_rows: int = 4096, seed: int = 0) -> Self:
        """Keep `n_rows` distinct rows of the store (all of them, if it has fewer)."""
        if n_rows < 1:
            raise InputError(f"n_rows must be at least 1, got {n_rows}")
        began = time.perf_counter()
        model = cls(store.sample(n_rows, seed))
        kept = len(model.reservoir)
        return model._record_fit(store.provenance(), rows=kept, flops=0.0, began=began, seed=seed, parameters=0)

    @property
    def n_features(self) -> int:
        """As many as the activations have dimensions."""
        return self.d_in

    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """A copy of the rows, `(n, d_in)`."""
        return check_rows(x, self.d_in).clone()

    def decode(self, features: Features) -> Acts:
        """A copy of the rows, which are their own features."""
        return self.encode(features)

    def reconstruct(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """A copy of the rows."""
        return self.encode(x)

    def project(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """A copy of the rows."""
        return self.encode(x)

    def sample(self, n: int, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """`n` rows drawn from the reservoir with replacement.

        The first column of the noise picks the row, by the normal distribution function: the same noise gives the same
        rows.
        """
        noise = draw_noise(n, self.d_in, noise, generator)
        # In float64 on the CPU: not every accelerator has the type.
        place = torch.special.ndtr(noise[:, 0].cpu().double()) * len(self.reservoir)
        return self.reservoir[place.long().clamp(max=len(self.reservoir) - 1).to(self.reservoir.device)]

    def _config(self) -> Json:
        return {}

    def _tensors(self) -> dict[str, Tensor]:
        return {"reservoir": self.reservoir}

    @classmethod
    def _restore(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        rows, d_in = tensors["reservoir"].shape
        if not rows * d_in:
            raise ValueError("its reservoir is empty")
        return cls(tensors["reservoir"])
