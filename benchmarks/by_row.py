"""The priors that are timed, and the plain way of their mathematics: the time path computed for each row."""

import torch
from torch import Tensor, nn

from glp_lens.models.denoiser import Denoiser, DenoiserConfig, sinusoidal
from glp_lens.models.fitting import initial_denoiser
from glp_lens.models.glp import GLP
from glp_lens.training.config import TrainConfig

BY_ROW = "time path for each row"
CEILING = "matrix products alone (ceiling)"


def random_denoiser(d: int, blocks: int) -> Denoiser:
    """Random weights, in the paper's widths."""
    return initial_denoiser(DenoiserConfig(d, d_model=2 * d, d_mlp=4 * d, n_layers=blocks), TrainConfig())


def random_prior(d: int, blocks: int) -> GLP:
    generator = torch.Generator().manual_seed(2)
    mean, var = torch.randn(d, generator=generator), 0.5 + torch.rand(d, generator=generator)
    return GLP(random_denoiser(d, blocks), mean, var)


def velocity_by_row(denoiser: Denoiser, z: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser's mathematics with its time path computed for each row, whether levels repeat or not."""
    e = denoiser.time_embed(sinusoidal(1000 * sigma, denoiser.config.d_model))
    h = denoiser.in_proj(z)
    for block in denoiser.blocks:
        x = block.ln(h)
        gate = nn.functional.silu(block.gate_proj(x) * block.time_proj(e))
        h = h + block.down_proj(gate * block.up_proj(x))
    velocity: Tensor = denoiser.out_proj(denoiser.ln(h))
    return velocity
