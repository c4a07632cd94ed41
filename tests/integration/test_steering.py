import numpy as np
import pytest
import torch

from glp_lens import lm
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.results import Results
from glp_lens.evals.steering import Concept, SteeringData, SteeringSettings, run, suite
from glp_lens.evals.steering.directions import difference_of_means, last_token_activations
from glp_lens.evals.steering.generate import generate, prompt_noise
from glp_lens.interface import Projector
from tests.conftest import WORDS, tiny_texts

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["the cat of", "a team was in", "three birds and", "the old man", "it is"]
SPORT = ["team", "game", "match", "goal", "player", "coach"]
MONEY = ["bank", "money", "market", "price", "stock"]


class Shaken(ActivationModel, Projector):
    """Adds noise: any change in noise or batching shows."""

    kind = "shaken"

    def __init__(self, d_in, hook=HOOK):
        self.d_in = d_in
        self.provenance = {"store": {"hook": hook}}

    def project(self, x, *, noise=None, generator=None, scale=1.0):
        return x + scale * noise

    def _config(self):
        return {}

    def _tensors(self):
        return {"scalar": torch.tensor(1.0)}

    @classmethod
    def _restore(cls, config, tensors):
        raise AssertionError


class Words:
    """Stands in for the sentence model: word identities, which a judge of this toy language needs."""

    vocab = len(WORDS) + 1

    def tokenize(self, texts):
        return [[WORDS.index(w) if w in WORDS else len(WORDS) for w in text.split()] for text in texts]

    def __call__(self, texts):
        rows = np.zeros((len(texts), self.vocab), dtype=np.float32)
        for i, ids in enumerate(self.tokenize(texts)):
            np.add.at(rows[i], ids, 1 / (1 + len(ids)))
        return rows


def toy_concept():
    rng = np.random.default_rng(0)
    labels = [i % 2 for i in range(1300)]
    texts = [" ".join(rng.choice([*(SPORT if i else MONEY), *WORDS[:30]], 20)) for i in labels]
    sides = [[" ".join(rng.choice(side, 6)) for _ in range(9)] for side in (SPORT, MONEY)]
    return Concept("toy", *sides, texts, labels)


def ordered_texts(n=300):
    """Texts in which each word calls for the next, with jumps: word order means something."""
    rng = np.random.default_rng(0)
    steps = np.where(rng.random((n, 30)) < 0.7, 1, rng.integers(1, len(WORDS), (n, 30)))
    starts = rng.integers(len(WORDS), size=(n, 1))
    return [" ".join(WORDS[i % len(WORDS)] for i in row) for row in starts + steps.cumsum(1)]


def test_last_token_activations_are_those_of_single_texts(tiny_model):
    texts = tiny_texts(7)
    got = last_token_activations(tiny_model, texts, HOOK, context=12, batch_size=3)
    for text, row in zip(texts, got, strict=True):
        ids = lm.to_ids(tiny_model, [text], 12, truncate="left")
        tokens, mask = lm.pad(ids)
        alone = lm.activations(tiny_model, tokens, mask, [HOOK])[HOOK][0, -1]
        torch.testing.assert_close(row, alone, atol=1e-5, rtol=1e-4)


def test_difference_of_means_is_a_unit_vector_towards_the_positives(tiny_hooked):
    positive, negative = tiny_texts(5, seed=1), tiny_texts(8, seed=2)
    direction = difference_of_means(tiny_hooked, positive, negative, HOOK, batch_size=3)
    a, b = (last_token_activations(tiny_hooked, t, HOOK).double().mean(0) for t in (positive, negative))
    torch.testing.assert_close(direction, ((a - b) / (a - b).norm()).float(), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="same mean activation"):
        difference_of_means(tiny_hooked, positive, positive, HOOK)
    with pytest.raises(InputError, match="at least one positive"):
        difference_of_means(tiny_hooked, positive, [" "], HOOK)


def test_generation_is_greedy_decoding_with_the_edit_at_every_new_position(tiny_model):
    """Against full forward passes without a cache, one sequence at a time."""
    d = tiny_model.cfg.d_model
    direction = torch.randn(d, generator=torch.Generator().manual_seed(0))
    strengths, steps, scale = [0.5, 2.0], 5, 0.3
    entry = Entry("shaken", Shaken(d), {"scale": scale})
    got = generate(
        tiny_model, PROMPTS, strengths, hook=HOOK, direction=direction, entry=entry, new_tokens=steps, seed=4
    )
    for i, ids in enumerate(lm.to_ids(tiny_model, PROMPTS, 64)):
        last = len(ids) - 1
        noise = scale * prompt_noise(4, i, steps, d)
        for j, alpha in enumerate(strengths):
            row = list(ids)
            for _ in range(steps):

                def edit(tensor, *, hook=None, start=last, alpha=alpha, noise=noise):
                    new = tensor.clone()
                    new[0, start:] += alpha * direction + noise[: tensor.shape[1] - start]
                    return new

                with torch.no_grad():
                    logits = tiny_model.run_with_hooks(torch.tensor([row]), fwd_hooks=[(HOOK, edit)])
                row.append(int(logits[0, -1].argmax()))
            assert got[i, j].tolist() == row[len(ids) :]


def test_generation_does_not_depend_on_the_batching(tiny_model):
    d = tiny_model.cfg.d_model
    options = {
        "hook": HOOK,
        "direction": torch.ones(d),
        "entry": Entry("shaken", Shaken(d)),
        "new_tokens": 6,
    }
    whole = generate(tiny_model, PROMPTS, [0.1, 0.2, 0.3], **options)
    assert torch.equal(whole, generate(tiny_model, PROMPTS, [0.1, 0.2, 0.3], batch_rows=1, **options))
    assert torch.equal(whole[:, 1:2], generate(tiny_model, PROMPTS, [0.2], **options))
    assert not torch.equal(whole, generate(tiny_model, PROMPTS, [0.1, 0.2, 0.3], seed=1, **options))


def test_no_direction_means_no_steering(tiny_model):
    got = generate(tiny_model, PROMPTS[:1], [0.0], hook=HOOK, direction=None, new_tokens=7)
    tokens = torch.tensor(lm.to_ids(tiny_model, PROMPTS[:1], 64))
    clean = tiny_model.generate(
        tokens, max_new_tokens=7, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
    )
    assert got[0, 0].tolist() == clean[0, tokens.shape[1] :].tolist()


DATA = ("hook", "act_norm", "prompts")


def steering(model, entries=None, *, folder=None, allow_mismatch=False, **options):
    entries = [Entry("shaken", Shaken(model.cfg.d_model), {"scale": 0.3})] if entries is None else entries
    options = {
        "hook": HOOK, "act_norm": 5.0, "strengths": [0.5, 1.0, 2.0], "prompts": PROMPTS, "new_tokens": 8, **options
    }  # fmt: skip
    own = {key: options.pop(key) for key in DATA if not isinstance(options[key], int)}
    data = SteeringData(model, **own, concept=toy_concept(), fluency_texts=ordered_texts(), embedder=Words())
    return run(entries, data, SteeringSettings(**options), folder=folder, allow_mismatch=allow_mismatch)


@pytest.fixture(autouse=True)
def _any_text_is_fluent(monkeypatch):
    """A random model writes no ordered text, so the scale of the fluency judge is set by hand."""
    calibrate = suite.FluencyJudge.calibrate

    def by_hand(ngrams, tokenize, prompts, unsteered, human, *, seed):
        return calibrate(ngrams, tokenize, ["the of"] * len(human), [t[20:] for t in human], human, seed=seed)

    monkeypatch.setattr(suite.FluencyJudge, "calibrate", by_hand)


def test_results_are_complete_and_consistent(tiny_model, tmp_path):
    results = steering(tiny_model, folder=tmp_path / "cache", random_repaired=True)
    frame = results.frame()
    assert all("under two tokens" in failure for failure in results.failures)
    assert set(frame["suite"]) == {"steering"}
    models = {"unsteered", "plain", "shaken", "random", "random+shaken"}
    assert set(frame["model"]) == {*models, "judge:minilm", "judge:tfidf", "judge:ngram"}

    def value(model, setting, metric):
        rows = frame[(frame.model == model) & (frame.setting == setting) & (frame.metric == metric)]
        assert len(rows) == 1
        return float(rows["value"].iloc[0])

    for model, suffix in (("plain", ""), ("shaken", ";scale=0.3"), ("random+shaken", ";scale=0.3")):
        change = value(model, f"alpha=2{suffix}", "concept_minus:unsteered")
        assert change == pytest.approx(
            value(model, f"alpha=2{suffix}", "concept") - value("unsteered", "alpha=0", "concept")
        )
    difference = value("shaken", "alpha=chosen;scale=0.3", "harmonic_diff:plain")
    assert difference == pytest.approx(-value("plain", "alpha=chosen", "harmonic_diff:shaken"))
    assert difference == pytest.approx(
        value("shaken", "alpha=chosen;scale=0.3", "harmonic") - value("plain", "alpha=chosen", "harmonic")
    )
    value("shaken", "fluency>=80% of unsteered;scale=0.3", "concept_at_fluency_diff:plain")
    scores = frame[frame.metric.isin(["concept", "fluency", "harmonic"])]["value"]
    assert scores.between(0, 2).all()
    assert len(results.extras["generations"]) == len(PROMPTS) * (1 + 4 * 3)
    assert {e["model"] for e in results.extras["examples"]} == models
    assert set(results.extras["chosen"]["plain"]) <= {0.5, 1.0, 2.0}
    loaded = Results.load(results.save(tmp_path / "results"))
    assert loaded.frame().equals(frame)


def test_generations_are_made_again_for_a_model_that_repairs_otherwise(tiny_bridge, tmp_path, monkeypatch):
    made = []
    real = suite.generate
    monkeypatch.setattr(suite, "generate", lambda *a, **k: made.append(k["desc"]) or real(*a, **k))
    model = Shaken(tiny_bridge.cfg.d_model)
    for max_norm in (None, None, 2.0):  # rows over the limit pass unchanged: another repair with the same weights
        model.provenance["store"]["max_norm"] = max_norm
        made.append(max_norm)
        steering(tiny_bridge, [Entry("shaken", model, {"scale": 0.3})], folder=tmp_path / "cache")
    first, second = made.index(None), made.index(None, 1)
    assert "steer shaken" in made[first:second]
    assert made[second:] == [None, 2.0, "steer shaken"]


def test_own_nll_is_the_models_loss_of_the_generated_tokens(tiny_model):
    ids = generate(tiny_model, PROMPTS, [1.0, 2.0], hook=HOOK, direction=None, new_tokens=4)
    got = suite._own_nll(tiny_model, PROMPTS, ids, block=3)
    before = lm.to_ids(tiny_model, PROMPTS, 64)
    for i, j in ((0, 1), (1, 0), (4, 1)):
        tokens = torch.tensor([before[i] + ids[i, j].tolist()])
        with torch.no_grad():
            log_p = tiny_model(tokens).log_softmax(-1)[0]
        start = len(before[i])
        expected = -np.mean([float(log_p[t - 1, tokens[0, t]]) for t in range(start, tokens.shape[1])])
        assert float(got[i, j]) == pytest.approx(expected, rel=1e-4)


def test_a_second_run_generates_nothing_and_says_the_same(tiny_hooked, tmp_path, monkeypatch):
    first = steering(tiny_hooked, folder=tmp_path)
    (interrupted,) = tmp_path.glob("generations-random-*.json")
    interrupted.unlink()  # as if the run had been interrupted
    made = []

    def counted(*args, **options):
        made.append(options["desc"])
        return generate(*args, **options)

    monkeypatch.setattr(suite, "generate", counted)
    second = steering(tiny_hooked, folder=tmp_path)
    assert made == ["steer random"]
    assert second.frame().equals(first.frame())
    steering(tiny_hooked, [Entry("shaken", Shaken(24), {"scale": 0.4})], folder=tmp_path)
    assert made == ["steer random", "steer shaken"]


class NoProjector(ActivationModel):
    kind = "none"
    d_in, provenance = 24, {}

    _config = _tensors = _restore = None


def test_a_model_that_cannot_project_is_named(tiny_hooked):
    results = steering(tiny_hooked, [Entry("odd", NoProjector())])
    assert "odd cannot project activations: left out of steering" in results.failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entries": [Entry("plain", Shaken(24))]}, "labels must be unique and other than 'unsteered'"),
        ({"entries": [Entry("x", Shaken(23))]}, "width 23"),
        ({"entries": [Entry("x", Shaken(24, "blocks.2.hook_resid_post"))]}, "trained at blocks.2"),
        ({"hook": "blocks.9.hook_resid_post"}, "not in this model"),
        ({"act_norm": float("nan")}, "median_norm"),
        ({"strengths": [0.4, 0.2]}, "rising"),
        ({"strengths": []}, "rising"),
        ({"prompts": 99}, "between 2 and 40"),
        ({"prompts": ["one"]}, "at least two prompts"),
    ],
)
def test_bad_input_is_refused_in_one_line(tiny_hooked, options, message):
    with pytest.raises(InputError, match=message) as error:
        steering(tiny_hooked, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("store", "words"),
    [
        ({"hook": "blocks.2.hook_resid_post"}, "at blocks.2"),
        ({"model": {"weight_processing": "folded+centred"}}, r"with folded\+centred weights \(here raw\)"),
        ({"model": {"name": "meta-llama/x"}}, "on meta-llama/x"),
    ],
)
def test_a_model_of_other_activations_is_refused_unless_told(tiny_hooked, store, words):
    model = Shaken(24)
    model.provenance["store"] |= store
    entry = Entry("x", model, {"scale": 0.3})
    with pytest.raises(InputError, match=f"x was trained {words}.*allow_mismatch") as error:
        steering(tiny_hooked, [entry])
    assert "\n" not in str(error.value)
    results = steering(tiny_hooked, [entry], allow_mismatch=True)
    assert results.failures[0].startswith("x was trained")
    assert "x" in set(results.frame().model)
