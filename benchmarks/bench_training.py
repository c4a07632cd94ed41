"""Training steps, sampling and projection of a 16M-parameter prior, against the plain way of the same mathematics."""

import copy
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from conftest import OURS
from torch import Tensor, nn

from glp_lens.flow.schedule import grid, path_from_u, uniform_sigmas
from glp_lens.models.denoiser import Denoiser, DenoiserConfig, sinusoidal
from glp_lens.models.glp import GLP
from glp_lens.training.loop import TrainConfig, train

D_IN, BATCH, STEPS = 576, 512, 4
SOLVER_STEPS, U = 20, 0.5


def recipe(autocast: bool, steps: int = STEPS) -> TrainConfig:
    return TrainConfig(rows=steps * BATCH, batch_size=BATCH, lr=1e-3, autocast=autocast)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Denoiser(DenoiserConfig(D_IN, d_model=768, d_mlp=1536, n_layers=3))


@pytest.fixture(scope="module")
def data() -> Tensor:
    """Normalised batches `(STEPS, BATCH, D_IN)`."""
    return torch.randn(STEPS, BATCH, D_IN, generator=torch.Generator().manual_seed(1))


def velocity_by_row(denoiser: Denoiser, z: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser's mathematics with its time path computed for each row, whether levels repeat or not."""
    e = denoiser.time_embed(sinusoidal(1000 * sigma, denoiser.config.d_model))
    h = denoiser.in_proj(z)
    for block in denoiser.layers:
        x = block.ln(h)
        gate = nn.functional.silu(block.gate_proj(x) * block.time_proj(e))
        h = h + block.down_proj(gate * block.up_proj(x))
    return denoiser.out_proj(denoiser.ln(h))


def our_training(denoiser: Denoiser, data: Tensor, config: TrainConfig) -> float:
    """Mean loss of the steps."""

    def batches(start: int) -> Iterator[Tensor]:
        return iter(data[start:])

    return train(denoiser, batches, config, log_points=1).history[0]["loss"]


def plain_training(denoiser: Denoiser, data: Tensor, config: TrainConfig) -> float:
    """Time path for each row and AdamW as it comes; the same draws of noise and learning rates as ours."""
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.lr)
    losses = []
    denoiser.train()
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.lr_at(step)
        generator = torch.Generator().manual_seed((config.seed << 40) + step)
        x = data[step]
        eps = torch.randn(x.shape, generator=generator)
        sigma = uniform_sigmas(len(x), generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
            z = (1 - sigma[:, None]) * x + sigma[:, None] * eps
            velocity = velocity_by_row(denoiser, z, sigma)
        loss = nn.functional.mse_loss(velocity.float(), eps - x)
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


TRAININGS = {
    OURS: (our_training, True),
    "bfloat16 autocast, default AdamW (released recipe)": (plain_training, True),
    "float32, default AdamW": (plain_training, False),
}


@pytest.fixture(scope="module")
def expected_loss(denoiser, data) -> float:
    return plain_training(copy.deepcopy(denoiser), data, recipe(autocast=False))


@pytest.mark.parametrize("way", TRAININGS)
def test_training(way, denoiser, data, expected_loss, timed):
    function, autocast = TRAININGS[way]
    loss = timed(
        "training, batches of 512",
        way,
        function,
        setup=lambda: ((copy.deepcopy(denoiser), data, recipe(autocast)), {}),
        amount=STEPS * BATCH,
        unit="rows",
    )
    assert loss == pytest.approx(expected_loss, rel=0.01 if autocast else 1e-6)


def test_training_is_the_same_mathematics(denoiser, data):
    config = recipe(autocast=False, steps=2)
    mine, plain = copy.deepcopy(denoiser), copy.deepcopy(denoiser)
    assert our_training(mine, data, config) == pytest.approx(plain_training(plain, data, config), rel=1e-6)
    moved = [torch.dist(p, q) for p, q in zip(mine.parameters(), denoiser.parameters(), strict=True)]
    apart = [torch.dist(p, q) for p, q in zip(mine.parameters(), plain.parameters(), strict=True)]
    assert sum(apart) < 0.01 * sum(moved)


@pytest.fixture(scope="module")
def glp(denoiser) -> GLP:
    generator = torch.Generator().manual_seed(2)
    mean, var = torch.randn(D_IN, generator=generator), 0.5 + torch.rand(D_IN, generator=generator)
    return GLP(copy.deepcopy(denoiser), mean, var)


@torch.no_grad()
def euler_by_row(denoiser: Denoiser, z: Tensor, levels: list[float]) -> Tensor:
    """Euler steps with a noise level for each row, as in the released code."""
    for start, end in pairwise(levels):
        z = z + (end - start) * velocity_by_row(denoiser, z, torch.full((len(z),), start))
    return z


def our_sample(glp: GLP, x: Tensor, eps: Tensor) -> Tensor:
    return glp.sample(len(eps), steps=SOLVER_STEPS, noise=eps)


def sample_by_row(glp: GLP, x: Tensor, eps: Tensor) -> Tensor:
    z = euler_by_row(glp.denoiser, eps, grid(SOLVER_STEPS).tolist())
    return z * glp.var.sqrt() + glp.mean


def our_projection(glp: GLP, x: Tensor, eps: Tensor) -> Tensor:
    return glp.project(x, u=U, steps=SOLVER_STEPS, noise=eps)


def project_by_row(glp: GLP, x: Tensor, eps: Tensor) -> Tensor:
    levels = path_from_u(U, SOLVER_STEPS).tolist()
    z = (1 - levels[0]) * (x - glp.mean) / glp.var.sqrt() + levels[0] * eps
    return euler_by_row(glp.denoiser, z, levels) * glp.var.sqrt() + glp.mean


BY_ROW = "time path for each row"
FLOWS = {
    "sampling, 20 steps": {OURS: our_sample, BY_ROW: sample_by_row},
    "projection, u = 0.5 of 20 steps": {OURS: our_projection, BY_ROW: project_by_row},
}


@pytest.mark.parametrize("way", [OURS, BY_ROW])
@pytest.mark.parametrize("n", [1, 32, 1024])
@pytest.mark.parametrize("work", FLOWS)
def test_flow(work, n, way, glp, timed):
    generator = torch.Generator().manual_seed(n)
    eps = torch.randn(n, D_IN, generator=generator)
    x = glp.mean + torch.randn(n, D_IN, generator=generator)
    label = f"{work}, {n} row{'s' * (n > 1)}"
    rounds = 2 if n > 100 else 10
    found = timed(label, way, FLOWS[work][way], glp, x, eps, amount=n, unit="rows", rounds=rounds)

    other = next(function for name, function in FLOWS[work].items() if name != way)
    torch.testing.assert_close(found[:7], other(glp, x[:7], eps[:7]), rtol=1e-4, atol=1e-4)
