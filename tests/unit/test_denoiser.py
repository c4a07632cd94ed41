"""The denoiser's short cuts against its mathematics, row by row in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from glp_lens.models.denoiser import Denoiser, DenoiserConfig, sinusoidal
from glp_lens.models.fitting import initial_denoiser
from glp_lens.training.config import TrainConfig

DEPTH, N = 3, 11


@pytest.fixture
def denoiser() -> Denoiser:
    shape = DenoiserConfig(5, d_model=8, d_mlp=14, n_layers=2, multi_layer_n_layers=DEPTH)
    return initial_denoiser(shape, TrainConfig()).double()


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, noise levels and layers, with some that repeat."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    return z, torch.tensor([0.25, 0.5, 0.75]).repeat(4)[:N], torch.randint(DEPTH, (N,), generator=generator)


def velocity_of_row(denoiser: Denoiser, z: Tensor, sigma: Tensor, layer: Tensor) -> Tensor:
    width = denoiser.config.d_model
    e = denoiser.time_embed(sinusoidal(1000 * sigma[None], width).double())
    e = e + denoiser.layer_embed(sinusoidal(layer[None] / (DEPTH - 1), width).double())
    h = denoiser.in_proj(z[None])
    for block in denoiser.blocks:
        x = block.ln(h)
        h = h + block.down_proj(silu(block.gate_proj(x) * block.time_proj(e)) * block.up_proj(x))
    return denoiser.out_proj(denoiser.ln(h))[0]


@pytest.fixture(autouse=True)
def embeddings_in_float64(monkeypatch):
    monkeypatch.setattr("glp_lens.models.denoiser.sinusoidal", lambda *a: sinusoidal(*a).double())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("grad", [True, False])
def test_velocity_is_that_of_each_row(denoiser, rows, grad, dtype):
    z, sigma, layer = rows
    kept = z.clone()
    with torch.set_grad_enabled(grad):
        found = denoiser(z, sigma, layer.to(dtype))
    expected = torch.stack([velocity_of_row(denoiser, *row) for row in zip(*rows, strict=True)])
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(z, kept)


def test_gradients_are_those_of_each_row(denoiser, rows):
    denoiser(*rows).square().sum().backward()
    found = [p.grad.clone() for p in denoiser.parameters()]
    denoiser.zero_grad()
    sum(velocity_of_row(denoiser, *row).square().sum() for row in zip(*rows, strict=True)).backward()
    for mine, parameter in zip(found, denoiser.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("width", "tells"), [(9, True), (21, False), (30, False)])
def test_what_a_narrow_output_loses_at_noise_level_one(width, tells):
    """Of noise, the best projection to so many dimensions leaves out just this share of the variance."""
    shape = DenoiserConfig(21, width, 8, 1)
    noise = torch.randn(50_000, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(21, min(width, 21), generator=torch.Generator().manual_seed(1)).double()).Q
    left = (noise - noise @ basis @ basis.T).square().mean()
    assert shape.floor == pytest.approx(float(left), abs=0.01)
    assert (shape.warning is not None) == tells
