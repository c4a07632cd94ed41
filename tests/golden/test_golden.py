"""Released-format checkpoints must give the reference implementation's numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glp_lens.flow.path import interpolate
from glp_lens.flow.schedule import TRAIN_STEPS, grid, index_of_u
from glp_lens.models.glp import GLP
from glp_lens.training.objective import Batch, flow_matching_loss

HERE = Path(__file__).parent


@pytest.fixture(params=["single_layer", "multi_layer"])
def case(request):
    folder = HERE / request.param
    want = load_file(folder / "expected.safetensors")
    glp = GLP.from_pretrained(folder)
    return glp, want, want.get("layer_idx")


def close(got, want):
    """1e-5 relative, against the size of the tensor (elements near zero carry rounding of the rest)."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().mean()))


def test_normaliser(case):
    glp, want, layer = case
    close(glp.normalize(want["activations"], layer), want["normalized"])
    close(glp.denormalize(want["normalized"], layer), want["denormalized"])


def test_velocity(case):
    glp, want, layer = case
    close(glp.velocity(want["normalized"], want["timesteps"] / 1000, layer), want["velocity"])


def test_velocity_with_shared_sigma_equals_per_row_sigma(case):
    glp, want, layer = case
    z = want["normalized"]
    close(glp.velocity(z, 0.25, layer), glp.velocity(z, torch.full((len(z),), 0.25), layer))


def test_loss(case):
    glp, want, layer = case
    sigma = grid(TRAIN_STEPS)[index_of_u(want["u"], TRAIN_STEPS)]
    close(sigma * 1000, want["loss_timesteps"])
    x, eps = want["normalized"], want["loss_noise"]
    close((glp.velocity(interpolate(x, eps, sigma), sigma, layer) - (eps - x)) ** 2, want["loss_per_element"])
    close(flow_matching_loss(glp.denoiser, Batch(x, layer), eps, sigma).detach(), want["loss_per_element"])


def test_meta_neurons(case):
    glp, want, layer = case
    expected = want["meta_neurons_u0.9"]  # (layers, n, d_mlp)
    got = glp.encode(want["activations"], sigma=0.1, layer=layer, noise=want["loss_noise"])
    close(got, expected.permute(1, 0, 2).flatten(1))


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_samples(case, steps):
    glp, want, layer = case
    got = glp.sample(9, steps=steps, layer=layer, noise=want["sample_noise"])
    close(glp.normalize(got, layer), want[f"sample_{steps}"])


@pytest.mark.parametrize(("u", "steps"), [(0.5, 20), (0.25, 20), (0.8, 10)])
def test_projections(case, u, steps):
    glp, want, layer = case
    got = glp.project(want["activations"], u=u, steps=steps, layer=layer, noise=want["project_noise"])
    close(got, want[f"project_u{u}_n{steps}"])
