"""Our sparse probes against sae-probes' own harness, and our models inside it and inside SAEBench's."""

import copy
import json
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch
from scipy.stats import kstest

from glp_lens import corpus
from glp_lens.errors import InputError
from glp_lens.evals.probing import build, collect, sparse
from glp_lens.evals.probing.peers import as_sae, row_noise
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.glp import GLP
from glp_lens.models.pca import PCA
from glp_lens.models.raw import Raw
from glp_lens.models.sae import SAE
from tests.conftest import tiny_texts
from tests.unit.memory_store import MemoryStore

HOOK = "blocks.2.hook_resid_post"
HEADS = "blocks.2.attn.hook_z"
TASKS = ("95_toxic_is", "41_truthqa_tf")
KS = (1, 2, 16)
BATCH = 128
"""Rows that sae-probes encodes at once: the last digits of a matrix product depend on it."""


@pytest.fixture(scope="module")
def data(tiny_hooked):
    """Activations of every row of the data sets, and labels."""
    found = {}
    for name in TASKS:
        table = corpus.read_dataset(name)
        labels = np.unique(table["target"].to_numpy(), return_inverse=True)[1]
        task = build(name, table["prompt"].astype(str).tolist(), labels, range(len(table)), [])
        found[name] = collect(tiny_hooked, [task], HOOK, context=12).rows(name).acts, labels
        assert len(found[name][0]) == len(table)
    return found


@pytest.fixture(scope="module")
def models(data):
    import sae_lens

    x = data[TASKS[0]][0]
    generator = torch.Generator().manual_seed(0)
    sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=24, d_sae=53))
    denoiser = Denoiser(DenoiserConfig(24, 11, 17, 2))
    with torch.no_grad():
        for parameter in [*sae.parameters(), *denoiser.parameters()]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return {
        "sae": SAE(sae),
        "glp": GLP(denoiser, x.mean(0), x.var(0, unbiased=False)),
        "pca": PCA.fit(MemoryStore(x), n_components=19),
    }


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """sae-probes' harness on an autoencoder: its numbers by task and k."""
    from sae_probes import run_sae_evals

    cache = tmp_path_factory.mktemp("activations")
    (cache / "model_activations_tiny").mkdir()
    for name, (x, _) in data.items():
        torch.save(x, cache / "model_activations_tiny" / f"{name}_{HOOK}.pt")
        torch.save(x.reshape(-1, 4, 6), cache / "model_activations_tiny" / f"{name}_{HEADS}.pt")

    def evaluate(peer, ks, hook=HOOK, **options):
        out = tmp_path_factory.mktemp("results")
        run_sae_evals(
            peer, "tiny", hook, "l2", "normal", ks=list(ks), results_path=out, model_cache_path=cache,
            datasets=list(TASKS), device="cpu", **options,
        )  # fmt: skip
        files = {name: out / "sae_probes_tiny" / "normal_setting" / f"{name}_{hook}_l2.json" for name in TASKS}
        return {(name, line["k"]): line for name, file in files.items() for line in json.loads(file.read_text())}

    return evaluate


def ours(data, encode, ks, **options):
    """Our numbers in the words of sae-probes."""
    found = {}
    for name, (x, y) in data.items():
        train, test = corpus.official_split(y)
        parts = [torch.cat([encode(part) for part in x[rows].split(BATCH)]).detach().numpy() for rows in (train, test)]
        for probe in sparse.fit(parts[0], y[train], parts[1], y[test], ks, solver="lbfgs", **options):
            found[name, probe.n_features] = {
                "test_auc": probe.auc,
                "test_acc": probe.accuracy,
                "test_f1": probe.f1,
                "val_auc": probe.auc_validation,
                "indices": probe.features.tolist(),
            }
    return found


def assert_same(theirs, found):
    assert theirs.keys() == found.keys()
    for key, line in found.items():
        assert {name: theirs[key][name] for name in line} == line, key


@pytest.mark.parametrize("normalize", [True, False])
def test_the_numbers_are_those_of_sae_probes_to_the_last_digit(models, data, run, normalize):
    options = {} if normalize else {"mean_diff_normalization": "none"}
    theirs = run(models["sae"].sae, (*KS, 53), **options)
    assert_same(theirs, ours(data, models["sae"].encode, (*KS, "dense"), normalize=normalize))
    assert len({line["test_auc"] for line in theirs.values()}) > 5


@pytest.mark.parametrize("n", [3, 11, 90, 131])
def test_few_rows_are_fitted_as_sae_probes_fits_them(n):
    from sae_probes.utils_training import find_best_reg

    rng = np.random.default_rng(n)
    y = np.arange(n + 60) % 2
    x = (rng.standard_normal((n + 60, 5)) + 0.4 * y[:, None]).astype(np.float32)
    (probe,) = sparse.fit(x[:n], y[:n], x[n:], y[n:], ["dense"], solver="lbfgs")
    rows, labels = torch.from_numpy(x[:, probe.features.copy()]), torch.from_numpy(y)
    theirs = find_best_reg(rows[:n], labels[:n], rows[n:], labels[n:], seed=42).metrics
    assert (theirs.test_auc, theirs.test_acc, theirs.test_f1) == (probe.auc, probe.accuracy, probe.f1)
    assert theirs.val_auc == probe.auc_validation


@pytest.mark.parametrize("kind", ["sae", "glp", "pca"])
def test_our_models_run_in_the_harness_of_sae_probes(models, data, run, kind):
    options = {"sigma": 0.3} if kind == "glp" else {}
    peer = as_sae(models[kind], hook_name=HOOK, model_name="tiny", **options)
    assert_same(run(peer, KS), ours(data, peer.encode, KS))


@pytest.mark.parametrize("kind", ["sae", "pca"])
def test_the_outputs_of_heads_may_come_head_by_head(models, data, run, kind):
    model = models[kind]
    if kind == "sae":
        own = copy.deepcopy(model.sae)
        own.cfg.reshape_activations, own.cfg.metadata.hook_name = "hook_z", HEADS
        own.turn_on_forward_pass_hook_z_reshaping()
        model = SAE(own)
    peer = as_sae(model, hook_name=HEADS, model_name="tiny")
    assert_same(run(peer, KS, hook=HEADS), ours(data, models[kind].encode, KS))
    flat = data[TASKS[0]][0][:42]
    with torch.no_grad():
        features = peer.encode(flat.reshape(7, 6, 4, 6))
    torch.testing.assert_close(features.flatten(0, 1), models[kind].encode(flat))
    assert torch.equal(model.encode(flat), models[kind].encode(flat))  # which goes on with flat rows
    if kind == "sae":
        decoded = peer.decode(features).detach()
        assert decoded.shape == (7, 6, 4, 6)
        torch.testing.assert_close(decoded.reshape(42, 24), model.reconstruct(flat))


def test_an_autoencoder_keeps_what_its_metadata_say(models):
    own = copy.deepcopy(models["sae"].sae)
    said = {"hook_name": HOOK, "model_name": "gpt2-small", "prepend_bos": False, "context_size": 64,
            "neuronpedia_id": "x", "seqpos_slice": [1, None],
            "model_from_pretrained_kwargs": {"center_writing_weights": True, "dtype": "float32"}}  # fmt: skip
    vars(own.cfg.metadata).update(said)
    with pytest.warns(UserWarning, match="opened with center_writing_weights, and harnesses open it without"):
        metadata = as_sae(SAE(own)).cfg.metadata
    assert {key: metadata[key] for key in said} == said
    assert vars(own.cfg.metadata).items() >= said.items()
    silent = as_sae(models["sae"], hook_name=HOOK, model_name="tiny").cfg.metadata
    assert (silent.prepend_bos, silent.model_from_pretrained_kwargs) == (True, {})


def test_a_peer_says_which_weights_its_model_was_trained_on(data):
    raw = Raw(data[TASKS[0]][0])
    raw.provenance = {"store": {"hook": HOOK, "model": {"name": "tiny", "weight_processing": "folded+centred"}}}
    with pytest.warns(UserWarning, match="opened with fold_ln, center_writing_weights"):
        cfg = as_sae(raw).cfg
    assert cfg.metadata.model_from_pretrained_kwargs == {"fold_ln": True, "center_writing_weights": True}


@pytest.fixture
def bench(tiny_hooked, tmp_path, monkeypatch):
    """SAEBench's sparse probing on an autoencoder, with our texts and language model: its file of results."""
    # SAEBench 0.6.0 gives one size two values, which later versions of jaxtyping notice.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    main = pytest.importorskip("sae_bench.evals.sparse_probing.main")
    classes = {
        str(c): [f"{word} " * 4 + text for text in tiny_texts(61, c)]
        for c, word in enumerate("red sea war game".split())
    }
    halves = tuple({c: texts[part] for c, texts in classes.items()} for part in (slice(41), slice(41, None)))
    monkeypatch.setattr(main.dataset_utils, "get_multi_label_train_test_data", lambda *_: halves)
    own = SimpleNamespace(from_pretrained_no_processing=lambda *_, **__: tiny_hooked)
    monkeypatch.setattr(main, "HookedTransformer", own)

    def evaluate(peer, batch=7):
        config = main.SparseProbingEvalConfig(
            model_name="tiny", dataset_names=["fancyzhx/ag_news"], context_length=13, sae_batch_size=batch,
            llm_batch_size=17, llm_dtype="float32", lower_vram_usage=True, k_values=[1, 2, 5],
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            main.run_eval(
                config, [("ours", peer)], "cpu", str(tmp_path), force_rerun=True, save_activations=False,
                artifacts_path=str(tmp_path / "acts"),
            )  # fmt: skip
        return json.loads((tmp_path / "ours_custom_sae_eval_results.json").read_text())

    return evaluate


def test_raw_activations_are_the_identity_of_saebench(bench):
    from sae_bench.custom_saes.identity_sae import IdentitySAE

    theirs = bench(IdentitySAE(24, "tiny", 2, torch.device("cpu"), torch.float32, HOOK))
    found = bench(as_sae(Raw(torch.zeros(3, 24)), hook_name=HOOK, model_name="tiny"))
    assert found["eval_result_metrics"] == theirs["eval_result_metrics"]
    assert found["eval_result_metrics"]["sae"]["sae_top_5_test_accuracy"] > 0.6


@pytest.mark.parametrize("kind", ["sae", "glp", "pca"])
def test_our_models_run_in_the_harness_of_saebench(models, bench, kind):
    peer = as_sae(models[kind], hook_name=HOOK, model_name="tiny")
    found = bench(peer)
    assert found["sae_cfg_dict"]["d_sae"] == models[kind].n_features
    assert 0.4 < found["eval_result_metrics"]["sae"]["sae_top_2_test_accuracy"] <= 1
    other_batches = bench(as_sae(models[kind], hook_name=HOOK, model_name="tiny"), batch=10)
    assert other_batches["eval_result_metrics"] == found["eval_result_metrics"]


def test_features_are_those_of_the_model_in_any_shape_and_batch(models, data):
    x = data[TASKS[0]][0][:42]
    for kind, model in models.items():
        peer = as_sae(model, hook_name=HOOK, model_name="tiny")
        with torch.no_grad():
            whole, cube, alone = peer.encode(x), peer.encode(x.reshape(7, 6, 24)), peer.encode(x[11:12])
        assert cube.shape == (7, 6, model.n_features)
        for found in (cube.flatten(0, 1), model.encode(x, noise=row_noise(x)).detach()):
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4, msg=kind)
        torch.testing.assert_close(alone[0], whole[11], rtol=1e-4, atol=1e-4)


def test_noise_is_normal_and_belongs_to_the_row():
    x = torch.randn(2003, 24, generator=torch.Generator().manual_seed(0))
    noise = row_noise(x)
    assert kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.12
    order = torch.randperm(2003, generator=torch.Generator().manual_seed(1))
    assert torch.equal(row_noise(x[order]), noise[order])
    nudged = x.clone()
    nudged[:, 5] += 1e-3
    for other in (row_noise(nudged), row_noise(x, seed=1)):
        assert abs(float((other * noise).mean())) < 0.02


def test_decodes_where_the_model_does(models, data):
    x = data[TASKS[0]][0][:42]
    pca = as_sae(models["pca"], hook_name=HOOK, model_name="tiny")
    features = pca.encode(x).reshape(7, 6, 19)
    expected = models["pca"].reconstruct(x, k=19).reshape(7, 6, 24)
    torch.testing.assert_close(pca.decode(features), expected, rtol=1e-4, atol=1e-4)
    linear = features @ pca.W_dec + models["pca"].mean
    torch.testing.assert_close(linear, expected, rtol=1e-3, atol=1e-3)
    raw = as_sae(Raw(x), hook_name=HOOK, model_name="tiny")
    assert torch.equal(raw.decode(raw.encode(x)), x)
    glp = as_sae(models["glp"], hook_name=HOOK, model_name="tiny")
    assert not hasattr(glp, "decode")
    assert glp.W_dec.shape == (0, 24)


def test_a_harness_may_cast_it_and_the_model_stays_as_it_is(models, data):
    x = data[TASKS[0]][0][:5]
    for model in models.values():
        before = model.encode(x, noise=row_noise(x))
        peer = as_sae(model, hook_name=HOOK, model_name="tiny").to(dtype=torch.bfloat16)
        assert peer.dtype == peer.encode(x.bfloat16()).dtype == torch.bfloat16
        assert peer.cfg.dtype == "bfloat16"
        assert torch.equal(model.encode(x, noise=row_noise(x)), before)


def test_knows_hook_point_and_language_model_from_training(models, data):
    raw = Raw(data[TASKS[0]][0])
    with pytest.raises(InputError, match="hook_name="):
        as_sae(raw)
    with pytest.raises(InputError, match="model_name="):
        as_sae(raw, hook_name=HOOK)
    with pytest.raises(InputError, match="no options"):
        as_sae(models["sae"], hook_name=HOOK, model_name="tiny", sigma=0.1)
    raw.provenance = {"store": {"hook": HOOK, "model": {"name": "tiny"}, "context": 77}}
    cfg = as_sae(raw).cfg
    assert (cfg.hook_name, cfg.hook_layer, cfg.model_name, cfg.context_size) == (HOOK, 2, "tiny", 77)
    assert cfg.metadata.hook_name == HOOK
    assert json.loads(json.dumps(cfg.to_dict()))["architecture"] == "raw"
