"""When activations are those that a model was trained on: a table of cases, and the line on where it came from."""

import pytest
import torch

from glp_lens import hooks, provenance
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.interface import Projector
from glp_lens.models.glp import GLP

POINT = "blocks.3.hook_resid_post"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL = {"name": f"{HUB} (revision 12fd25f)", "class": "TransformerBridge", "dtype": "bfloat16", "n_layers": 30,
         "d_model": 576, "weight_processing": "raw"}  # fmt: skip
STORE = {"hook": POINT, "d_in": 576, "model": MODEL, "weights": "aa"}


def changed(weights="aa", hook=POINT, d_in=576, **model):
    return {"hook": hook, "d_in": d_in, "model": {**MODEL, **model}, "weights": weights}


@pytest.mark.parametrize(
    "found",
    [
        changed(),
        changed(name=f"{HUB} (revision 99)"),  # another commit of the repository, the same weights in it
        changed(name="/data/SmolLM2-135M-Instruct/"),
        changed("bb", name="/data/SmolLM2-135M-Instruct", dtype="float32"),
        changed("bb", name="SmolLM2-135M-Instruct", **{"class": "HookedTransformer"}),
        changed("bb", name=f"{HUB} (local folder)", dtype="float32"),
        changed("bb", name="unnamed", dtype="float32"),
        changed(hook="blocks.3.hook_out"),
        changed("bb", weight_processing="folded"),
        changed(None, None, None, name=None, weight_processing=None),
        {},
        {"hook": POINT, "model": {}},
    ],
)
def test_the_same_activations_and_unknown_ones_are_accepted_either_way(found):
    assert provenance.mismatches(STORE, found) == provenance.mismatches(found, STORE) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (changed(hook="blocks.4.hook_resid_post"), f"at {POINT} (here blocks.4.hook_resid_post)"),
        (changed(hook="blocks.3.hook_resid_pre"), f"at {POINT} (here blocks.3.hook_resid_pre)"),
        (changed(hook="blocks.3.hook_in"), f"at {POINT} (here blocks.3.hook_in)"),
        (changed(d_in=768), "on width 576 (here 768)"),
        (changed("bb", weight_processing="centred"), "with raw weights (here centred)"),
        (changed("bb"), "other weights"),
        (changed(name="meta-llama/Llama-3.2-1B"), None),  # the hash says that it is the same after all
        (changed("bb", name="meta-llama/Llama-3.2-1B"), "here meta-llama/Llama-3.2-1B"),
        (changed("bb", name="/data/other", dtype="float32"), "here /data/other"),
        (changed("bb", name="SmolLM2-135M-Instruct", dtype="float32", n_layers=12), "30 layers (here 12)"),
        (changed("bb", name=f"{HUB} (revision 99)", dtype="float32"), "here revision 99"),
        (changed("bb", name=f"{HUB} (packaged GGUF x.Q4_1.gguf)", dtype="float32"), "quantised weights are other"),
    ],
)
def test_each_difference_is_named(found, words):
    phrases = provenance.mismatches(STORE, found)
    assert len(phrases) == (words is not None)
    assert words is None or words in phrases[0]


def test_the_name_of_a_published_sae_is_that_of_the_model():
    sae = {"hook": POINT, "model": {"name": "gpt2-small"}}
    assert provenance.mismatches(sae, changed(name="openai-community/gpt2 (revision 607a30d)")) == []
    assert provenance.mismatches(sae, changed(name="gpt2-medium")) == ["on gpt2-small (here gpt2-medium)"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("blocks.1.hook_resid_post", "blocks.1.hook_out", True),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_in", True),
        ("blocks.1.hook_out", "blocks.2.hook_out", False),
        # One point in Llama, two in Gemma 2: only a model can tell.
        ("blocks.1.hook_attn_out", "blocks.1.attn.hook_out", False),
        ("blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in", False),
        ("blocks.1.hook_resid_post", "blocks.1.ln1.hook_out", False),
        ("hook_embed", "blocks.0.hook_resid_post", False),
    ],
)
def test_names_are_one_hook_point_only_where_that_is_so_in_every_model(one, other, same):
    assert hooks.same_point(one, other) is hooks.same_point(other, one) is same


def test_names_found_in_a_model_make_one_hook_point_there():
    llama = {**STORE, "hook": "blocks.3.mlp.hook_out", "hook_names": ["blocks.3.hook_mlp_out", "blocks.3.mlp.hook_out"]}
    gemma = {**STORE, "hook": "blocks.3.mlp.hook_out", "hook_names": ["blocks.3.mlp.hook_out"]}
    hooked = {**STORE, "hook": "blocks.3.hook_mlp_out", "hook_names": ["blocks.3.hook_mlp_out"]}
    assert provenance.mismatches(llama, hooked) == provenance.mismatches(hooked, llama) == []
    assert "here blocks.3.mlp.hook_out" in provenance.mismatches(hooked, gemma)[0]


def test_folded_norms_change_other_points_than_the_residual_stream():
    def at(hook, processing):
        return {"hook": hook, "model": {**MODEL, "weight_processing": processing}}

    assert provenance.mismatches(at(POINT, "centred"), at(POINT, "folded+centred")) == []
    assert provenance.mismatches(at(POINT, "folded"), at(POINT, "folded+centred")) != []
    inside = "blocks.3.attn.hook_z"
    assert "with raw weights (here folded)" in provenance.mismatches(at(inside, "raw"), at(inside, "folded"))[0]


def test_a_check_refuses_in_one_line_and_another_width_always():
    found = changed(hook="blocks.4.hook_resid_post", weight_processing="folded+centred")
    with pytest.raises(InputError, match=r"glp was trained at .*, with raw weights .*--allow-mismatch") as error:
        provenance.check("glp was trained", STORE, found)
    assert "\n" not in str(error.value)
    assert "accepted" in provenance.check("glp was trained", STORE, found, allow_mismatch=True)
    assert provenance.check("glp was trained", STORE, changed()) == ""
    with pytest.raises(InputError, match=r"width 576 \(here 24\)") as error:
        provenance.check("glp was trained", STORE, changed(d_in=24), allow_mismatch=True)
    assert "allow" not in str(error.value)


class Double(ActivationModel, Projector):
    kind, d_in, _config, _tensors, _restore = "double", 5, None, None, None

    def __init__(self, provenance):
        self.provenance = provenance

    def project(self, x, *, noise=None, generator=None):
        return 2 * x


def test_a_model_says_in_a_line_what_it_saw():
    store = {**STORE, "corpus": {"name": "sae-probes texts (train)"}}
    model = Double({"store": store, "training": {"rows_seen": 400_000, "rows_distinct": 150_000}})
    assert provenance.describe(model) == (
        f"Double trained on 150,000 rows of width 5 of sae-probes texts (train), {MODEL['name']} {POINT}, raw weights"
    )
    assert provenance.describe(Double({})) == "Double trained on rows of width 5"


def test_a_hook_runs_at_its_own_point_only():
    class Point:
        name = "blocks.2.hook_resid_post"

    x = torch.ones(2, 3, 5)
    model = Double({"store": {"hook": "blocks.1.hook_resid_post"}})
    for fn in (model.projection_hook()[1], hooks.steer(torch.ones(5), 1.0, model)):
        with pytest.raises(InputError, match=r"trained at blocks\.1\..* here is blocks\.2\..*allow_mismatch"):
            fn(x, hook=Point)
    with pytest.raises(InputError, match="allow_mismatch"):
        model.projection_hook(Point.name)
    name, fn = model.projection_hook(Point.name, allow_mismatch=True)
    assert name == Point.name
    assert torch.equal(fn(x, hook=Point)[:, -1], 2 * x[:, -1])
    Point.name = "blocks.1.hook_out"
    assert torch.equal(model.projection_hook()[1](x, hook=Point)[:, -1], 2 * x[:, -1])


def test_a_released_prior_keeps_what_its_config_tells(tmp_path):
    from pathlib import Path

    released = GLP.from_pretrained(Path(__file__).parents[1] / "golden" / "single_layer")
    again = GLP.from_pretrained(released.save_pretrained(tmp_path / "glp"))
    assert again.provenance == released.provenance
    assert again.provenance["store"]["model"]["weight_processing"] == "raw"
    assert "raw weights" in provenance.describe(again)
