"""The steering suite on tiny models: generation, what is kept, and what is refused."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from glp_lens import hooks, lm
from glp_lens.activations import write_store
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.results import Results
from glp_lens.evals.steering import SteeringData, SteeringSettings, run, suite
from glp_lens.evals.steering.experiments import Task
from glp_lens.evals.steering.generate import Method, generate, own_nll
from glp_lens.interface import Projector
from glp_lens.models.glp import GLP
from glp_lens.report import write_report
from glp_lens.training.config import TrainConfig
from tests.integration.toy_steering import Words, any_text_is_fluent, ordered_texts, toy_task

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ["the cat of", "a team was in", "three birds and", "the old man", "it is"]


class Shaken(ActivationModel, Projector):
    """Adds noise: any change in noise or batching shows."""

    kind, stochastic = "shaken", True

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


def ids_of(model, prompts=PROMPTS):
    return lm.to_ids(model, prompts, 64)


def made(model, method, strengths, *, prompts=PROMPTS, **options):
    """Ids of every prompt at every strength, by pair."""
    wanted = [(i, alpha) for i in range(len(prompts)) for alpha in strengths]
    options = {"hook": HOOK, "keys": prompts, "new_tokens": 6, **options}
    batches = list(generate(model, method, ids_of(model, prompts), wanted, **options))
    return {pair: value for batch in batches for pair, value in batch.items()}


def shaken(model, scale=1.0):
    return Entry("shaken", Shaken(model.cfg.d_model), {"scale": scale})


def test_generation_is_greedy_decoding_with_the_edit_at_every_new_position(tiny_model):
    """Against full forward passes without a cache, one sequence at a time."""
    d, steps, scale = tiny_model.cfg.d_model, 5, 0.3
    direction = torch.randn(d, generator=torch.Generator().manual_seed(0))
    method = Method("shaken", (0.5, 2.0), direction, shaken(tiny_model, scale), factor=0.8)
    got = made(tiny_model, method, (0.5, 2.0), new_tokens=steps, seed=4)
    for i, ids in enumerate(ids_of(tiny_model)):
        last = len(ids) - 1
        noise = hooks.SeededNoise(4, [PROMPTS[i]])(torch.zeros(steps, dtype=torch.long), last + torch.arange(steps), d)
        for alpha in (0.5, 2.0):
            row = list(ids)
            for _ in range(steps):

                def edit(tensor, *, hook=None, start=last, alpha=alpha, noise=scale * noise):
                    new = tensor.clone()
                    new[0, start:] += 0.8 * alpha * direction + noise[: tensor.shape[1] - start]
                    return new

                with torch.no_grad():
                    logits = tiny_model.run_with_hooks(torch.tensor([row]), fwd_hooks=[(HOOK, edit)])
                row.append(int(logits[0, -1].argmax()))
            assert got[i, alpha].ids == row[len(ids) :]


def test_generation_does_not_depend_on_the_batching(tiny_model):
    d = tiny_model.cfg.d_model
    method = Method("shaken", (0.1, 0.2, 0.3), torch.ones(d), shaken(tiny_model))
    whole = made(tiny_model, method, method.strengths)
    single = made(tiny_model, method, method.strengths, batch_rows=1)
    assert {pair: value.ids for pair, value in whole.items()} == {pair: value.ids for pair, value in single.items()}
    reordered = made(tiny_model, method, (0.2,), prompts=PROMPTS[::-1])
    assert all(reordered[4 - i, 0.2].ids == whole[i, 0.2].ids for i in range(5))
    other = made(tiny_model, method, method.strengths, seed=1)
    assert any(other[pair].ids != whole[pair].ids for pair in whole)


def test_no_direction_means_no_steering(tiny_model):
    got = made(tiny_model, Method("unsteered", (0.0,)), (0.0,), prompts=PROMPTS[:1], new_tokens=7)
    tokens = torch.tensor(ids_of(tiny_model, PROMPTS[:1]))
    clean = tiny_model.generate(
        tokens, max_new_tokens=7, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
    )
    assert got[0, 0.0].ids == clean[0, tokens.shape[1] :].tolist()


def test_own_nll_is_the_models_loss_of_the_generated_tokens(tiny_model):
    got = made(tiny_model, Method("unsteered", (0.0,)), (0.0,), new_tokens=4)
    for i, ids in enumerate(ids_of(tiny_model)):
        tokens = torch.tensor([ids + got[i, 0.0].ids])
        with torch.no_grad():
            log_p = tiny_model(tokens).log_softmax(-1)[0]
        expected = -np.mean([float(log_p[t - 1, tokens[0, t]]) for t in range(len(ids), tokens.shape[1])])
        assert got[i, 0.0].nll_own == pytest.approx(expected, rel=1e-4)
        assert float(own_nll(tiny_model, tokens, len(ids))[0]) == pytest.approx(expected, rel=1e-4)


def test_own_nll_is_of_the_unsteered_model_also_of_steered_texts(tiny_model, monkeypatch):
    """The pass begins at the hook point, with what came there before the edit."""
    push = 40 * torch.randn(tiny_model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    reads = []
    token_nll = lm.token_nll

    def watched(*args, known, **rest):
        reads.append(known)
        return token_nll(*args, known=known, **rest)

    monkeypatch.setattr(lm, "token_nll", watched)
    got = made(tiny_model, Method("plain", (0.0, 1.0), push), (0.0, 1.0), new_tokens=4)
    assert all(known is not None for known in reads)
    for i, ids in enumerate(ids_of(tiny_model)):
        assert got[i, 0.0].ids != got[i, 1.0].ids
        for alpha in (0.0, 1.0):
            expected = own_nll(tiny_model, torch.tensor([ids + got[i, alpha].ids]), len(ids))
            assert got[i, alpha].nll_own == pytest.approx(float(expected), rel=1e-4)


def test_the_strength_at_which_fluency_halves_is_read_between_the_strengths_tried():
    assert suite.halving_strength([1, 2, 4], [1.0, 1.0, 0.0], unsteered=1.0) == pytest.approx(2**1.5)
    assert suite.halving_strength([1, 2, 4], [0.8, 0.5, 0.0], unsteered=1.0) == pytest.approx(2)
    assert suite.halving_strength([1, 2, 4], [0.2, 0.1, 0.0], unsteered=1.0) == 1
    assert suite.halving_strength([1, 2, 4], [1.0, 0.9, 0.8], unsteered=1.0) == 4


# -- the suite -------------------------------------------------------------------------------------------------

DATA = ("prompts", "hook", "rows", "tasks", "others")


def toy_rows(d):
    return 5 * torch.randn(200, d, generator=torch.Generator().manual_seed(1)) / d**0.5


def steering(
    model, entries=None, *, folder=None, allow_mismatch=False, hook=HOOK, rows=None, tasks=None, others=None, **options
):
    d = model.cfg.d_model
    entries = [shaken(model, 0.3)] if entries is None else entries
    options = {"strengths": [0.5, 1.0, 2.0], "prompts": PROMPTS, "new_tokens": 8, **options}
    own = {key: options.pop(key) for key in DATA if not isinstance(options.get(key, 0), int)}
    data = SteeringData(
        model, hook, toy_rows(d) if rows is None else rows, tasks=[toy_task(d)] if tasks is None else tasks,
        fluency_texts=ordered_texts(), embedder=Words(), others=others or {}, **own,
    )  # fmt: skip
    return run(
        entries, data, SteeringSettings(fluency_judge="ngram", **options), folder=folder, allow_mismatch=allow_mismatch
    )


@pytest.fixture(autouse=True)
def _any_text_is_fluent(monkeypatch):
    any_text_is_fluent(monkeypatch)


def test_results_are_complete_and_consistent(tiny_model, tmp_path):
    results = steering(tiny_model, folder=tmp_path / "cache", controls=["shrink", "norm-preserving", "clipped"])
    frame, texts = results.frame(), results.tables["generations"]
    assert all("under two tokens" in failure for failure in results.failures)
    methods = {"unsteered", "plain", "shaken", "shrink", "norm-preserving", "clipped"}
    assert set(texts.method) == methods
    assert len(texts) == len(PROMPTS) * (1 + 5 * 3)

    def value(model, setting, metric):
        rows = frame[(frame.model == model) & (frame.setting == setting) & (frame.metric == metric)]
        assert len(rows) == 1
        return float(rows["value"].iloc[0])

    own = texts[(texts.method == "shaken") & (texts.strength == 2)]
    assert value("shaken", "alpha=2;scale=0.3", "concept") == pytest.approx(own.score_concept.mean())
    assert set(own.setting) == {"scale=0.3"}
    value("shaken", "alpha=chosen;scale=0.3", "harmonic_diff:plain")
    assert {e["model"] for e in results.extras["examples"]} == methods
    loaded = Results.load(results.save(tmp_path / "results"))
    assert loaded.frame().equals(frame)


def test_the_same_seed_of_noise_gives_the_same_texts_and_another_one_others(tiny_bridge):
    texts = steering(tiny_bridge, noise_seeds=(0, 1), controls=["none"]).tables["generations"]
    seeds = {method: sorted(set(own.noise_seed)) for method, own in texts.groupby("method")}
    assert seeds == {"unsteered": [0], "plain": [0], "shaken": [0, 1]}
    again = steering(tiny_bridge, noise_seeds=(1,), controls=["none"]).tables["generations"]

    def of(frame, seed):
        return frame[(frame.method == "shaken") & (frame.noise_seed == seed)].text.tolist()

    assert of(texts, 1) == of(again, 1) != of(texts, 0)


def test_other_number_formats_are_opened_and_repeated_without_random_directions(tiny_bridge):
    opened = []

    def other():
        opened.append(1)
        return copy.deepcopy(tiny_bridge).to(torch.bfloat16)

    results = steering(tiny_bridge, dtypes=("float32", "bfloat16"), others={"bfloat16": other},
                       replicate_prompts=3, controls=["clipped", "random covariance"])  # fmt: skip
    texts = results.tables["generations"]
    again = texts[texts.lm_dtype == "bfloat16"]
    assert opened == [1]
    assert set(again.method) == {"unsteered", "plain", "shaken", "clipped"}
    assert set(again.prompt) == set(PROMPTS[:3])
    assert "random covariance" in set(texts[texts.lm_dtype == "float32"].method)
    with pytest.raises(InputError, match="cannot be opened again as float16"):
        steering(tiny_bridge, dtypes=("float16",))


def test_an_interrupted_run_goes_on_text_by_text_and_says_the_same(tiny_hooked, tmp_path, monkeypatch):
    first = steering(tiny_hooked, folder=tmp_path)
    (kept,) = tmp_path.glob("texts-toy-shaken-*.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    # As if the run had been killed while it wrote; the first line says what the file is for.
    kept.write_bytes(b"".join(lines[:5]) + lines[5][:9])
    wanted = []
    real = suite.generate

    def counted(model, method, prompts, pairs, **options):
        wanted.append((method.label, len(pairs)))
        return real(model, method, prompts, pairs, **options)

    monkeypatch.setattr(suite, "generate", counted)
    second = steering(tiny_hooked, folder=tmp_path)
    assert wanted == [("shaken", len(PROMPTS) * 3 - 4)]
    assert second.frame().equals(first.frame())
    wanted.clear()
    steering(tiny_hooked, strengths=[0.5, 1.5], folder=tmp_path)
    assert dict(wanted) == {"shaken": 5, "plain": 5, "shrink": 5, **dict.fromkeys(suite.CONTROLS, 5)}
    wanted.clear()
    steering(tiny_hooked, [shaken(tiny_hooked, 0.4)], folder=tmp_path)
    assert wanted == [("shaken", len(PROMPTS) * 3)]


def test_texts_are_made_again_for_a_model_that_repairs_otherwise(tiny_bridge, tmp_path, monkeypatch):
    made = []
    real = suite.generate
    monkeypatch.setattr(
        suite, "generate", lambda m, method, *a, **k: made.append(method.label) or real(m, method, *a, **k)
    )
    model = Shaken(tiny_bridge.cfg.d_model)
    for max_norm in (None, None, 2.0):  # rows over the limit pass unchanged: another repair with the same weights
        model.provenance["store"]["max_norm"] = max_norm
        made.append(max_norm)
        steering(tiny_bridge, [Entry("shaken", model, {"scale": 0.3})], folder=tmp_path / "cache")
    first, second = made.index(None), made.index(None, 1)
    assert "shaken" in made[first:second]
    assert made[second:] == [None, 2.0, "shaken"]


def test_the_control_with_shuffled_labels_is_the_tasks_own(tiny_bridge):
    task = toy_task(tiny_bridge.cfg.d_model)
    task = dataclasses.replace(task, shuffled=task.direction)
    texts = steering(tiny_bridge, [], tasks=[task], controls=["random labels"]).tables["generations"]
    plain, control = (texts[texts.method == name].text.tolist() for name in ("plain", "random labels"))
    assert plain == control
    assert plain != texts[texts.method == "unsteered"].text.tolist() * 3


def test_several_concepts_share_the_unsteered_texts(tiny_bridge):
    d = tiny_bridge.cfg.d_model
    results = steering(tiny_bridge, tasks=[toy_task(d), toy_task(d, name="other")], controls=["none"])
    texts = results.tables["generations"]
    still = texts[texts.method == "unsteered"]
    assert set(still.concept) == {"toy", "other"}
    assert still.groupby("prompt").text.nunique().eq(1).all()
    assert "all" in set(results.frame().task)


def test_seeds_come_in_any_order_and_the_first_is_the_main_run(tiny_bridge):
    results = steering(tiny_bridge, noise_seeds=(3, 1), controls=["none"])
    assert results.extras["main_run"]["noise_seed"] == 3
    assert {run["noise_seed"] for run in results.extras["replicates"]} == {1}


def test_a_concept_that_cannot_be_judged_is_left_out_unless_it_was_asked_for(tiny_bridge):
    d = tiny_bridge.cfg.d_model
    good, odd = toy_task(d), toy_task(d, name="odd")
    odd = Task(dataclasses.replace(odd.concept, judge_labels=[i % 2 for i in range(650)] * 2), odd.direction)
    shuffled = np.random.default_rng(0).permutation(odd.concept.judge_labels).tolist()
    odd = Task(dataclasses.replace(odd.concept, judge_labels=shuffled), odd.direction)
    results = steering(tiny_bridge, tasks=[good, odd], concepts=("all",), controls=["none"])
    assert set(results.tables["generations"].concept) == {"toy"}
    assert any("'odd' cannot be judged" in failure for failure in results.failures)
    with pytest.raises(InputError, match="'odd' cannot be judged"):
        steering(tiny_bridge, tasks=[good, odd])
    with pytest.raises(InputError, match="different names"):
        steering(tiny_bridge, tasks=[good, good])


def test_the_report_shows_several_concepts(tiny_bridge, tmp_path):
    d = tiny_bridge.cfg.d_model
    results = steering(
        tiny_bridge, tasks=[toy_task(d), toy_task(d, name="other")], controls=["shrink", "random labels"]
    )
    page = write_report([results], tmp_path, {"title": "Steering", "command": None, "seed": 0}).read_text()
    assert "toy" in page
    assert "other" in page


def test_guidance_steers_without_a_push(tiny_bridge, tmp_path):
    store = write_store(tmp_path / "acts", toy_rows(tiny_bridge.cfg.d_model), hook=HOOK)
    glp = GLP.fit(store, TrainConfig(rows=256, batch_size=64), d_model=12, d_mlp=20, n_layers=1)
    entry = Entry("glp", glp, {"sigma": 0.5, "steps": 4})
    results = steering(tiny_bridge, [entry], guidance=(1.0, 1e6), controls=["none"], allow_mismatch=True)
    texts = results.tables["generations"]
    guided = texts[texts.method == "glp classifier"]
    assert sorted(set(guided.strength)) == [1.0, 1e6]
    weak, strong = (guided[guided.strength == scale].text.tolist() for scale in (1.0, 1e6))
    assert weak != strong


def test_strengths_are_shares_of_the_one_at_which_fluency_halves(tiny_bridge):
    results = steering(tiny_bridge, strengths=(), controls=["none"])
    halving = results.config["fluency_halves_at"]
    assert results.config["strengths"] == [float(f"{share * halving:.2g}") for share in suite.GRID]


class NoProjector(ActivationModel):
    kind = "none"
    d_in, provenance = 24, {}

    _config = _tensors = _restore = None


def test_a_model_that_cannot_project_is_named(tiny_hooked):
    results = steering(tiny_hooked, [Entry("odd", NoProjector())], controls=["none"])
    assert "odd cannot project activations: left out of steering" in results.failures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entries": [Entry("plain", Shaken(24))]}, "labels must be unique and other than 'unsteered'"),
        ({"entries": [Entry("x", Shaken(23))]}, "width 23"),
        ({"entries": [Entry("x", Shaken(24, "blocks.2.hook_resid_post"))]}, "trained at blocks.2"),
        ({"hook": "blocks.9.hook_resid_post"}, "not in this model"),
        ({"rows": torch.full((5, 24), float("nan"))}, "finite activations"),
        ({"strengths": [0.4, 0.2]}, "rising"),
        ({"noise_seeds": [1, 1]}, "different seeds"),
        ({"controls": ["magic"]}, "controls must be one of shrink"),
        ({"prompts": 101}, "between 2 and 100"),
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
    results = steering(tiny_hooked, [entry], allow_mismatch=True, controls=["none"])
    assert results.failures[0].startswith("x was trained")
    assert "x" in set(results.frame().model)
