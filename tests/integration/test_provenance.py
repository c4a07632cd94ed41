"""Models are used where they were trained: in hooks and suites (steering's are in its own tests), on both classes."""

import copy

import pytest
import torch

import glp_lens as gl
from glp_lens import lm, provenance
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals import fidelity, probing
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing.tasks import build
from glp_lens.interface import Featurizer, Projector, Reconstructor
from glp_lens.lm import description
from tests.conftest import tiny_texts

HOOK, OTHER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"


class Identity(ActivationModel, Featurizer, Projector, Reconstructor):
    kind, d_in, n_features, _config, _tensors, _restore = "identity", 24, 24, None, None, None

    def __init__(self, store):
        self.provenance = {"store": store}
        self.d_in = store["d_in"]

    def encode(self, x, *, noise=None, generator=None):
        return x

    project = reconstruct = encode


def test_an_identity_that_is_known_is_not_computed_again(tiny_bridge, tmp_path, monkeypatch):
    identity, here = lm.identity(tiny_bridge), provenance.here(tiny_bridge, HOOK)
    hashed, real = [], description.weights_hash
    monkeypatch.setattr(description, "weights_hash", lambda model: hashed.append(model) or real(model))
    assert provenance.here(tiny_bridge, HOOK, identity) == here
    options = {"context": 24, "massive": None, "identity": identity}
    store = gl.collect(tiny_bridge, tiny_texts(9), HOOK, tmp_path / "acts", **options)
    assert store.provenance()["weights"] == here["weights"]
    tasks = [build(f"t{i}", tiny_texts(40, seed=i), [0, 1] * 20, range(30), range(30, 40)) for i in range(2)]
    probing.collect(tiny_bridge, tasks, [HOOK, OTHER], context=24, cache=tmp_path / "cache")
    assert len(hashed) == 1


def differing(model):
    """A model trained on the very activations of `model`, and how it differs in each of the others."""
    own = provenance.here(model, HOOK)
    about = own["model"]
    return own, {
        "at blocks.2": {**own, "hook": OTHER},
        "centred weights": {**own, "model": {**about, "weight_processing": "centred"}},
        "other weights": {**own, "weights": "0" * 16},
        "on meta-llama/x": {**own, "weights": None, "model": {**about, "name": "meta-llama/x"}},
        "width 23": {**own, "d_in": 23},
    }


def run_probing(model, entry, **options):
    task = build("t", tiny_texts(40), [0, 1] * 20, range(30), range(30, 40))
    data = probing.ProbingData([task], probing.collect(model, [task], HOOK))
    return probing.run([entry], data, probing.ProbingSettings(resamples=20), **options)


def run_fidelity(model, entry, **options):
    data = fidelity.FidelityData(model, HOOK, tiny_texts(3), torch.zeros(entry.model.d_in))
    return fidelity.run([entry], data, **options)


@pytest.mark.parametrize("suite", [run_probing, run_fidelity])
def test_suites_refuse_a_model_of_other_activations_unless_told(tiny_bridge, suite):
    own, others = differing(tiny_bridge)
    assert suite(tiny_bridge, Entry("own", Identity(own))).failures == []
    for words, store in others.items():
        entry = Entry("x", Identity(store))
        with pytest.raises(InputError, match=f"x was trained .*{words}") as error:
            suite(tiny_bridge, entry)
        assert "\n" not in str(error.value)
        if words == "width 23":
            with pytest.raises(InputError, match=words):
                suite(tiny_bridge, entry, allow_mismatch=True)
        else:
            assert words in suite(tiny_bridge, entry, allow_mismatch=True).failures[0]


def test_a_projection_hook_with_its_model_is_checked_at_once(tiny_model):
    own, others = differing(tiny_model)
    assert Identity(own).projection_hook(model=tiny_model)[0] == HOOK
    for words, store in others.items():
        with pytest.raises(InputError, match=words):
            Identity(store).projection_hook(HOOK, model=tiny_model)
    foreign = Identity(others["other weights"])
    assert foreign.projection_hook(model=tiny_model, allow_mismatch=True)[0] == HOOK
    with pytest.raises(InputError, match="did you mean"):
        Identity(own).projection_hook("blocks.1.hook_resid_pots", model=tiny_model, allow_mismatch=True)


def test_a_hook_knows_its_point_under_the_names_of_both_classes(tiny_model):
    tokens = torch.tensor([[0, 5, 6, 7]])
    model = Identity(provenance.here(tiny_model, HOOK))
    names = [HOOK, "blocks.1.hook_out"] if type(tiny_model).__name__ == "TransformerBridge" else [HOOK]
    plain = tiny_model(tokens)
    for name in names:
        assert torch.allclose(tiny_model.run_with_hooks(tokens, fwd_hooks=[model.projection_hook(name)]), plain)
    _, fn = model.projection_hook()
    for wrong in (OTHER, "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"):
        with pytest.raises(InputError, match=r"trained at blocks\.1\.hook_resid_post, here is blocks\."):
            tiny_model.run_with_hooks(tokens, fwd_hooks=[(wrong, fn)])
    other = model.projection_hook(OTHER, allow_mismatch=True)
    assert torch.allclose(tiny_model.run_with_hooks(tokens, fwd_hooks=[other]), plain)


def test_models_move_between_classes_and_number_formats_but_not_weights(tiny_bridge, tiny_hooked, tiny_folder):
    hooked = provenance.here(tiny_hooked, HOOK)
    half = provenance.here(lm.open_model(str(tiny_folder), dtype="bfloat16"), HOOK)
    for a in (hooked, half):
        assert provenance.mismatches(a, provenance.here(tiny_bridge, HOOK)) == []
    tuned = copy.deepcopy(tiny_hooked)
    tuned.W_E.data[3] += 0.1
    assert "other weights" in provenance.mismatches(hooked, provenance.here(tuned, HOOK))[0]
    folded = copy.deepcopy(tiny_hooked)
    folded.process_weights_(fold_ln=True)
    assert provenance.mismatches(hooked, provenance.here(folded, HOOK)) == []  # the stream is the same
    inside = "blocks.1.ln1.hook_normalized"
    found = provenance.mismatches(provenance.here(tiny_hooked, inside), provenance.here(folded, inside))
    assert "with raw weights (here folded" in found[0]


def test_what_was_collected_and_trained_is_known_and_kept(tiny_bridge, tmp_path):
    store = gl.collect(tiny_bridge, tiny_texts(60), hooks=[HOOK], out=tmp_path / "acts")
    model = gl.load(gl.PCA.fit(store, max_rows=301).save_pretrained(tmp_path / "pca"))
    assert model.provenance["store"] == store.provenance()
    training = model.provenance["training"]
    assert (training["rows_seen"], training["rows_distinct"], training["seed"]) == (301, 301, 0)
    assert provenance.mismatches(provenance.trained_on(model), provenance.here(tiny_bridge, HOOK)) == []
    assert "PCA trained on 301 rows" in provenance.describe(model)
    assert HOOK in provenance.describe(model)


def test_a_model_is_finetuned_at_its_hook_point_under_another_name(tiny_bridge, tmp_path):
    small = {"context": 16, "massive": None, "max_tokens": 300}
    names = ("blocks.1.mlp.hook_out", "blocks.1.hook_mlp_out")
    one, other = (gl.collect(tiny_bridge, tiny_texts(40), n, tmp_path / n, **small) for n in names)
    glp = gl.GLP.fit(one, gl.recipe("fast", rows=512, batch_size=64), d_model=16, d_mlp=16, n_layers=1)
    assert glp.finetune(other, gl.recipe("fast", rows=128, batch_size=64)).hook == names[1]


def test_stores_of_an_earlier_version_go_on_and_together_with_new_ones(tiny_bridge, tmp_path):
    import json

    hooks = [HOOK, OTHER]
    small = {"context": 16, "massive": None, "shard_tokens": 160}
    stores = gl.collect(tiny_bridge, tiny_texts(40), hooks, tmp_path / "acts", **small)
    manifest = stores[HOOK].path / "manifest.json"
    about = json.loads(manifest.read_text())
    del about["glp_lens"], about["source"]["hook_names"], about["source"]["model"]["blocks"]
    manifest.write_text(json.dumps(about))
    again = gl.collect(tiny_bridge, tiny_texts(40), hooks, tmp_path / "acts", **small)
    recipe = gl.recipe("fast", rows=128, batch_size=64)
    assert gl.GLP.fit(again, recipe, d_model=16, d_mlp=16, n_layers=1).layers == [1, 2]
