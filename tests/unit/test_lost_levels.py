"""Noise levels that a training lost are found and told, wherever they are, and nothing else is."""

import warnings

import pytest
import torch
from torch import nn

from glp_lens import GLP, recipe
from glp_lens.activations import write_store
from glp_lens.models import fitting
from glp_lens.training.config import TrainConfig
from glp_lens.training.objective import Batch, lost_levels
from tests.unit.toy_training import D, batches, denoiser, rows, train

HELD = Batch(rows(40, 8))


class Lossy(nn.Module):
    """A denoiser that takes a band of noise levels for another one."""

    def __init__(self, inner, low, high, taken_for):
        super().__init__()
        self.inner, self.low, self.high, self.taken_for = inner, low, high, taken_for

    def forward(self, x, sigma, layer=None, condition=None):
        wrong = (sigma > self.low - 5e-4) & (sigma < self.high + 5e-4)
        velocity = self.inner(x, sigma, layer, condition)
        return torch.where(wrong[:, None], velocity + self.taken_for, velocity)


@pytest.fixture(scope="module")
def trained():
    model = denoiser(seed=1)
    train(model, batches(64), TrainConfig(rows=64 * 300, batch_size=64, lr=4e-3, sigmas="stratified"))
    return model.eval()


def test_of_a_sound_denoiser_none_is_lost(trained):
    assert lost_levels(trained, HELD) == []
    assert lost_levels(denoiser(), HELD) == []  # nor of one that has learned nothing


@pytest.mark.parametrize(("low", "high"), [(0.240, 0.242), (0.5, 0.5), (0.165, 0.197), (0.95, 0.96), (0.02, 0.025)])
def test_a_band_of_levels_is_found(trained, low, high):
    found = lost_levels(Lossy(trained, low, high, 1.0), HELD)
    assert sorted(found) == pytest.approx([level / 1000 for level in range(round(1000 * low), round(1000 * high) + 1)])


def test_a_batch_smaller_than_the_rows_looked_at_will_do(trained):
    one = Batch(HELD.x[:1])
    assert lost_levels(trained, one) == []
    assert lost_levels(Lossy(trained, 0.6, 0.6, 1.0), one) == pytest.approx([0.6])


@pytest.mark.parametrize("lost", [[], [0.242, 0.241]])
def test_a_fit_tells_what_it_lost_and_keeps_it(tmp_path, monkeypatch, lost):
    monkeypatch.setattr(fitting, "lost_levels", lambda *_, **__: lost)
    store = write_store(tmp_path / "acts", rows(500, 0), hook="blocks.0.hook_resid_post")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        glp = GLP.fit(store, recipe("fast", rows=256, batch_size=64), d_model=D, d_mlp=8, n_layers=1)
    told = [warning for warning in caught if "noise levels" in str(warning.message)]
    glp.save_pretrained(tmp_path / "glp")
    known = GLP.from_pretrained(tmp_path / "glp").provenance["training"]
    if lost:
        assert "lost 2 of 1000 noise levels, between 0.241 and 0.242" in str(told[0].message)
        assert told[0].filename == __file__
        assert known["lost_levels"] == lost
    else:
        assert told == []
        assert "lost_levels" not in known
