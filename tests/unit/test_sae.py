"""The sparse autoencoder: sae-lens's trainer on our rows, its files, its health on data with a known code."""

import math
import sys

import pytest
import torch

from glp_lens.errors import InputError
from glp_lens.models.sae import SAE
from tests.unit.memory_store import MemoryStore

D, DIRECTIONS, ACTIVE = 20, 30, 3


def rows(n, seed=0):
    """Sparse sums of `ACTIVE` of `DIRECTIONS` fixed directions, off centre and far from norm 1."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(DIRECTIONS, D, generator=torch.Generator().manual_seed(9))
    chosen = torch.rand(n, DIRECTIONS, generator=generator).topk(ACTIVE, dim=1).indices
    code = torch.zeros(n, DIRECTIONS).scatter_(1, chosen, 1 + torch.rand(n, ACTIVE, generator=generator))
    return 40 * code @ directions + 100 * torch.linspace(-1, 1, D)


@pytest.fixture(scope="module")
def x():
    return rows(3001)


@pytest.fixture(scope="module")
def model(x):
    return SAE.fit(MemoryStore(x), n_latents=43, k=ACTIVE, rows=60_000, batch_size=125, lr=3e-3)


def test_learns_the_code(model):
    health = model.health(rows(1501, seed=1))
    assert health.fvu < 0.2
    assert health.alive * 43 >= DIRECTIONS
    assert 1 < health.l0 <= ACTIVE
    assert health.n == 1501


def test_features_are_sparse_and_positive(model):
    f = model.encode(rows(101, seed=1))
    assert f.shape == (101, 43)
    assert (f >= 0).all()
    assert ((f > 0).sum(1) <= ACTIVE).all()


def test_weights_work_on_raw_activations(model):
    """The normalisation of training is folded in: the textbook formula on raw rows gives the same."""
    y = rows(31, seed=2)
    w = {name: p.detach().double() for name, p in model.sae.named_parameters()}
    scale = w["W_dec"].norm(dim=1)
    pre = ((y.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * scale
    top = pre.topk(ACTIVE, dim=1)
    code = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
    torch.testing.assert_close(model.encode(y).double(), code, rtol=1e-3, atol=1e-2)
    decoded = (code / scale) @ w["W_dec"] + w["b_dec"]
    torch.testing.assert_close(model.reconstruct(y).double(), decoded, rtol=1e-3, atol=1e-2)


def test_health_is_what_its_words_say(model):
    y = rows(5003, seed=3)  # more than one block
    f, r = model.encode(y), model.reconstruct(y)
    health = model.health(y)
    assert health.alive == pytest.approx(float((f > 0).any(0).double().mean()))
    assert health.l0 == pytest.approx(float((f > 0).double().sum(1).mean()))
    residual, spread = (y - r).double().square().sum(), (y - y.mean(0)).double().square().sum()
    assert health.fvu == pytest.approx(float(residual / spread), rel=1e-5)


def test_score_is_the_negative_squared_error(model):
    y = rows(31, seed=2)
    torch.testing.assert_close(model.score(y), -((y - model.reconstruct(y)) ** 2).sum(1))


def test_training_counts_what_it_saw(x):
    model = SAE.fit(MemoryStore(x), n_latents=33, k=2, rows=1001, batch_size=100)
    training = model.provenance["training"]
    assert training["rows_seen"] == 1100
    assert training["parameters"] == 2 * 33 * D + 33 + D
    assert training["flops"] == 6 * training["parameters"] * 1100


def test_opens_what_sae_lens_saved(model, tmp_path):
    model.sae.save_model(tmp_path)
    again = SAE.from_sae_lens(tmp_path)
    y = rows(31, seed=2)
    assert torch.equal(again.encode(y), model.encode(y))
    assert again.provenance["source"]["sae_lens"] == str(tmp_path)
    again.save_pretrained(tmp_path / "ours")
    assert torch.equal(SAE.from_pretrained(tmp_path / "ours").encode(y), model.encode(y))


def test_other_architectures_survive_saving(tmp_path):
    """JumpReLU's threshold stands for parameters that only its own class knows."""
    import sae_lens

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=27))
    sae.threshold.data = torch.linspace(0, 60, 27)
    model = SAE(sae)
    model.save_pretrained(tmp_path)
    y = rows(31, seed=2)
    assert torch.equal(SAE.from_pretrained(tmp_path).encode(y), sae.encode(y).detach())


@pytest.mark.parametrize("place", [("nowhere",), ("no-such-release", "no-such-id")])
def test_refuses_what_sae_lens_cannot_find(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="sae-lens"):
        SAE.from_sae_lens(*place)


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 34, "n_latents": 33}, {"rows": 0}])
def test_refuses_settings_that_cannot_be(x, options):
    with pytest.raises(InputError, match=r"k must be|rows"):
        SAE.fit(MemoryStore(x), **options)


def test_health_of_no_rows_is_refused_and_of_constant_rows_undefined(model):
    with pytest.raises(InputError, match="at least one row"):
        model.health(torch.zeros(0, D))
    assert math.isnan(model.health(torch.ones(3, D)).fvu)


def test_without_sae_lens_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(InputError, match="pip install sae-lens"):
        SAE.from_sae_lens(tmp_path)
