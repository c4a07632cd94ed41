"""Flow-matching training of a denoiser on an iterator of normalised batches: resumable, exactly repeatable."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from glp_lens.errors import InputError
from glp_lens.flow.path import interpolate, velocity_target
from glp_lens.flow.schedule import stratified_sigmas, uniform_sigmas
from glp_lens.training import checkpoint
from glp_lens.types import Acts, Json

Batches = Callable[[int], Iterator[Tensor]]
"""`batches(k)` yields normalised batches `(batch_size, d)` from the k-th on, the same ones at every call."""


@dataclass(frozen=True)
class TrainConfig:
    """How a denoiser is trained; the defaults are the paper's recipe.

    Attributes:
        rows: activations seen in total; more than the store holds means several epochs.
        batch_size: rows a step.
        lr: peak learning rate of AdamW.
        lr_start: share of `lr` at the first step.
        lr_end: share of `lr` at the last step.
        warmup: share of the steps in which the learning rate rises linearly; then it falls as a cosine.
        clip: largest norm of the gradient.
        sigmas: how noise levels are drawn; `stratified` covers each batch evenly, with four rows to a level.
        autocast: run the network in bfloat16, with float32 master weights.
        seed: of initialisation, order of rows, and noise.
    """

    rows: int = 1_000_000
    batch_size: int = 4096
    lr: float = 5e-5
    lr_start: float = 0.01
    lr_end: float = 0.1
    warmup: float = 0.01
    clip: float = 1.0
    sigmas: Literal["uniform", "stratified"] = "uniform"
    autocast: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.batch_size < 1 or self.rows < self.batch_size:
            raise InputError(f"training needs at least one whole batch: rows={self.rows}, batch_size={self.batch_size}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be a positive number, got {self.lr}")
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


@dataclass(frozen=True)
class TrainResult:
    """What training did.

    Attributes:
        history: one entry a logging point: step, rows, lr, loss (mean since the last one), validation loss.
        seconds: wall-clock time over all runs of a resumed training.
    """

    history: list[Json]
    seconds: float


def flow_matching_loss(denoiser: nn.Module, x: Acts, eps: Acts, sigma: Tensor) -> Tensor:
    """Squared error per element `(n, d)` of the predicted velocity (paper, equation 3); sigma is `(n,)`."""
    return (denoiser(interpolate(x, eps, sigma), sigma).float() - velocity_target(x, eps)) ** 2


def train(
    denoiser: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    validation: Acts | None = None,
    state: Path | None = None,
    identity: Json | None = None,
    log_points: int = 50,
    save_seconds: float = 30.0,
    save_now: Callable[[int], bool] = lambda _: False,
    on_saved: Callable[[int], None] = lambda _: None,
) -> TrainResult:
    """Train `denoiser` in place, on the device it is on.

    Noise and noise levels of step k depend on (seed, k) alone, so a run that was interrupted and resumed ends
    with the weights of one that was not.

    Args:
        batches: the data, already normalised.
        validation: held-out normalised rows, scored at every logging point with noise fixed once.
        state: file that keeps the training state, so that an interrupted run continues. It stays at the end, for
            whoever saves the model to remove: until then nothing else has it.
        identity: what else must match for `state` to be continued, for example the store's hash.
        log_points: number of entries in the history.
        save_seconds: time between two writes of `state`.
        save_now: asked after each step, with the number of steps done, whether `state` must be written at once.
        on_saved: told after each write, and when a run is resumed, how many steps `state` holds.

    Raises:
        InputError: the loss is not finite; the state written last is from before.
    """
    device = next(denoiser.parameters()).device
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.lr, fused=True)
    key = {"config": asdict(config), "identity": identity or {}}
    step, history, seconds = 0, list[Json](), 0.0
    resumed = checkpoint.load(state, key, denoiser, optimizer) if state else None
    pending = 0.0, 0
    if resumed:
        step, history, seconds, pending = resumed.step, resumed.history, resumed.seconds, resumed.pending
        on_saved(step)

    draw = partial(stratified_sigmas, share=config.rows_per_sigma) if config.sigmas == "stratified" else uniform_sigmas
    every = max(1, config.steps // log_points)
    began = saved = time.monotonic()
    total, count = torch.tensor(pending[0], device=device), pending[1]
    denoiser.train()
    bar = tqdm(
        total=config.steps * config.batch_size,
        initial=step * config.batch_size,
        desc="train GLP",
        unit="row",
        unit_scale=True,
        mininterval=1,
    )
    data = batches(step)
    with bar:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)
            generator = torch.Generator().manual_seed(step_seed(config.seed, step))
            x = next(data).to(device)
            eps = torch.randn(x.shape, generator=generator).to(device)
            sigma = draw(len(x), generator).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
                loss = flow_matching_loss(denoiser, x, eps, sigma).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, count, step = total + loss.detach(), count + 1, step + 1
            bar.update(len(x))
            if step % every == 0 or step == config.steps:
                entry = _entry(config, step, float(total) / count)
                if validation is not None:
                    entry["validation_loss"] = validation_loss(denoiser, validation, config.autocast)
                history.append(entry)
                bar.set_postfix({k: f"{entry[k]:.3f}" for k in ("loss", "validation_loss") if k in entry})
                total, count = torch.zeros((), device=device), 0
            if state:
                now = time.monotonic()
                due = count == 0 and now - saved > save_seconds
                if step == config.steps or save_now(step) or due:
                    place = checkpoint.Place(step, history, seconds + now - began, (float(total), count))
                    checkpoint.save(state, key, denoiser, optimizer, place)
                    saved = now
                    on_saved(step)
    denoiser.eval()
    return TrainResult(history, seconds + time.monotonic() - began)


def _entry(config: TrainConfig, step: int, loss: float) -> Json:
    """An entry of the history after `step` steps."""
    if not math.isfinite(loss):
        raise InputError(
            f"training diverged: loss is {loss} after {step} steps; lower lr (now {config.lr:g}) or "
            "check the store for massive activations"
        )
    return {"step": step, "rows": step * config.batch_size, "lr": config.lr_at(step - 1), "loss": loss}


def step_seed(seed: int, step: int) -> int:
    """Seed of a step's noise; 32 bits, since torch's CPU generator looks at no more of a seed."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


@torch.no_grad()
def validation_loss(denoiser: nn.Module, x: Acts, autocast: bool = False, seed: int = 0) -> float:
    """Mean loss per element on `x` with noise and stratified noise levels fixed by `seed`."""
    device = next(denoiser.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(x.shape, generator=generator).to(device)
    sigma = stratified_sigmas(len(x), generator).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return float(flow_matching_loss(denoiser, x.to(device), eps, sigma).mean())
