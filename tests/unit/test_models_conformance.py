"""Every kind of model, through the shared conformance checks; and the registry that loads them."""

import json

import pytest
import torch

from glp_lens.activations.store import ActivationStore
from glp_lens.activations.writer import write_store
from glp_lens.artifacts import CONFIG, ActivationModel
from glp_lens.errors import InputError
from glp_lens.interface import Featurizer
from glp_lens.models import KINDS, load, model_class
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.glp import GLP
from glp_lens.models.pca import PCA
from glp_lens.models.random_features import RandomFeatures
from glp_lens.models.raw import Raw
from glp_lens.models.sae import SAE
from glp_lens.training.config import TrainConfig, recipe
from tests.conformance import CHECKS, MODES, check_model

D_IN = 14


def rows(n, seed=0):
    """Correlated rows, off centre, with scales from 0.5 to 20."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(99)) * torch.linspace(0.5, 5, D_IN)
    return torch.randn(n, D_IN, generator=generator) @ mixing + torch.linspace(-3, 9, D_IN)


HELD_OUT = rows(9, seed=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(
        tmp_path_factory.mktemp("stores") / "store",
        rows(613),
        hook="blocks.1.hook_resid_post",
        max_norm=1e6,
        shard_rows=250,
    )


FITS = {
    "glp": lambda store: GLP.fit(store, TrainConfig(batch_size=32, rows=96), d_model=10, d_mlp=22, n_layers=3),
    "sae": lambda store: SAE.fit(store, n_latents=33, k=5, rows=1500, batch_size=50),
    "pca": lambda store: PCA.fit(store, n_components=9),
    "gaussian": Gaussian.fit,
    "gaussian-diagonal": lambda store: Gaussian.fit(store, diagonal=True),
    "raw": lambda store: Raw.fit(store, n_rows=101),
    "random": lambda store: RandomFeatures.fit(store, n_features=37),
}
OTHER_FITS = {
    "glp-float32": lambda store: GLP.fit(
        store,
        recipe("fast", rows=96, batch_size=32, autocast=False, ema=0.9, optimizer="muon"),
        d_model=10,
        d_mlp=22,
        validation=HELD_OUT,
    ),
    "glp-finetuned": lambda store: FITS["glp"](store).finetune(store, recipe("fast", rows=96, batch_size=32)),
    "sae-bfloat16": lambda store: SAE.fit(store, n_latents=33, k=5, rows=500, batch_size=50, autocast=True),
}
"""Further trainings; a prior's has an autocast of its own by default."""
CAPABILITIES = {"random": 1}
"""At least how many a kind declares, where that is not `4`."""


@pytest.fixture(scope="module", params=FITS)
def model(request, store):
    return FITS[request.param](store)


def test_keeps_the_contract(model, tmp_path):
    check_model(model, rows(17, seed=1), tmp_path / "model")


def test_knows_where_it_comes_from(model, store):
    assert model.provenance["store"] == store.provenance()
    assert model.hook == store.hook
    assert model.max_norm == 1e6
    training = model.provenance["training"]
    assert training["rows_seen"] >= training["rows_distinct"] > 0
    assert training["rows_distinct"] <= len(store)
    assert {"parameters", "flops", "seconds", "seed"} <= set(training)


def test_can_be_featurized_or_projected(model):
    """The checks apply only to declared capabilities, so make sure that they are declared."""
    assert isinstance(model, ActivationModel)
    found = sum(isinstance(model, capability) for capability in CHECKS)
    assert found >= CAPABILITIES.get(model.kind, 4)


@pytest.mark.parametrize("kind", FITS)
def test_the_same_seed_gives_the_same_model_and_leaves_the_global_seed_alone(kind, store):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = FITS[kind](store)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    second = FITS[kind](store)
    for name, tensor in first._tensors().items():
        assert torch.equal(tensor, second._tensors()[name]), name


@pytest.mark.parametrize("kind", FITS | OTHER_FITS)
def test_fit_does_not_depend_on_the_callers_modes(kind, store):
    fit = (FITS | OTHER_FITS)[kind]
    expected = fit(store)._tensors()
    for name, mode in MODES.items():
        with mode():
            found = fit(ActivationStore.open(store.path))._tensors()
        for key, tensor in found.items():
            assert tensor.dtype == torch.float32, (name, key)
            assert torch.equal(tensor, expected[key]), (name, key)
            assert not tensor.is_inference(), (name, key)


def test_the_model_of_a_user_need_not_know_the_callers_modes():
    class Linear(Featurizer):
        n_features = 3

        def encode(self, x, *, noise=None, generator=None):
            return x @ torch.ones(D_IN, 3, dtype=torch.float32)

    x = rows(7)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = Linear().encode(x)
    assert found.dtype == torch.float32
    assert not found.is_inference()


def test_registry_names_every_kind():
    for kind in KINDS:
        assert model_class(kind).kind == kind


@pytest.mark.parametrize("config", [{"kind": "vae"}, {}, {"kind": None}])
def test_load_refuses_unknown_kinds(config, tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(InputError, match="kind"):
        load(tmp_path)


def test_load_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="not found"):
        load(tmp_path / "nothing")


def test_load_refuses_weights_that_do_not_fit(store, tmp_path):
    PCA.fit(store).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["glp_lens"]  # as of an earlier version, or edited on purpose
    (tmp_path / CONFIG).write_text(json.dumps(config | {"kind": "gaussian", "model": {"diagonal": False}}))
    with pytest.raises(InputError, match="do not fit"):
        load(tmp_path)


def test_load_reads_the_released_format(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "final.safetensors").write_text("")
    seen = []
    monkeypatch.setattr(GLP, "from_pretrained", classmethod(lambda cls, folder, **_: seen.append(folder)))
    load(tmp_path)
    assert seen == [tmp_path]


def test_load_opens_what_sae_lens_saved(store, tmp_path):
    model = SAE.fit(store, n_latents=33, k=5, rows=500, batch_size=50)
    model.sae.save_model(tmp_path)
    again = load(tmp_path)
    assert isinstance(again, SAE)
    assert torch.equal(again.encode(rows(7)), model.encode(rows(7)))
    (tmp_path / "sae_weights.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="sae-lens"):
        load(tmp_path)


def test_load_opens_the_releases_that_sae_lens_knows(monkeypatch):
    import sae_lens

    published = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D_IN, d_sae=33))
    published.cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    asked = []

    def from_pretrained(release, sae_id, device):
        asked.append((release, sae_id))
        if release == "none":
            raise ConnectionError("no network\nat all")
        return published

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    model = load("sae-lens:some-release:layer_20/width_16k:canonical")
    assert asked == [("some-release", "layer_20/width_16k:canonical")]
    assert torch.equal(model.encode(rows(7)), published.encode(rows(7)).detach())
    assert model.hook == "blocks.2.hook_resid_pre"
    with pytest.raises(InputError, match="no network at all"):
        load("sae-lens:none:id")
    for name in ("sae-lens:", "sae-lens:release", "sae-lens::id"):
        with pytest.raises(InputError, match="expected sae-lens:RELEASE:SAE_ID"):
            load(name)
    with pytest.raises(InputError, match="revision"):
        load("sae-lens:release:id", revision="main")
