"""The training objective: flow-matching loss, its noise, and the loss on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from glp_lens.flow.path import interpolate, velocity_target
from glp_lens.flow.schedule import (
    SIGMA_BINS,
    TRAIN_STEPS,
    bin_name,
    grid,
    sigma_bin,
    stratified_sigmas,
    uniform_sigmas,
)
from glp_lens.training.config import TrainConfig
from glp_lens.types import Acts

_LOST_ROWS = 8
"""Rows whose loss is looked at on all noise levels."""
_AROUND, _EDGE = 80, 10
"""Levels on either side that one is compared with, and at either end those that are not looked at."""
_STANDS_OUT = 1.15
"""How many times the loss around it a level's must be to be lost: seen were 1.34 to 1.43, and at others up to 1.02."""
_NOISE_ROWS = 256
"""Rows whose noise comes from one generator, so that a process need not draw the noise of the others."""


@dataclass(frozen=True)
class Batch:
    """Normalised rows with their layer, condition and weight.

    Attributes:
        x: `(n, d)`.
        layer: `(n,)` integers, the layer of the language model, for priors conditioned on it.
        condition: `(n, d_condition)`, the embedding of each row's class, NaN in a row without one; for conditional
            priors.
        weight: `(n,)`, weight of each row in the loss; None for 1.
    """

    x: Acts
    layer: Tensor | None = None
    condition: Tensor | None = None
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def without_condition(self, drop: Tensor) -> Batch:
        """The batch with the condition hidden in some rows, `(n,)` booleans."""
        if self.condition is None:
            return self
        return replace(self, condition=self.condition.masked_fill(drop[:, None], torch.nan))

    @classmethod
    def joined(cls, batches: Sequence[Batch]) -> Batch:
        """One batch of the rows of several, which have the same attributes."""
        if len(batches) == 1:
            return batches[0]
        others = zip(*((b.layer, b.condition, b.weight) for b in batches), strict=True)
        layer, condition, weight = (None if part[0] is None else torch.cat(part) for part in others)
        return cls(torch.cat([b.x for b in batches]), layer, condition, weight)

    def part(self, rows: slice | Tensor) -> Batch:
        """Some of the rows."""
        return self._each(lambda t: t[rows])

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        layer, condition, weight = (
            None if t is None else function(t) for t in (self.layer, self.condition, self.weight)
        )
        return Batch(function(self.x), layer, condition, weight)


@dataclass(frozen=True)
class Noise:
    """The random part of a step, for some of its rows.

    Attributes:
        eps: `(n, d)` standard normal.
        sigma: `(n,)` noise levels.
        drop: `(n,)` booleans, rows whose condition is hidden.
    """

    eps: Tensor
    sigma: Tensor
    drop: Tensor

    @classmethod
    def joined(cls, noises: Sequence[Noise]) -> Noise:
        """That of all rows of several batches."""
        if len(noises) == 1:
            return noises[0]
        return cls(*(torch.cat(part) for part in zip(*((n.eps, n.sigma, n.drop) for n in noises), strict=True)))

    def part(self, rows: slice) -> Noise:
        """Of some of the rows."""
        return Noise(self.eps[rows], self.sigma[rows], self.drop[rows])


def step_seed(*key: int) -> int:
    """A seed made from several numbers; 32 bits, since torch's CPU generator uses no more."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def draw_noise(config: TrainConfig, step: int, rows: range, width: int, device: torch.device) -> Noise:
    """Noise of some rows of a step's batch, counted over all processes.

    It depends only on (seed, step, row), so that any number of processes and micro-batches give the same.
    """
    generator = torch.Generator().manual_seed(step_seed(config.seed, step))
    draw = partial(stratified_sigmas, share=config.rows_per_sigma) if config.sigmas == "stratified" else uniform_sigmas
    part = slice(rows.start, rows.stop)
    sigma = draw(config.batch_size, generator)[part].to(device)
    chance = torch.rand(config.batch_size, generator=generator, dtype=torch.float32)
    drop = (chance[part] < config.condition_dropout).to(device)
    first = rows.start // _NOISE_ROWS
    blocks = [
        torch.randn(
            _NOISE_ROWS,
            width,
            generator=torch.Generator(device).manual_seed(step_seed(config.seed, step, 1 + block)),
            dtype=torch.float32,
            device=device,
        )
        for block in range(first, -(-rows.stop // _NOISE_ROWS))
    ]
    start = rows.start - first * _NOISE_ROWS
    return Noise(torch.cat(blocks)[start : start + len(rows)], sigma, drop)


def flow_matching_loss(denoiser: nn.Module, batch: Batch, eps: Acts, sigma: Tensor) -> Tensor:
    """Squared error per element `(n, d)` of the predicted velocity (paper, equation 3); sigma is `(n,)`."""
    velocity: Tensor = denoiser(interpolate(batch.x, eps, sigma), sigma, batch.layer, batch.condition)
    error = (velocity.float() - velocity_target(batch.x, eps)) ** 2
    return error if batch.weight is None else error * batch.weight[:, None]


@torch.no_grad()
def validation_loss(
    denoiser: nn.Module, batch: Batch, *, autocast: bool = False, seed: int = 0, rows: int = 4096
) -> dict[str, float]:
    """Mean loss per element on held-out rows, with noise and noise levels fixed by `seed`.

    The levels cover [0, 1] evenly, one for each row: two losses on the same rows differ by the models and hardly by the
    draw.

    Returns:
        `validation_loss`, and by tenths of sigma `validation_loss:sigma=0.0-0.1` and so on, where there are rows.
    """
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(batch.x.shape, generator=generator, dtype=torch.float32)
    sigma = stratified_sigmas(len(batch), generator)
    errors = []
    for start in range(0, len(batch), rows):
        part = slice(start, start + rows)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = flow_matching_loss(
                denoiser, batch.part(part).to(device), eps[part].to(device), sigma[part].to(device)
            )
        errors.append(loss.mean(1).cpu())
    error = torch.cat(errors).double().numpy()
    bins = sigma_bin(sigma.numpy())
    by_bin = {
        f"validation_loss:{bin_name(b)}": float(error[bins == b].mean()) for b in range(SIGMA_BINS) if (bins == b).any()
    }
    losses = {"validation_loss": float(error.mean()), **by_bin}
    return {name: value for name, value in losses.items() if math.isfinite(value)}


@torch.no_grad()
def lost_levels(denoiser: nn.Module, batch: Batch, *, autocast: bool = False) -> list[float]:
    """Noise levels at which the loss stands out from that at the levels below and above.

    The units that embed the noise level can die in training; between two that are left, a denoiser then takes some
    levels for others. Of the 1,000 levels a few are lost, at which a projection or a sample goes wrong, and hardly
    anything of it shows in the mean loss (docs/results/loss-for-compute).

    Args:
        batch: normalised rows, of which the first few are taken, with the same noise at every level.
    """
    device = next(denoiser.parameters()).device
    batch = batch.part(slice(_LOST_ROWS)).to(device)
    n = len(batch)
    eps = torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
    levels, losses = grid(TRAIN_STEPS)[:-1], []
    for part in levels.split(max(1, 4096 // n)):
        k = len(part)
        many = batch.part(torch.arange(n, device=device).repeat(k))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            error = flow_matching_loss(denoiser, many, eps.repeat(k, 1), part.repeat_interleave(n).to(device))
        losses.append(error.mean(1).reshape(k, n).mean(1).double().cpu())
    loss = torch.cat(losses)
    around = torch.stack([
        torch.maximum(loss[i - min(i, _AROUND) : i].median(), loss[i + 1 : i + 1 + _AROUND].median())
        for i in range(_EDGE, len(loss) - _EDGE)
    ])  # fmt: skip
    lost = loss[_EDGE:-_EDGE] > _STANDS_OUT * around
    return [float(level) for level in levels[_EDGE:-_EDGE][lost]]
