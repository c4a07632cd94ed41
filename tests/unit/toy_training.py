"""A small denoiser and correlated Gaussian rows to train it on, the same at every call."""

import math
from collections.abc import Callable, Generator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.training import loop
from glp_lens.training.config import RunOptions, TrainConfig
from glp_lens.training.objective import Batch

D = 6
COVARIANCE_ROOT = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
COVARIANCE_ROOT /= (COVARIANCE_ROOT**2).sum(1, keepdim=True).sqrt()  # unit variances


def train(model: nn.Module, feed: loop.Feed, config: TrainConfig, **options: Any) -> loop.TrainResult:
    """`loop.train`; those of the options that are of the run are gathered in `RunOptions`."""
    own = {field.name for field in fields(RunOptions)} & options.keys()
    run = RunOptions(**{name: options.pop(name) for name in own})
    return loop.train(model, feed, config, run=run, **options)


class Killed(Exception):
    """What stands for the end of the process."""


def denoiser(seed: int = 0, **shape: Any) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(DenoiserConfig(D, shape.pop("d_model", 32), shape.pop("d_mlp", 64), 2, **shape))


def rows(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) @ COVARIANCE_ROOT.T


def batches(
    size: int, *, killed_at: int | None = None, spoilt_at: int | None = None
) -> Callable[[int], Generator[Batch]]:
    """Batches by number; one of them ends the process, or holds a NaN."""

    def start(k: int) -> Generator[Batch]:
        while True:
            if k == killed_at:
                raise Killed
            x = rows(size, 1000 + k)
            if k == spoilt_at:
                x[size // 2, 1] = math.nan
            yield Batch(x)
            k += 1

    return start


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of weights are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
