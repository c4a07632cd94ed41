"""Released-format checkpoints must give the reference implementation's numbers: all of them, to 1e-5."""

from collections import UserDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glp_lens.flow.path import interpolate
from glp_lens.flow.schedule import TRAIN_STEPS, grid, index_of_u
from glp_lens.models.glp import GLP
from glp_lens.training.objective import Batch, flow_matching_loss

HERE = Path(__file__).parent
FOLDERS = ["single_layer", "multi_layer"]


class Expected(UserDict):
    """Tensors by name, that know which of them were looked at."""

    def __init__(self, folder):
        super().__init__(load_file(HERE / folder / "expected.safetensors"))
        self.seen = set()

    def __getitem__(self, name):
        value = super().__getitem__(name)
        self.seen.add(name)
        return value

    @property
    def layer(self):
        return self.get("layer_idx")


def close(got, want):
    """1e-5 relative, against the size of the tensor (elements near zero carry rounding of the rest)."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().mean()))


def normaliser(glp, want):
    close(glp.normalize(want["activations"], want.layer), want["normalized"])
    close(glp.denormalize(want["normalized"], want.layer), want["denormalized"])


def velocity(glp, want):
    close(glp.velocity(want["normalized"], want["timesteps"] / 1000, want.layer), want["velocity"])


def loss(glp, want):
    sigma = grid(TRAIN_STEPS)[index_of_u(want["u"], TRAIN_STEPS)]
    close(sigma * 1000, want["loss_timesteps"])
    x, eps = want["normalized"], want["loss_noise"]
    close((glp.velocity(interpolate(x, eps, sigma), sigma, want.layer) - (eps - x)) ** 2, want["loss_per_element"])
    close(flow_matching_loss(glp.denoiser, Batch(x, want.layer), eps, sigma).detach(), want["loss_per_element"])


def meta_neurons(glp, want):
    expected = want["meta_neurons_u0.9"]  # (layers, n, d_mlp)
    got = glp.encode(want["activations"], sigma=0.1, layer=want.layer, noise=want["loss_noise"])
    close(got, expected.permute(1, 0, 2).flatten(1))


def samples(glp, want):
    for steps in (1, 4, 20):
        got = glp.sample(9, steps=steps, layer=want.layer, noise=want["sample_noise"])
        close(glp.normalize(got, want.layer), want[f"sample_{steps}"])


def projections(glp, want):
    for u, steps in [(0.5, 20), (0.25, 20), (0.8, 10)]:
        got = glp.project(want["activations"], u=u, steps=steps, layer=want.layer, noise=want["project_noise"])
        close(got, want[f"project_u{u}_n{steps}"])


CHECKS = [normaliser, velocity, loss, meta_neurons, samples, projections]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_numbers_of_the_reference(check, folder):
    check(GLP.from_pretrained(HERE / folder), Expected(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_tensor_is_looked_at(folder):
    glp, want = GLP.from_pretrained(HERE / folder), Expected(folder)
    for check in CHECKS:
        check(glp, want)
    assert want.seen == set(want.keys())


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_numbers_after_saving_in_either_format(check, folder, tmp_path):
    glp = GLP.from_pretrained(HERE / folder)
    for name, save in {"own": glp.save_pretrained, "released": glp.save_released}.items():
        check(GLP.from_pretrained(save(tmp_path / name)), Expected(folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_velocity_with_shared_sigma_equals_per_row_sigma(folder):
    glp, want = GLP.from_pretrained(HERE / folder), Expected(folder)
    z = want["normalized"]
    close(glp.velocity(z, 0.25, want.layer), glp.velocity(z, torch.full((len(z),), 0.25), want.layer))
