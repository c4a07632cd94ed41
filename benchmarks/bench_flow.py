"""Sampling and projection with random priors of the paper's widths, against the plain way of the same mathematics."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from by_row import BY_ROW, CEILING, random_prior, velocity_by_row
from conftest import OURS, Timed
from torch import Tensor

from glp_lens.flow.schedule import grid, path_from_u
from glp_lens.models.glp import GLP

BLOCKS = 6
U = 0.5
PART = 512
"""Rows, at most, of the products of the ceiling: so few that what is between them stays in the cache."""


@torch.no_grad()
def euler_by_row(prior: GLP, z: Tensor, levels: Tensor) -> Tensor:
    """Euler steps with a noise level for each row, as in the released code."""
    for start, end in pairwise(levels.tolist()):
        z = z + (end - start) * velocity_by_row(prior.denoiser, z, torch.full((len(z),), start))
    return z * prior.var.sqrt() + prior.mean


def sample(prior: GLP, x: Tensor, eps: Tensor, steps: int) -> Tensor:
    return prior.sample(len(eps), steps=steps, noise=eps)


def sample_by_row(prior: GLP, x: Tensor, eps: Tensor, steps: int) -> Tensor:
    return euler_by_row(prior, eps, grid(steps))


def project(prior: GLP, x: Tensor, eps: Tensor, steps: int) -> Tensor:
    return prior.project(x, u=U, steps=steps, noise=eps)


def project_by_row(prior: GLP, x: Tensor, eps: Tensor, steps: int) -> Tensor:
    levels = path_from_u(U, steps)
    z = (x - prior.mean) / prior.var.sqrt()
    return euler_by_row(prior, (1 - levels[0]) * z + levels[0] * eps, levels)


@torch.no_grad()
def matrix_products(prior: GLP, z: Tensor) -> Tensor:
    """The large products of one step, without the time path."""
    h = prior.denoiser.in_proj(z)
    for block in prior.denoiser.blocks:
        block.up_proj(h)
        h = block.down_proj(block.gate_proj(h))
    out: Tensor = prior.denoiser.out_proj(h)
    return out


@dataclass(frozen=True)
class Work:
    """A task, our implementation and the plain one, and how many velocities it takes for a row."""

    label: str
    ours: Callable[[GLP, Tensor, Tensor, int], Tensor]
    by_row: Callable[[GLP, Tensor, Tensor, int], Tensor]
    steps: int
    velocities: int


SAMPLING = Work("sampling, 20 steps", sample, sample_by_row, 20, 20)
PROJECTION = Work("projection, u = 0.5 of 20 steps", project, project_by_row, 20, 10)
LAST_STEP = Work("projection, u = 0.5 of 2 steps", project, project_by_row, 2, 1)

# Work, rows and rounds of each width. A step costs the same wherever it is: of many wide rows one is timed.
CASES = [
    (576, SAMPLING, 1, 10),
    (576, SAMPLING, 32, 5),
    (576, SAMPLING, 4096, 1),
    (576, PROJECTION, 1, 10),
    (576, PROJECTION, 32, 5),
    (576, PROJECTION, 4096, 1),
    (2048, SAMPLING, 1, 2),
    (2048, SAMPLING, 32, 1),
    (2048, PROJECTION, 1, 3),
    (2048, PROJECTION, 32, 2),
    (2048, LAST_STEP, 4096, 1),
]


@lru_cache(maxsize=1)
def prior_of(d: int) -> GLP:
    return random_prior(d, BLOCKS)


def rows(prior: GLP, n: int) -> tuple[Tensor, Tensor]:
    """Activations and noise, `(n, d)` each."""
    generator = torch.Generator().manual_seed(n)
    eps = torch.randn(n, prior.d_in, generator=generator)
    return prior.mean + torch.randn(n, prior.d_in, generator=generator), eps


def name(work: Work, n: int, d: int) -> str:
    return f"{work.label}, {n} row{'s' * (n > 1)}, d = {d}"


@pytest.mark.parametrize("way", [OURS, BY_ROW, CEILING])
@pytest.mark.parametrize(("d", "work", "n", "rounds"), CASES)
def test_flow(way: str, d: int, work: Work, n: int, rounds: int, timed: Timed) -> None:
    prior = prior_of(d)
    x, eps = rows(prior, n)
    label = name(work, n, d)
    if way == CEILING:  # one velocity of each row, and not of all where they are many
        z = eps[:PART]
        amount = len(z) / work.velocities
        products = timed(label, way, matrix_products, prior, z, amount=amount, unit="rows", rounds=max(3, rounds))
        assert products.shape == z.shape
        flops = prior.denoiser.flops_per_row(rows_per_sigma=10**9) / 2
        assert flops == pytest.approx(d * d * (BLOCKS * 24 + 4))
        return
    mine, other = (work.ours, work.by_row) if way == OURS else (work.by_row, work.ours)
    moved = timed(label, way, mine, prior, x, eps, work.steps, amount=n, unit="rows", rounds=rounds)
    torch.testing.assert_close(moved[:7], other(prior, x[:7], eps[:7], work.steps), rtol=1e-4, atol=1e-4)


FAST_CASES = [(576, work, n, rounds) for work in (SAMPLING, PROJECTION) for n, rounds in ((1, 10), (32, 5))]


def fast(prior: GLP, work: Work, x: Tensor, eps: Tensor) -> Tensor:
    if work is SAMPLING:
        return prior.sample(len(eps), noise=eps, fast=True)
    return prior.project(x, u=U, noise=eps, fast=True)


def exact(prior: GLP, work: Work, x: Tensor, eps: Tensor) -> Tensor:
    """Where the flow of `work` ends, from many steps of third order."""
    if work is SAMPLING:
        return prior.sample(len(eps), noise=eps, steps=80, solver="ab3")
    start = float(path_from_u(U, work.steps)[0])
    return prior.project(x, sigma=start, noise=eps, steps=160, solver="ab3")


@pytest.mark.parametrize("way", [OURS, "20 steps of Euler", f"20 steps of Euler, {BY_ROW}"])
@pytest.mark.parametrize(("d", "work", "n", "rounds"), FAST_CASES)
def test_fast(way: str, d: int, work: Work, n: int, rounds: int, timed: Timed) -> None:
    prior = prior_of(d)
    x, eps = rows(prior, n)

    def follow(x: Tensor, eps: Tensor) -> Tensor:
        if way == OURS:
            return fast(prior, work, x, eps)
        return (work.by_row if way.endswith(BY_ROW) else work.ours)(prior, x, eps, work.steps)

    label = f"{name(work, n, d)}, or fast"
    moved = timed(label, way, follow, x, eps, amount=n, unit="rows", rounds=rounds)[:7]
    end = exact(prior, work, x[:7], eps[:7])
    euler = torch.dist(work.ours(prior, x[:7], eps[:7], work.steps), end)
    assert torch.dist(moved, end) < 2 * euler < 0.05 * end.norm()  # equal on trained priors: docs/results/solvers
