"""Random features and the language model's own neurons: the two feature sets that nothing was trained for."""

import math

import numpy as np
import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.lm import activations
from glp_lens.models.neurons import Neurons
from glp_lens.models.random_features import RandomFeatures
from tests.conformance import check_model
from tests.unit.memory_store import MemoryStore

D = 11


def rows(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) * torch.linspace(0.3, 8, D) + torch.arange(D) * 3.0


def test_features_are_rectified_projections_of_standardised_rows():
    x, y = rows(307), rows(13, seed=1)
    model = RandomFeatures.fit(MemoryStore(x), n_features=29)
    wide = x.double()
    z = (y.double() - wide.mean(0)) / wide.std(0, correction=0)
    expected = np.maximum(z.numpy() @ model.weights.double().numpy().T, 0)
    np.testing.assert_allclose(model.encode(y).numpy(), expected, atol=1e-4)
    assert model.encode(y).shape == (13, 29)


def test_directions_are_spread_evenly_over_the_sphere():
    weights = RandomFeatures.draw(torch.zeros(D), torch.ones(D), 20_011).weights.double()
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(20_011, dtype=torch.float64), atol=1e-6, rtol=0)
    # Of a point of the sphere each coordinate has mean 0 and variance 1 / d; a fourth moment of 3 / (d (d + 2)).
    assert weights.mean(0).abs().max() < 4.5 / math.sqrt(20_011 * D)
    covariance = weights.T @ weights / len(weights)
    assert (covariance - torch.eye(D) / D).abs().max() < 0.004
    assert float(weights.pow(4).mean()) == pytest.approx(3 / (D * (D + 2)), rel=0.02)


def test_each_feature_fires_on_half_of_symmetric_rows():
    x = rows(4003)
    fires = (RandomFeatures.fit(MemoryStore(x), n_features=53).encode(x) > 0).double().mean(0)
    assert (fires - 0.5).abs().max() < 0.04


def test_as_many_features_as_asked_for_by_default_four_a_dimension():
    store = MemoryStore(rows(103))
    assert RandomFeatures.fit(store).n_features == 4 * D
    assert RandomFeatures.fit(store, n_features=7).encode(rows(5)).shape == (5, 7)
    with pytest.raises(InputError, match="n_features must be at least 1, got 0"):
        RandomFeatures.fit(store, n_features=0)


def test_the_seed_sets_the_directions():
    drawn = [RandomFeatures.draw(torch.zeros(D), torch.ones(D), 6, seed=seed).weights for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_neurons_are_what_the_output_weights_of_the_mlp_are_given(tiny_model):
    """On both classes of language model: the MLP's output follows from them."""
    neurons = Neurons.of(tiny_model, "blocks.1.hook_resid_post")
    assert neurons.hook == "blocks.1.mlp.hook_post"
    assert neurons.n_features == neurons.d_in == 40
    tokens = torch.tensor([[0, 9, 5, 31, 7], [0, 4, 8, 2, 6]])
    found = activations(tiny_model, tokens, torch.ones_like(tokens).bool(), [neurons.hook, "blocks.1.hook_mlp_out"])
    hidden, out = found[neurons.hook], found["blocks.1.hook_mlp_out"]
    assert hidden.shape == (2, 5, 40)
    features = neurons.encode(hidden.flatten(0, 1))
    block = tiny_model.blocks[1].mlp
    weights = block.W_out
    torch.testing.assert_close(features @ weights, out.flatten(0, 1), rtol=1e-3, atol=1e-4)


def test_neurons_know_their_language_model_and_survive_saving(tiny_model, tmp_path):
    neurons = Neurons.of(tiny_model, "blocks.2.mlp.hook_post")
    assert neurons.provenance["store"]["model"]["n_layers"] == 4
    assert neurons.provenance["store"]["weights"]
    check_model(neurons, torch.randn(17, 40, generator=torch.Generator().manual_seed(0)), tmp_path / "model")


@pytest.mark.parametrize("hook", ["hook_embed", "blocks.7.hook_resid_post"])
def test_neurons_are_of_a_block_that_is_there(tiny_bridge, hook):
    with pytest.raises(InputError, match="hook point"):
        Neurons.of(tiny_bridge, hook)
