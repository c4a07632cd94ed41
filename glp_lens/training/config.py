"""How a denoiser is trained: the paper's recipe, and settings to depart from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from glp_lens.errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """Settings that decide what a training comes to; the defaults are the paper's recipe.

    Attributes:
        rows: activations seen in total; more than the store holds means several epochs.
        batch_size: rows a step, over all processes and all parts of an accumulated step.
        accumulate: parts that each process computes its share of a step in, one after the other.
        optimizer: `adamw`, or `muon` for the matrices inside the network and AdamW for the rest.
        lr: peak learning rate.
        lr_start: share of `lr` at the first step.
        lr_end: share of `lr` at the last step.
        warmup: share of the steps in which the learning rate rises linearly; then it falls as a cosine.
        clip: largest norm of the gradient.
        sigmas: how noise levels are drawn; `stratified` covers each batch evenly, with four rows to a level.
        ema: decay of the average of the weights that is validated and saved in their place; 0 for none.
        condition_dropout: share of rows that see no condition, for classifier-free guidance; of priors that take one.
        autocast: run the network in bfloat16, with float32 master weights.
        seed: of initialisation, order of rows, and noise.
    """

    rows: int = 1_000_000
    batch_size: int = 4096
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-5
    lr_start: float = 0.01
    lr_end: float = 0.1
    warmup: float = 0.01
    clip: float = 1.0
    sigmas: Literal["uniform", "stratified"] = "uniform"
    ema: float = 0.0
    condition_dropout: float = 0.1
    autocast: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.batch_size < 1 or self.rows < self.batch_size:
            raise InputError(f"training needs at least one whole batch: rows={self.rows}, batch_size={self.batch_size}")
        if self.accumulate < 1:
            raise InputError(f"accumulate must be at least 1, got {self.accumulate}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be a positive number, got {self.lr}")
        if not (self.clip > 0):
            raise InputError(f"clip must be a positive number, got {self.clip}")
        for name in ("lr_start", "lr_end", "warmup", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share: expected 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is a decay such as 0.999, or 0 for none, got {self.ema}")
        if self.optimizer not in ("adamw", "muon"):
            raise InputError(f"optimizer must be 'adamw' or 'muon', got {self.optimizer!r}")
        if self.sigmas not in ("uniform", "stratified"):
            raise InputError(f"sigmas must be 'uniform' or 'stratified', got {self.sigmas!r}")

    @property
    def rows_per_sigma(self) -> int:
        """Rows of a batch that share a noise level, and with it the denoiser's time path."""
        return 4 if self.sigmas == "stratified" else 1

    @property
    def steps(self) -> int:
        """Optimiser steps: whole batches in `rows`."""
        return self.rows // self.batch_size

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (0-based)."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (self.lr_start + (1 - self.lr_start) * step / rise)
        share = (step - rise) / max(1, self.steps - 1 - rise)
        return self.lr * (self.lr_end + (1 - self.lr_end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2)


RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"batch_size": 512, "lr": 2e-3, "sigmas": "stratified"},
}
"""Recipes by name, as departures from the paper's: `small` is for short runs on small machines."""


def recipe(name: str, rows: int, **changes: Any) -> TrainConfig:
    """A recipe by its name, with some settings changed; those that are None stay the recipe's.

    Raises:
        InputError: no recipe of that name, or settings that cannot train.
    """
    if name not in RECIPES:
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    changed = {setting: value for setting, value in changes.items() if value is not None}
    return TrainConfig(**{**RECIPES[name], "rows": rows, **changed})
