import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from glp_lens import hooks, lm
from glp_lens.activations import write_store
from glp_lens.directions import (
    Response,
    chat_prompt,
    clamp_latents,
    class_means,
    from_responses,
    from_texts,
    random_covariance,
    random_isotropic,
    random_labels,
    respond,
    response_activations,
    sae_latent,
)
from glp_lens.errors import InputError
from glp_lens.models.glp import GLP
from glp_lens.models.sae import SAE
from glp_lens.training.config import TrainConfig
from tests.conftest import tiny_texts
from tests.unit.memory_store import MemoryStore
from tests.unit.test_directions import HOOK, MONEY, SPORT, of_words

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %} reply {% endif %}"
)
D = 24


@pytest.fixture(scope="module")
def sae():
    """Of the width of the tiny model; each latent has a decoder row of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 9, generator=generator).relu() @ torch.randn(9, D, generator=generator) + 1
    return SAE.fit(MemoryStore(x, HOOK), n_latents=31, k=4, rows=6000, batch_size=100)


def test_random_directions_are_isotropic_and_seeded():
    vectors = torch.stack([random_isotropic(5, HOOK, seed=seed).vector for seed in range(2000)])
    torch.testing.assert_close(vectors.T @ vectors / 2000, torch.eye(5) / 5, atol=0.02, rtol=0)
    assert torch.equal(vectors[7], random_isotropic(5, HOOK, seed=7).vector)


def test_random_directions_have_the_covariance_of_the_store(tmp_path):
    """Unscaled draws have it exactly: here their mean square is compared along and across the main axis."""
    root = torch.diag(torch.tensor([9.0, 1.0, 0.5, 0.1])) + 0.3
    x = torch.randn(5001, 4, generator=torch.Generator().manual_seed(0)) @ root + 50  # a mean that is no part of it
    store = write_store(tmp_path / "s", x, hook=HOOK)
    draws = [random_covariance(store, rows=1500, seed=seed) for seed in range(300)]
    v = torch.stack([each.norm * each.vector for each in draws]).double()
    expected = torch.cov(x.T.double())
    assert (v.T @ v / len(v) - expected).norm() < 0.15 * expected.norm()
    assert torch.equal(draws[3].vector, random_covariance(store, rows=1500, seed=3).vector)
    assert draws[0].hook == HOOK


def test_shuffled_labels_give_no_direction_of_the_concept(tiny_hooked):
    a, b = of_words(SPORT, 60, 0), of_words(MONEY, 60, 1)
    true = from_texts(tiny_hooked, a, b, HOOK, read="mean", held_out=0)
    shuffled = [random_labels(tiny_hooked, a, b, HOOK, read="mean", held_out=0, seed=seed) for seed in range(3)]
    assert all(each.name == "random labels" for each in shuffled)
    assert all(each.norm < 0.7 * true.norm for each in shuffled)
    assert not torch.equal(shuffled[0].vector, shuffled[1].vector)


def test_a_latents_direction_is_its_decoder_row(sae):
    found = sae_latent(sae, 5)
    row = sae.sae.W_dec[5].detach()
    torch.testing.assert_close(found.vector, row / row.norm())
    assert (found.hook, found.name, found.method) == (HOOK, "latent 5", "sae")
    for index in (-1, 31):
        with pytest.raises(InputError, match=f"no latent {index}: this autoencoder has 31"):
            sae_latent(sae, index)


def test_clamping_sets_latents_and_keeps_the_error(sae):
    x = torch.randn(13, D, generator=torch.Generator().manual_seed(1)) * 2 + 1
    f = sae.encode(x)
    active = int((f > 0).sum(0).argmax())
    found = clamp_latents(sae, {active: 7.5, 0: 0.0})(x)
    row = sae.sae.decode(torch.eye(31)) - sae.sae.decode(torch.zeros(1, 31))
    expected = x + (7.5 - f[:, [active]]) * row[active] - f[:, [0]] * row[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    as_they_are = {active: float(f[3, active]), 0: float(f[3, 0])}
    torch.testing.assert_close(clamp_latents(sae, as_they_are)(x)[3], x[3], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="at least one latent"):
        clamp_latents(sae, {})
    with pytest.raises(InputError, match="no latent 99"):
        clamp_latents(sae, {99: 1.0})


def test_clamping_works_as_a_hook(sae, tiny_model):
    tokens, mask = lm.pad(lm.to_ids(tiny_model, tiny_texts(3), 12))
    before = lm.activations(tiny_model, tokens, mask, [HOOK])[HOOK][:, -1].float()
    rows = []
    edit = hooks.edit(clamp_latents(sae, {3: 20.0}), mask=mask, model=tiny_model)
    fns = [(HOOK, edit), (HOOK, lambda x, hook: rows.append(x[torch.arange(3), mask.sum(1) - 1]) or x)]
    lm.token_nll(tiny_model, tokens, mask, fns)
    last = lm.activations(tiny_model, tokens, mask, [HOOK])[HOOK][torch.arange(3), mask.sum(1) - 1]
    torch.testing.assert_close(rows[0], clamp_latents(sae, {3: 20.0})(last), atol=1e-4, rtol=1e-4)
    assert before.shape == (3, D)


@pytest.fixture
def chatty(tiny_model, monkeypatch):
    monkeypatch.setattr(tiny_model.tokenizer, "chat_template", TEMPLATE)
    return tiny_model


def test_answers_are_to_each_question_under_each_system_prompt(chatty):
    systems, questions = ["cat dog", "money"], ["the bird", "one fish two", "the moon and sun"]
    found = respond(chatty, systems, questions, new_tokens=5, seed=3)
    assert found == respond(chatty, systems, questions, new_tokens=5, seed=3)
    assert found != respond(chatty, systems, questions, new_tokens=5, seed=4)
    assert {(each.system, each.question) for each in found} <= {(s, q) for s in systems for q in questions}
    assert len(found) >= 4
    assert all(0 < len(each.text.split()) <= 5 for each in found)
    one = respond(chatty, ["cat dog"], ["the bird"], new_tokens=6, temperature=0)[0]
    prompt = lm.chat_ids(chatty, [[("system", "cat dog"), ("user", "the bird")]], 99, reply=True)
    alone = lm.generate(chatty, torch.tensor(prompt), 6)[0, len(prompt[0]) :].tolist()
    end = next((i for i, token in enumerate(alone) if token in chatty.tokenizer.all_special_ids), 6)
    assert one.text == chatty.tokenizer.decode(alone[:end])


def test_rows_of_answers_are_means_over_their_tokens_alone(chatty):
    answers = [Response("cat dog", "the bird", "team game"), Response("", "one fish two", "goal player coach win")]
    for system in (True, False):
        found = response_activations(chatty, answers, HOOK, system=system, batch_size=1)
        for each, row in zip(answers, found, strict=True):
            turns = [("system", each.system)] if each.system and system else []
            ids = lm.chat_ids(chatty, [[*turns, ("user", each.question)]], 99, reply=True)[0]
            n = len(each.text.split())
            ids += chatty.tokenizer(each.text, add_special_tokens=False)["input_ids"]
            rows = lm.activations(chatty, *lm.pad([ids]), [HOOK])[HOOK][0]
            torch.testing.assert_close(row, rows[-n:].mean(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="raise context"):
        response_activations(chatty, answers, HOOK, context=5)


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_directions_of_answers_hold_out_questions(chatty, method):
    questions = tiny_texts(20)
    rng = np.random.default_rng(0)
    sides = [
        [Response(system, q, " ".join(rng.choice(words, 4))) for q in questions]
        for system, words in (("cat", SPORT), ("dog", MONEY))
    ]
    found = from_responses(chatty, *sides, HOOK, method=method, name="sporty", held_out=0.25)
    assert found.auroc.n == 10
    assert found.provenance["responses"]["held_out_questions"] == 5
    assert (found.name, found.hook) == ("sporty", HOOK)
    swapped = [[sides[0][1]._replace(text="team"), *sides[0][1:]], sides[1]]
    hashes = [
        from_responses(chatty, *of, HOOK, method=method, held_out=0).provenance["responses"]["hash"]
        for of in (sides, sides, swapped, [sides[0], [each._replace(system="") for each in sides[1]]])
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    whole = from_responses(chatty, *sides, HOOK, method=method, held_out=0)
    a, b = (response_activations(chatty, side, HOOK).double() for side in sides)
    if method == "mean":
        torch.testing.assert_close(whole.norm * whole.vector, (a.mean(0) - b.mean(0)).float(), atol=1e-4, rtol=1e-3)
        scores = torch.cat([a, b]) @ whole.vector.double()
        assert roc_auc_score(np.repeat([1, 0], 20), scores.numpy()) > 0.9
    assert whole.auroc is None
    with pytest.raises(InputError, match="at least 4 questions, got 1"):
        from_responses(chatty, sides[0][:1], sides[1][:1], HOOK)
    with pytest.raises(InputError, match="no answer to any question held out"):
        from_responses(chatty, sides[0][:10], sides[1][10:12], HOOK)


def test_a_question_as_a_text_to_continue_has_the_templates_tokens(chatty, monkeypatch):
    for template in (TEMPLATE, TEMPLATE.removeprefix("{{ bos_token }}")):
        monkeypatch.setattr(chatty.tokenizer, "chat_template", template)
        text = chat_prompt(chatty, "the bird", system="cat")
        ids = lm.chat_ids(chatty, [[("system", "cat"), ("user", "the bird")]], 99, reply=True)[0]
        bos = [lm.bos_id(chatty)]
        assert lm.to_ids(chatty, [text], 99)[0] == (ids if ids[:1] == bos else bos + ids)


def test_the_mean_of_a_conditional_priors_classes_differs_by_that_of_the_data(tmp_path):
    generator = torch.Generator().manual_seed(1)
    centres = {2: torch.tensor([4.0, 0, 0, 0, -2]), 7: torch.tensor([-4.0, 1, 0, 0, 2])}
    labels = torch.tensor([2, 7])[torch.randint(2, (3000,), generator=generator)]
    x = torch.stack([centres[int(value)] for value in labels]) + torch.randn(3000, 5, generator=generator) / 2
    store = write_store(tmp_path / "s", x, hook=HOOK, columns={"kind": labels.numpy()}, labels={"kind": "int64"})
    config = TrainConfig(batch_size=256, rows=150 * 256, lr=6e-3, ema=0.9, autocast=False)
    glp = GLP.fit(store, config, d_model=32, d_mlp=48, n_layers=2, condition="kind")
    found = class_means(glp, 2, 7, n=500)
    shift = centres[2] - centres[7]
    assert float(found.vector @ shift / shift.norm()) > 0.98
    assert found.norm == pytest.approx(float(shift.norm()), rel=0.15)
    assert (found.hook, found.name, found.provenance["classes"]) == (HOOK, "class 2 - 7", [2, 7])
    against_all = class_means(glp, 2, n=500)
    assert float(against_all.vector @ shift / shift.norm()) > 0.9
    assert against_all.norm < 0.8 * found.norm
    exaggerated = class_means(glp, 2, n=500, guidance=2)  # samples of no class have no guidance
    assert float(exaggerated.vector @ shift / shift.norm()) > 0.9
    assert exaggerated.provenance["guidance"] == 2
    with pytest.raises(InputError, match="not conditioned on the class 3: expected one of 2, 7"):
        class_means(glp, 3)
