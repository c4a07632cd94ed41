"""Delta LM loss on tiny random language models, against loops over single documents."""

import numpy as np
import pytest
import torch

from glp_lens import lm
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals import fidelity
from glp_lens.evals.entries import Entry
from glp_lens.evals.fidelity.settings import FidelitySettings
from glp_lens.interface import Reconstructor
from glp_lens.models.sae import SAE

HOOK = "blocks.1.hook_resid_post"
D = 24
WORDS = ["the", "a", "of", "cat", "dog", "bird", "fish", "tree", "red", "blue", "game", "money", "war"]


class Shrink(ActivationModel, Reconstructor):
    """Reconstructs `mean + keep * (x - mean) + amount * noise`."""

    kind = "shrink"

    def __init__(self, mean, max_norm=None, **store):
        self.mean, self.d_in = mean, len(mean)
        self.provenance = {"store": {"hook": HOOK, "max_norm": max_norm, **store}}

    def reconstruct(self, x, *, noise=None, generator=None, keep=1.0, amount=0.0):
        return self.mean + keep * (x - self.mean) + amount * noise

    def _config(self):
        return {}

    def _tensors(self):
        return {}

    @classmethod
    def _restore(cls, config, tensors):
        return cls(tensors["mean"])


@pytest.fixture
def texts():
    rng = np.random.default_rng(5)
    return [" ".join(rng.choice(WORDS, length)) for length in (5, 31, 12, 8, 40, 19, 6, 25, 14)]


@pytest.fixture
def mean():
    return torch.linspace(-0.1, 0.1, D)


def run(model, entries, documents, hook=HOOK, *, mean, std=None, batch_size=8, allow_mismatch=False, **settings):
    data = fidelity.FidelityData(model, hook, documents, mean, std, batch_size)
    return fidelity.run(entries, data, fidelity.FidelitySettings(**settings), allow_mismatch=allow_mismatch)


def pick(results, model, metric):
    frame = results.frame()
    return frame[(frame.model == model) & (frame.metric == metric)].iloc[0]


def by_hand(model, texts, function, context, hook=HOOK):
    """Token-weighted NLL with every row but BOS passed through `function`, one document at a time."""
    log_p = predictions(model, texts, function, context, hook)
    targets = [t for text in texts for t in lm.to_ids(model, [text], context)[0][2:]]
    return float(-log_p[torch.arange(len(targets)), torch.tensor(targets)].mean()), len(targets)


def predictions(model, texts, function, context, hook=HOOK):
    """Log-probabilities `(t, d_vocab)` of next tokens, float64, predicted from all positions but BOS and the last."""
    found = []
    for text in texts:
        tokens = torch.tensor(lm.to_ids(model, [text], context))

        def hook_fn(tensor, *, hook=None):
            return torch.cat([tensor[:, :1], function(tensor[:, 1:])], 1)

        logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[(hook, hook_fn)])
        found.append(logits[0, 1:-1].double().log_softmax(-1))
    return torch.cat(found)


def test_numbers_equal_a_loop_over_documents(tiny_model, texts, mean):
    shrink = Shrink(mean)
    entries = [Entry("whole", shrink), Entry("half", shrink, {"keep": 0.5})]
    results = run(tiny_model, entries, texts, HOOK, mean=mean, context=17, batch_size=4)
    clean, n = by_hand(tiny_model, texts, lambda x: x, 17)
    half, _ = by_hand(tiny_model, texts, lambda x: mean + 0.5 * (x - mean), 17)
    floor, _ = by_hand(tiny_model, texts, mean.expand_as, 17)
    assert results.data["tokens"] == n
    assert pick(results, "clean", "nll").value == pytest.approx(clean, abs=1e-5)
    assert pick(results, "half", "delta_nll").value == pytest.approx(half - clean, abs=1e-4)
    assert pick(results, "mean ablation", "delta_nll").value == pytest.approx(floor - clean, abs=1e-4)
    assert pick(results, "half", "fvu").value == pytest.approx(0.25, rel=1e-4)
    assert pick(results, "mean ablation", "fvu").value == pytest.approx(1, rel=1e-6)
    assert pick(results, "whole", "delta_nll").value == pytest.approx(0, abs=1e-5)
    assert pick(results, "whole", "loss_recovered").value == pytest.approx(1, abs=1e-4)
    assert pick(results, "half", "loss_recovered").value == pytest.approx((floor - half) / (floor - clean), abs=1e-3)
    assert pick(results, "half", "delta_nll").n == len(texts)


def test_predictions_are_compared_with_those_of_the_untouched_model(tiny_model, texts, mean):
    """KL divergence and equal likeliest tokens; and the ablation to zero, by which loss recovered is measured too."""
    results = run(tiny_model, [Entry("half", Shrink(mean), {"keep": 0.3})], texts, mean=mean, context=17)
    log_p = predictions(tiny_model, texts, lambda x: x, 17)
    log_q = predictions(tiny_model, texts, lambda x: mean + 0.3 * (x - mean), 17)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert pick(results, "half", "kl").value == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
    equal = (log_p.argmax(1) == log_q.argmax(1)).double().mean()
    assert pick(results, "half", "top1").value == pytest.approx(float(equal), abs=1e-9)
    clean, zero, half = (
        by_hand(tiny_model, texts, function, 17)[0]
        for function in (lambda x: x, torch.zeros_like, lambda x: mean + 0.3 * (x - mean))
    )
    assert pick(results, "zero ablation", "delta_nll").value == pytest.approx(zero - clean, abs=1e-4)
    recovered = pick(results, "half", "loss_recovered_zero").value
    assert recovered == pytest.approx((zero - half) / (zero - clean), abs=2e-3)


def test_noise_without_a_model_is_a_curve_that_models_are_compared_with(tiny_bridge, texts, mean):
    """A model that does nothing but return the noised row equals it at any FVU."""
    std = torch.linspace(0.1, 0.5, D)

    class Noised(Shrink):
        def reconstruct(self, x, *, noise=None, generator=None, sigma=0.1):
            z = (x - self.mean) / std
            return self.mean + std * ((1 - sigma) * z + sigma * noise)

    entries = [Entry("glp", Noised(mean), {"sigma": 0.2}), Entry("sae", Noised(mean), {"sigma": 0.13})]
    results = run(tiny_bridge, entries, texts, mean=mean, std=std, context=20, noise_levels=(0.1, 0.2, 0.4))
    for metric in ("nll", "kl", "fvu", "fvu_standardised"):
        assert pick(results, "noise sigma=0.2", metric).value == pytest.approx(pick(results, "glp", metric).value)
    assert results.extras["curves"] == {"noise": [f"noise sigma={s}" for s in (0.1, 0.2, 0.4)]}
    frame = results.frame()
    matched = frame[frame.model == "noise"].set_index("metric")
    assert matched.value["delta_nll_matched_diff:glp"] == pytest.approx(0, abs=1e-6)
    assert abs(matched.value["delta_nll_matched_diff:sae"]) < 0.1 * pick(results, "sae", "delta_nll").value
    without = run(tiny_bridge, entries, texts, mean=mean, context=20)
    assert not any(label.startswith("noise") for label in set(without.frame().model))


def test_a_pass_may_begin_at_a_known_stream(tiny_bridge, tiny_model, texts):
    """The same logits as from the start, whether the blocks before are left out or not."""
    for model in (tiny_bridge, tiny_model):
        tokens, mask = lm.pad(lm.to_ids(model, texts, 20))
        stream = 1.5 * lm.activations(model, tokens, mask, [HOOK])[HOOK] + 0.1
        wanted = mask[:, 1:].clone()
        wanted[:, 3] = False
        edit = [(HOOK, lambda x, stream=stream, **_: stream)]
        expected = model.run_with_hooks(tokens, return_type="logits", attention_mask=mask.long(), fwd_hooks=edit)
        expected = expected[:, :-1][wanted]
        for options in ({}, {"known": (HOOK, stream)}):
            found = lm.next_logits(model, tokens, mask, edit, wanted=wanted, **options)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_heads_are_replaced_side_by_side(tiny_model, texts, mean):
    hook, weight = "blocks.1.attn.hook_z", torch.linspace(0.2, 0.9, D)  # another one for each number of each head

    class Weigh(Shrink):
        def reconstruct(self, x, **options):
            return weight * x

    results = run(
        tiny_model, [Entry("weigh", Weigh(mean, hook=hook))], texts, hook, mean=mean, context=17, batch_size=4
    )
    clean, n = by_hand(tiny_model, texts, lambda x: x, 17, hook)
    weighed, _ = by_hand(tiny_model, texts, lambda x: x * weight.reshape(4, 6), 17, hook)
    assert results.data["tokens"] == n
    assert abs(weighed - clean) > 1e-3
    assert pick(results, "weigh", "delta_nll").value == pytest.approx(weighed - clean, abs=1e-4)


@pytest.mark.parametrize("point", ["attn.hook_pattern", "ln1.hook_scale"])
def test_a_hook_point_without_such_rows_is_refused(tiny_model, texts, mean, point):
    hook = f"blocks.1.{point}"
    with pytest.raises(InputError, match="gives shape .*expected|has width 1, the mean 24"):
        run(tiny_model, [Entry("whole", Shrink(mean, hook=hook))], texts, hook, mean=mean)


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty")
def test_an_autoencoder_of_centred_weights_is_refused_on_raw_ones(open_layernorm, texts, tmp_path):
    """As gpt2-small-res-jb asks: its rows have mean zero in each layer, which those of the raw weights have not."""
    import sae_lens

    raw, centred = open_layernorm(), open_layernorm(center_writing_weights=True)
    autoencoder = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D, d_sae=2 * D))
    with torch.no_grad():  # exact on rows of mean zero, and on no others
        plane = torch.eye(D) - 1 / D
        autoencoder.W_enc.copy_(torch.cat([plane, -plane], 1))
        autoencoder.W_dec.copy_(autoencoder.W_enc.T)
    asked = {"center_writing_weights": True}
    vars(autoencoder.cfg.metadata).update(hook_name=HOOK, model_name="custom", model_from_pretrained_kwargs=asked)
    autoencoder.save_model(tmp_path)
    entries = [Entry("sae", SAE.from_sae_lens(tmp_path))]
    results = run(centred, entries, texts, HOOK, mean=torch.zeros(D))
    assert pick(results, "sae", "fvu").value < 1e-6
    with pytest.raises(InputError, match=r"with centred weights \(here raw\)"):
        run(raw, entries, texts, HOOK, mean=torch.zeros(D))
    wrong = run(raw, entries, texts, HOOK, mean=torch.zeros(D), allow_mismatch=True)
    assert pick(wrong, "sae", "fvu").value > 0.01
    assert "with centred weights (here raw)" in wrong.failures[0]


def test_standardised_fvu_divides_each_dimension_by_its_variance(tiny_bridge, texts, mean):
    class Zero(Shrink):
        """Keeps all dimensions but the first 7, which it sets to the mean."""

        def reconstruct(self, x, **options):
            return torch.cat([self.mean[:7].expand(len(x), 7), x[:, 7:]], 1)

    std = torch.linspace(0.1, 3.0, D)
    std[5] = 0  # never varied in training: does not count
    options = {"mean": mean, "context": 20}
    results = run(tiny_bridge, [Entry("zero", Zero(mean))], texts, HOOK, std=std, **options)
    tokens, mask = lm.pad(lm.to_ids(tiny_bridge, texts, 20))
    inner = mask.clone()
    inner[:, 0] = False
    x = lm.activations(tiny_bridge, tokens, mask, [HOOK])[HOOK][inner].double().numpy()
    z = np.delete((x - mean.double().numpy()) / np.where(std == 0, 1, std.double()), 5, axis=1)
    found = pick(results, "zero", "fvu_standardised")
    assert found.value == pytest.approx((z[:, :6] ** 2).sum() / (z**2).sum(), rel=1e-4)
    assert found.ci_low < found.value < found.ci_high
    assert pick(results, "zero", "fvu").value != pytest.approx(found.value, rel=0.05)
    assert pick(results, "mean ablation", "fvu_standardised").value == pytest.approx(1, rel=1e-6)
    without = run(tiny_bridge, [Entry("zero", Zero(mean))], texts, HOOK, **options)
    assert "fvu_standardised" not in set(without.frame().metric)
    with pytest.raises(InputError, match="standard deviation"):
        run(tiny_bridge, [Entry("zero", Zero(mean))], texts, HOOK, std=std[:1], **options)


def test_noise_is_shared_by_models_and_independent_of_the_batch_size(tiny_bridge, texts, mean):
    first, second = Shrink(mean), Shrink(mean)
    entries = [Entry("a", first, {"amount": 0.3}), Entry("b", second, {"amount": 0.3})]
    runs = [run(tiny_bridge, entries, texts, HOOK, mean=mean, context=20, batch_size=size).frame() for size in (2, 9)]
    np.testing.assert_allclose(runs[0].value, runs[1].value, atol=1e-5)
    gap = runs[0][runs[0].metric == "delta_nll_diff:b"].iloc[0]
    assert gap.value == pytest.approx(0, abs=1e-6)
    assert runs[0][(runs[0].model == "a") & (runs[0].metric == "delta_nll")].value.item() != 0


def test_massive_rows_pass_unchanged_and_are_counted(tiny_bridge, texts, mean):
    tokens, mask = lm.pad(lm.to_ids(tiny_bridge, texts, 20))
    inner = mask.clone()
    inner[:, 0] = False
    norms = lm.activations(tiny_bridge, tokens, mask, [HOOK])[HOOK].norm(dim=2)[inner].sort().values
    limit = float((norms[-4] + norms[-3]) / 2)
    shrink = Shrink(mean, max_norm=limit)
    results = run(tiny_bridge, [Entry("none", shrink, {"keep": 0.0})], texts, HOOK, mean=mean, context=20)
    assert results.data["massive_rows_unchanged"] == 3
    everything = Shrink(mean, max_norm=1e-9)
    results = run(tiny_bridge, [Entry("none", everything)], texts, HOOK, mean=mean, context=20)
    assert pick(results, "mean ablation", "delta_nll").value == pytest.approx(0, abs=1e-6)


def test_a_model_at_several_settings_is_compared_at_equal_fvu(tiny_bridge, texts, mean):
    knob, other = Shrink(mean), Shrink(mean)
    entries = [
        Entry("glp s=1", knob, {"keep": 0.9}),
        Entry("glp s=2", knob, {"keep": 0.5}),
        Entry("sae", other, {"keep": 0.6}),
    ]
    results = run(tiny_bridge, entries, texts, HOOK, mean=mean, context=20)
    frame = results.frame()
    matched = frame[frame.metric == "delta_nll_matched_diff:sae"].iloc[0]
    weight = np.log(0.16 / 0.01) / np.log(0.25 / 0.01)
    ends = [pick(results, f"glp s={i}", "delta_nll").value for i in (1, 2)]
    own = pick(results, "sae", "delta_nll").value
    assert matched.model == "glp"
    assert min(ends) > 0
    assert matched.value == pytest.approx(ends[0] ** (1 - weight) * ends[1] ** weight - own, abs=1e-5)
    assert results.extras["curves"] == {"glp": ["glp s=1", "glp s=2"]}


@pytest.mark.parametrize(
    ("store", "words"),
    [({"hook": "blocks.2.hook_resid_post"}, "was trained at"),
     ({"model": {"weight_processing": "folded+centred"}}, "weights")],
)  # fmt: skip
def test_a_foreign_model_is_refused(tiny_bridge, texts, mean, store, words):
    foreign = Shrink(mean)
    foreign.provenance["store"] |= store
    with pytest.raises(InputError, match=words):
        run(tiny_bridge, [Entry("foreign", foreign)], texts, HOOK, mean=mean)


def test_labels_must_differ_and_texts_must_not_be_empty(tiny_bridge, texts, mean):
    entry = Entry("sae", Shrink(mean))
    with pytest.raises(InputError, match="labels must be unique and other than 'clean', 'mean ablation'"):
        run(tiny_bridge, [entry, entry], texts, HOOK, mean=mean)
    with pytest.raises(InputError, match="no document"):
        run(tiny_bridge, [entry], [""], HOOK, mean=mean)


def test_all_documents_are_measured_and_results_are_kept_by_what_they_depend_on(tiny_bridge, mean, texts, tmp_path):
    many = [f"{text} {word}" for text in texts for word in WORDS[:4]]  # more than a job takes by default
    assert len(many) > FidelitySettings().documents
    assert run(tiny_bridge, [Entry("shrunk", Shrink(mean), {"keep": 0.5})], many, mean=mean).config["documents"] == 36

    def measured(keep, documents):
        data = fidelity.FidelityData(tiny_bridge, HOOK, documents, mean)
        entries = [Entry("shrunk", Shrink(mean), {"keep": keep})]
        return pick(fidelity.run(entries, data, folder=tmp_path), "shrunk", "fvu").value

    first = measured(0.5, texts)
    assert measured(0.9, texts) != first
    assert measured(0.5, texts[1:]) != first
    assert measured(0.5, texts) == first
    assert len(list(tmp_path.iterdir())) == 3
