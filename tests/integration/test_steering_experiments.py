"""What the experiments steer towards, and the command that makes a direction."""

import json

import numpy as np
import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

from glp_lens import corpus, directions, lm
from glp_lens.directions import Direction, Response
from glp_lens.errors import InputError
from glp_lens.evals.steering import concepts, experiments
from glp_lens.evals.steering.concepts import Concept
from glp_lens.evals.steering.personas import PERSONAS, QUESTIONS
from glp_lens.models.sae import SAE
from glp_lens.pipeline import DirectionJob, direction
from tests.conftest import WORDS
from tests.integration.test_steering import Words
from tests.unit.memory_store import MemoryStore
from tests.unit.test_directions import HOOK, MONEY, SPORT, of_words
from tests.unit.test_directions_controls import TEMPLATE

KNOWN = list(dict.fromkeys(WORDS))
START = "blocks.0.hook_resid_pre"  # where a row is the word alone


def documents(n, seed=0):
    """Each of the words of one of five themes."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(np.roll(KNOWN, -26 * rng.integers(5))[:26], 45)) for _ in range(n)]


@pytest.fixture(scope="module")
def sae(tiny_hooked):
    """Its first ten latents are words, two of each theme: active on rows near the word's mean row."""
    ids = torch.tensor(lm.to_ids(tiny_hooked, documents(200, seed=9), 46))
    rows = lm.activations(tiny_hooked, ids, torch.ones_like(ids, dtype=torch.bool), [START])[START][:, 1:].flatten(0, 1)
    words = ids[:, 1:].flatten()
    model = SAE.fit(MemoryStore(rows, START), n_latents=13, k=4, rows=100, batch_size=50)
    with torch.no_grad():
        model.sae.W_enc.zero_()
        model.sae.b_enc.fill_(-1.0)
        model.sae.b_dec.copy_(rows.mean(0))
        for i in range(10):
            word = tiny_hooked.tokenizer.convert_tokens_to_ids(KNOWN[13 * i + 5])
            shift = rows[words == word].mean(0) - rows.mean(0)
            model.sae.W_enc[:, i] = shift / shift.norm() ** 2
            model.sae.W_dec[i] = shift
        model.sae.b_enc[:10] = -0.6
    return model


def test_latents_are_chosen_on_other_documents_than_they_are_judged_on(tiny_hooked, sae):
    texts = documents(600)
    tasks = experiments.features(tiny_hooked, START, sae, Words(), n=2, texts=texts, seed=1)
    assert len(tasks) == 2
    for task in tasks:
        latent = int(task.concept.name.removeprefix("latent "))
        row = sae.sae.W_dec[latent].detach()
        torch.testing.assert_close(task.direction.vector, row / row.norm())
        chosen_on = {text for text in texts if any(p in text for p in (*task.concept.positive, *task.concept.negative))}
        judged_on = {text for text in texts if any(p in text for p in task.concept.judge_texts)}
        assert chosen_on
        assert judged_on
        assert not chosen_on & judged_on
        assert all(len(piece.split()) == experiments.PIECE_WORDS for piece in task.concept.judge_texts)
        # Each piece alone: those of the concept activate the latent more than any other.
        activity = []
        for piece in task.concept.judge_texts:
            tokens, mask = lm.pad(lm.to_ids(tiny_hooked, [piece], 99))
            rows = lm.activations(tiny_hooked, tokens, mask, [START])[START][0, 1:]
            activity.append(float(sae.encode(rows)[:, latent].max()))
        labels = np.array(task.concept.judge_labels)
        assert 0.2 < labels.mean() < 0.3
        assert np.array(activity)[labels == 1].min() >= np.array(activity)[labels == 0].max() - 1e-3
    again = experiments.features(tiny_hooked, START, sae, Words(), n=2, texts=texts, seed=1)
    assert [task.concept for task in again] == [task.concept for task in tasks]


def test_held_out_documents_fall_into_both_halves():
    """They were held out by a hash of their beginnings, which must not decide the half too."""
    texts = [f"document {i}: " + " ".join(str(i * j) for j in range(60)) for i in range(3000)]
    halves = experiments._halves([d.text for d in corpus.split_documents(texts, "heldout")], 10_000)
    shares = np.array([len(half) for half in halves]) / sum(map(len, halves))
    assert shares.min() > 0.3


def test_latents_that_no_text_tells_of_are_refused(tiny_hooked, sae):
    with pytest.raises(InputError, match="can be judged by its texts"):
        experiments.features(tiny_hooked, START, sae, Words(), texts=documents(40))


def test_topics_hold_out_texts_beyond_those_of_the_vector(tiny_hooked, monkeypatch):
    toy = Concept("toy", of_words(SPORT, 90, 0), of_words(MONEY, 33, 1), ["a", "b"], [0, 1])
    monkeypatch.setattr(concepts, "load", lambda name, seed: toy)
    (task,) = experiments.tasks("topics", tiny_hooked, HOOK, names=["toy"], texts_per_side=40)
    assert task.concept is toy
    assert task.prompts is None
    assert task.direction.provenance["texts"] | {"hash": ""} == {
        "positive": 40, "negative": 26, "held_out": [10, 7], "hash": "",
    }  # fmt: skip
    assert task.direction.name == "toy"
    # The control of the same texts, which are not read twice for it.
    control = directions.random_labels(tiny_hooked, toy.positive[:40], toy.negative[:40], HOOK, held_out=0)
    torch.testing.assert_close(task.shuffled.vector, control.vector, atol=1e-4, rtol=1e-3)
    assert task.shuffled.provenance == control.provenance
    kept = experiments.Task.from_json(json.loads(json.dumps(task.to_json())))
    assert (kept.concept, kept.prompts, kept.shuffled.name) == (toy, None, "random labels")
    assert torch.equal(kept.shuffled.vector, task.shuffled.vector)
    by_probe = experiments.tasks("sentiment", tiny_hooked, HOOK, names=["toy"], texts_per_side=40, method="probe")
    assert by_probe[0].direction.method == "probe"


def test_personas_are_judged_and_steered_on_other_questions(tiny_hooked, monkeypatch):
    monkeypatch.setattr(tiny_hooked.tokenizer, "chat_template", TEMPLATE)
    asked = []

    def respond(model, systems, questions, *, new_tokens, seed):
        asked.append(set(questions))
        words = SPORT if systems == PERSONAS["pirate"].towards else MONEY
        rng = np.random.default_rng([seed, len(words)])
        turns = [(system, question) for system in systems for question in questions]
        return [Response(*turn, " ".join(rng.choice(words, 6))) for turn in turns]

    monkeypatch.setattr(directions, "respond", respond)
    (task,) = experiments.tasks("persona", tiny_hooked, HOOK, names=["pirate"], prompts=7)
    assert asked[0] == asked[1]
    assert asked[2] == asked[3]
    assert not asked[0] & asked[2]
    left = [question for question in QUESTIONS if question not in asked[0] | asked[2]]
    assert set(task.prompts) <= {directions.chat_prompt(tiny_hooked, question) for question in left}
    assert len(task.prompts) == 7
    used = {*task.concept.positive, *task.concept.negative}
    assert not used & {*task.concept.judge_texts}
    for text, label in zip(task.concept.judge_texts, task.concept.judge_labels, strict=True):
        assert set(text.split()) <= set(SPORT if label else MONEY)
    assert task.direction.auroc.value > 0.9
    assert task.direction.provenance["responses"]["held_out_questions"] == 6


def test_questions_and_personas_are_distinct():
    assert len({question.casefold() for question in QUESTIONS}) == len(QUESTIONS) == 120
    for name, persona in PERSONAS.items():
        assert persona.name == name
        assert not {*persona.towards} & {*persona.away}


@pytest.mark.parametrize(
    ("experiment", "options", "message"),
    [
        ("topics", {"names": ["cheese"]}, "concept must be one of"),
        ("persona", {"names": ["cheese"]}, "persona must be one of pirate"),
        ("persona", {"prompts": 99}, "between 1 and 40, got 99"),
        ("features", {}, "needs a sparse autoencoder and sentence embeddings"),
        ("cheese", {}, "experiment must be"),
    ],
)
def test_experiments_that_cannot_be_are_one_line(tiny_hooked, experiment, options, message):
    with pytest.raises(InputError, match=message):
        experiments.tasks(experiment, tiny_hooked, HOOK, **options)


@pytest.fixture
def sides(tmp_path):
    (tmp_path / "sport.txt").write_text("\n\n".join(of_words(SPORT, 30, 0)))
    (tmp_path / "money.csv").write_text("body\n" + "\n".join(of_words(MONEY, 25, 1)))
    return ["--positive-texts", str(tmp_path / "sport.txt"), "--negative-texts", str(tmp_path / "money.csv")]


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".pt", ".npy"])
def test_the_command_writes_a_direction_of_the_texts(tiny_folder, tmp_path, sides, suffix):
    out = tmp_path / f"d{suffix}"
    line = ["direction", "--model", str(tiny_folder), "--lm-dtype", "float32", "--hook", HOOK, *sides, "--read", "mean",
            "--text-column", "body", "--texts-per-side", "20", "--out", str(out)]  # fmt: skip
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (result.exception, result.stderr)
    assert "held-out AUROC" in result.stdout
    model = lm.open_model(str(tiny_folder), dtype="float32")
    expected = directions.from_texts(
        model, of_words(SPORT, 30, 0)[:20], of_words(MONEY, 25, 1)[:20], HOOK, read="mean", name="sport"
    )
    back = directions.read(out, HOOK)
    torch.testing.assert_close(back.vector, expected.vector, atol=1e-5, rtol=1e-4)
    assert back.norm == pytest.approx(expected.norm, rel=1e-4)
    if suffix == ".safetensors":
        assert (back.name, back.auroc) == ("sport", expected.auroc)
    again = CliRunner().invoke(app, line)
    assert again.exit_code == 2
    assert "already exists" in again.stderr


def test_a_job_takes_a_packaged_concept(tiny_hooked, tmp_path, monkeypatch):
    toy = Concept("sports", of_words(SPORT, 30, 0), of_words(MONEY, 33, 1), ["a", "b"], [0, 1])
    monkeypatch.setattr(concepts, "load", lambda name, seed: toy)
    lines = []
    made = direction(
        DirectionJob(concept="sports", texts_per_side=25, method="pca", hook=HOOK, out=tmp_path / "s.safetensors"),
        model=tiny_hooked, say=lines.append,
    )  # fmt: skip
    assert torch.equal(Direction.load(tmp_path / "s.safetensors").vector, made.vector)
    assert (made.name, made.method, made.provenance["texts"]["positive"]) == ("sports", "pca", 20)
    assert lines[-1] == f"direction: {tmp_path / 's.safetensors'}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "pass either"),
        ({"positive_texts": "a.txt"}, "pass either"),
        ({"concept": "sports", "positive_texts": "a.txt"}, "pass either"),
        ({"concept": "sports", "out": "d.bin"}, "must be a .safetensors, .gguf, .pt or .npy file"),
    ],
)
def test_jobs_that_cannot_be_are_one_line(settings, message):
    with pytest.raises(InputError, match=message):
        DirectionJob(**settings)


def test_texts_that_cannot_be_read_are_one_line(tiny_hooked, tmp_path):
    job = DirectionJob(positive_texts=tmp_path / "no.txt", negative_texts=tmp_path / "no.txt", out=tmp_path / "d.npy")
    with pytest.raises(InputError, match="texts cannot be read"):
        direction(job, model=tiny_hooked)
