"""The sparse autoencoder: sae-lens's trainer on our rows, its files, its health on data with a known code."""

import json
import math
import sys
import warnings

import pytest
import torch

from glp_lens import provenance
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


def textbook(architecture, w, y, centred):
    """Latents in float64 from the formula of each architecture."""
    y = y - w["b_dec"] if centred else y
    if architecture == "gated":
        gate = y @ w["W_enc"] + w["b_gate"] > 0
        return gate * (y @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    pre = y @ w["W_enc"] + w["b_enc"]
    if architecture == "topk":
        top = pre.topk(ACTIVE, dim=1)
        return torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
    if architecture == "abstopk":
        top = pre.abs().topk(ACTIVE, dim=1).indices
        return torch.zeros_like(pre).scatter_(1, top, pre.gather(1, top))
    return pre * (pre > w["threshold"]) if architecture == "jumprelu" else pre.relu()


def published(architecture, *, centred=True, **options):
    """An autoencoder of sae-lens with random weights."""
    import sae_lens

    name = {"standard": "Standard", "gated": "Gated", "topk": "TopK", "abstopk": "AbsTopK", "jumprelu": "JumpReLU"}
    name = name[architecture]
    options |= {"k": ACTIVE} if "topk" in architecture else {}
    config = getattr(sae_lens, f"{name}SAEConfig")(d_in=D, d_sae=27, apply_b_dec_to_input=centred, **options)
    sae = getattr(sae_lens, f"{name}SAE")(config)
    generator = torch.Generator().manual_seed(4)
    for key, p in sae.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.3 if key == "r_mag" else 1)
    if architecture == "jumprelu":
        sae.threshold.data.abs_()
    return sae


ARCHITECTURES = ["standard", "topk", "abstopk", "jumprelu", "gated"]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_encodes_by_its_formula(architecture, centred, tmp_path):
    sae, y = published(architecture, centred=centred), rows(31, seed=2) / 30
    model = SAE(sae)
    w = {name: p.detach().double() for name, p in sae.named_parameters()}
    expected = textbook(architecture, w, y.double(), centred)
    assert 0 < (expected > 0).double().mean() < 1
    torch.testing.assert_close(model.encode(y).double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.encode(y), sae.encode(y).detach())
    model.save_pretrained(tmp_path)
    assert torch.equal(SAE.from_pretrained(tmp_path).encode(y), model.encode(y))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folded_scaling_gives_the_latents_of_training(architecture, centred):
    """Scaled rows through the weights of training are raw rows through the folded ones."""
    sae = published(architecture, centred=centred, normalize_activations="expected_average_only_in")
    y = rows(31, seed=2)
    w = {name: p.detach().double().clone() for name, p in sae.named_parameters()}
    with pytest.raises(InputError, match="expected_average_only_in"):
        SAE(sae)
    sae.fold_activation_norm_scaling_factor(1 / 30)
    model = SAE(sae)
    expected = textbook(architecture, w, y.double() / 30, centred)
    torch.testing.assert_close(model.encode(y).double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        model.reconstruct(y).double(), 30 * (expected @ w["W_dec"] + w["b_dec"]), rtol=1e-3, atol=0.1
    )


@pytest.mark.parametrize("way", ["layer_norm", "constant_norm_rescale"])
def test_normalisation_by_row_is_done_and_undone(way, tmp_path):
    sae, y = published("standard", normalize_activations=way), rows(31, seed=2)
    wide, w = y.double(), {name: p.detach().double() for name, p in sae.named_parameters()}
    if way == "layer_norm":
        shift, scale = wide.mean(1, keepdim=True), wide.std(1, keepdim=True)
    else:
        shift, scale = 0.0, wide.norm(dim=1, keepdim=True) / math.sqrt(D)
    expected = textbook("standard", w, (wide - shift) / scale, centred=True)
    model = SAE(sae)
    torch.testing.assert_close(model.encode(y).double(), expected, rtol=1e-3, atol=1e-3)
    decoded = (expected @ w["W_dec"] + w["b_dec"]) * scale + shift
    torch.testing.assert_close(model.reconstruct(y).double(), decoded, rtol=1e-3, atol=0.1)
    with pytest.raises(InputError, match="latents alone"):  # sae-lens would undo it with the last rows encoded
        model.decode(model.encode(y))
    model.save_pretrained(tmp_path)
    assert torch.equal(SAE.from_pretrained(tmp_path).reconstruct(y), model.reconstruct(y))


def test_rows_of_head_outputs_are_flat(tmp_path):
    sae = published("standard", reshape_activations="hook_z")
    y = rows(31, seed=2) / 30
    by_head = sae.encode(y.reshape(31, 4, D // 4)).detach()
    model = SAE(sae)
    torch.testing.assert_close(model.encode(y), by_head)
    assert model.reconstruct(y).shape == (31, D)
    model.save_pretrained(tmp_path)
    assert torch.equal(SAE.from_pretrained(tmp_path).reconstruct(y), model.reconstruct(y))


def saved(folder, architecture="standard", **metadata):
    """A folder of sae-lens with an autoencoder of these metadata."""
    sae = published(architecture)
    for key, value in metadata.items():
        setattr(sae.cfg.metadata, key, value)
    sae.save_model(folder)
    return folder


POINT = {"model_name": "gpt2-small", "hook_name": "blocks.8.hook_resid_pre"}


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty")
@pytest.mark.parametrize(
    ("asked", "processing"),
    [
        ({"center_writing_weights": True}, "centred"),
        ({"center_writing_weights": True, "fold_ln": True, "center_unembed": True}, "folded+centred"),
        ({"fold_ln": True, "center_writing_weights": False}, "folded"),
        ({"center_writing_weights": False}, "raw"),
        ({"center_unembed": True, "fold_value_biases": True, "dtype": "bfloat16"}, "raw"),  # neither moves the stream
        ({}, "raw"),
        (None, None),
    ],
)
def test_the_weights_that_its_language_model_was_opened_with_are_known(asked, processing, tmp_path):
    folder = saved(tmp_path / "sae", **POINT, model_from_pretrained_kwargs=asked)
    model = SAE.from_sae_lens(folder)
    SAE.from_sae_lens(folder).save_pretrained(tmp_path / "ours")
    for found in (model, SAE(model.sae), SAE.from_pretrained(tmp_path / "ours")):
        trained = provenance.trained_on(found)
        assert trained["model"].get("weight_processing") == processing
        for here in ("raw", "folded", "centred", "folded+centred"):
            at = {"hook": POINT["hook_name"], "d_in": D, "model": {"name": "gpt2", "weight_processing": here}}
            # Folded norms leave the residual stream as it is.
            same = processing is None or ("centred" in processing) == ("centred" in here)
            refused = [] if same else [f"with {processing} weights (here {here})"]
            assert provenance.mismatches(trained, at) == refused


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty")
def test_one_that_an_earlier_version_saved_learns_it(tmp_path, model):
    old = SAE.from_sae_lens(saved(tmp_path / "sae", **POINT, model_from_pretrained_kwargs={"fold_ln": True}))
    place = {"hook": "blocks.8.hook_resid_pre", "model": {"name": "gpt2-small"}, "d_in": D}
    for old.provenance in ({"source": {"sae_lens": "x"}, "store": place}, {}):
        again = SAE.from_pretrained(old.save_pretrained(tmp_path / "ours"))
        assert again.provenance["store"]["model"] == {"name": "gpt2-small", "weight_processing": "folded"}
        assert again.hook == place["hook"]
    own = SAE.from_pretrained(model.save_pretrained(tmp_path / "own"))
    assert own.provenance == json.loads(json.dumps(model.provenance))  # of its store alone


def test_the_advice_to_open_the_language_model_by_sae_lens_is_left_out_and_nothing_else(tmp_path):
    import sae_lens

    asked = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "prepend_bos": False}
    folder = saved(tmp_path / "sae", **POINT, **asked)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sae_lens.SAE.load_from_disk(folder)
        assert any("non-empty model_from_pretrained_kwargs" in str(each.message) for each in told)  # sae-lens's own
        told.clear()
        SAE.from_pretrained(SAE.from_sae_lens(folder).save_pretrained(tmp_path / "ours"))
    said = [str(each.message) for each in told]
    assert not any("from_pretrained_kwargs" in line for line in said)
    assert any("the autoencoder" in line for line in said)  # our own caution


def test_a_published_release_says_what_it_was_trained_on(monkeypatch):
    import sae_lens

    sae = published("jumprelu")
    about = {"context_size": 64, "prepend_bos": False, "seqpos_slice": [5, -5], "exclude_special_tokens": [0, 2],
             "dataset_path": "some/texts", "hook_head_index": None, "neuronpedia_id": "gpt2-small/8",
             "hook_name_out": POINT["hook_name"],
             "model_from_pretrained_kwargs": {"checkpoint_index": 0, "revision": None}}  # fmt: skip
    vars(sae.cfg.metadata).update(POINT, **about)
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda release, sae_id, device: sae)
    with pytest.warns(UserWarning, match="the autoencoder") as heard:
        model = SAE.from_sae_lens("release", "blocks.8")
    cautions = [
        "was trained on checkpoint_index 0 of its language model: open the model so",
        "was trained on texts without a BOS in front, here each has one",
    ]
    assert [str(w.message) for w in heard] == [f"the autoencoder blocks.8 {caution}" for caution in cautions]
    store = model.provenance["store"]
    assert store["model"] == {"name": "gpt2-small (checkpoint_index 0)", "weight_processing": "raw"}
    assert (store["hook"], store["context"], store["corpus"]) == ("blocks.8.hook_resid_pre", 64, {"name": "some/texts"})
    assert (store["prepend_bos"], store["positions"], store["excluded_tokens"]) == (False, [5, -5], [0, 2])
    here = {"hook": POINT["hook_name"], "model": {"name": "openai-community/gpt2", "weight_processing": "raw"}}
    assert provenance.check_models({"sae": model}, here) == [f"sae {caution}" for caution in cautions]
    other = {"model": {"name": "openai-community/gpt2 (revision 607a30d)"}}
    assert "here revision 607a30d" in provenance.mismatches(provenance.trained_on(model), other)[0]


@pytest.mark.parametrize("d_out", [D, 2 * D])
@pytest.mark.parametrize("kind", ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"])
def test_a_transcoder_is_no_autoencoder(kind, d_out, tmp_path):
    import sae_lens

    cfg = getattr(sae_lens, f"{kind}Config")(d_in=D, d_sae=27, d_out=d_out, apply_b_dec_to_input=False)
    cfg.metadata.hook_name, cfg.metadata.hook_name_out = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    getattr(sae_lens, kind)(cfg).save_model(tmp_path)
    with pytest.raises(InputError, match=r"transcoder, from blocks\.1\.ln2.* to blocks\.1\.hook_mlp_out") as error:
        SAE.from_sae_lens(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty")
@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}, "transcoder"),
        ({"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 0}, "head 0 of blocks.1.attn.hook_z only"),
        ({"hook_name": "blocks.1.attn.hook_v", "model_from_pretrained_kwargs": {"fold_value_biases": True}}, "fold_v"),
    ],
)
def test_what_the_metadata_ask_for_and_cannot_be_done_is_refused(metadata, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        SAE.from_sae_lens(saved(tmp_path, **metadata))
    assert "\n" not in str(error.value)


def test_what_does_not_map_row_by_row_is_refused():
    import sae_lens

    temporal = sae_lens.TemporalSAEConfig(d_in=D, d_sae=16, n_heads=2, bottleneck_factor=4, kval_topk=3)
    batch = sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=27, k=2)
    for sae in (sae_lens.TemporalSAE(temporal), sae_lens.BatchTopKTrainingSAE(batch)):
        with pytest.raises(InputError, match=f"of kind '{sae.cfg.architecture()}' does not map each row by itself"):
            SAE(sae)
    pursuit = SAE(sae_lens.MatchingPursuitSAE(sae_lens.MatchingPursuitSAEConfig(d_in=D, d_sae=27, max_iterations=4)))
    y = rows(31, seed=2) / 30
    one_by_one = torch.cat([pursuit.encode(row[None]) for row in y])
    torch.testing.assert_close(pursuit.encode(y), one_by_one, rtol=1e-3, atol=1e-3)


def test_an_architecture_of_ones_own_is_taken_if_it_maps_row_by_row():
    import sae_lens

    class Config(sae_lens.StandardSAEConfig):
        @classmethod
        def architecture(cls):
            return "mine"

    sae, y = sae_lens.StandardSAE(Config(d_in=D, d_sae=27)), rows(31)
    assert torch.equal(SAE(sae).encode(y), sae.encode(y).detach())
    sae.encode = lambda x: (x @ sae.W_enc).softmax(0)
    with pytest.raises(InputError, match="'mine'"):
        SAE(sae)


def test_reconstructs_also_where_sae_lens_would_add_its_error_back():
    sae, y = published("standard"), rows(31, seed=2) / 30
    expected = SAE(sae).reconstruct(y)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    assert torch.equal(SAE(sae).reconstruct(y), expected)
    assert not torch.allclose(expected, y, atol=0.1)


def test_reconstructs_from_the_largest_latents(model, x):
    latents = model.encode(x[:50])
    for k in (1, 2):
        kept = latents.clone()
        kept[torch.arange(50)[:, None], latents.argsort(dim=1)[:, :-k]] = 0
        torch.testing.assert_close(model.reconstruct(x[:50], k=k), model.sae.decode(kept).detach())
    torch.testing.assert_close(model.reconstruct(x[:50], k=model.n_features), model.reconstruct(x[:50]))
    for k in (0, model.n_features + 1):
        with pytest.raises(InputError, match="k must be a number of latents"):
            model.reconstruct(x[:5], k=k)


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_an_autoencoder_in_another_format_is_copied_to_float32(dtype, tmp_path):
    own = published("standard").to(getattr(torch, dtype))
    model = SAE(own)
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(0))
    assert model.reconstruct(x).dtype == model.encode(x).dtype == torch.float32
    again = SAE.from_pretrained(model.save_pretrained(tmp_path / "sae"))
    assert again.sae.W_dec.dtype == torch.float32
    assert own.W_dec.dtype == getattr(torch, dtype)


def test_the_callers_own_autoencoder_keeps_reshaping_heads():
    import sae_lens

    own = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D, d_sae=9, reshape_activations="hook_z"))
    heads = torch.randn(2, 3, 4, D // 4)
    want = own(heads)
    flat = SAE(own).reconstruct(heads.reshape(6, D))
    torch.testing.assert_close(own(heads), want)
    torch.testing.assert_close(flat, want.reshape(6, D))


def test_damaged_metadata_are_one_line(tmp_path):
    with pytest.raises(InputError, match="model_from_pretrained_kwargs are damaged"):
        SAE.from_sae_lens(saved(tmp_path / "sae", **POINT, model_from_pretrained_kwargs=["centre"]))
