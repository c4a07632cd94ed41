import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from glp_lens import lm
from glp_lens.directions import Direction, estimate, from_rows, from_texts, span_activations, text_activations
from glp_lens.errors import InputError
from glp_lens.intervals import Interval
from tests.conftest import WORDS, tiny_texts

HOOK = "blocks.1.hook_resid_post"
SPORT = ["team", "game", "match", "goal", "player", "coach"]
MONEY = ["bank", "money", "market", "price", "stock"]


def of_words(words, n, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice([*words, *WORDS[:4]], 9)) for _ in range(n)]


def classes(n=300, m=260, d=7, seed=0):
    """Gaussian rows of unequal variances; the classes differ along `shift`."""
    rng = np.random.default_rng(seed)
    scales = np.array([1.0, 0.3, 2.0, 5.0, 0.1, 1.0, 0.7])[:d]
    shift = np.array([1.0, 0.3, 0.0, 0.0, 0.1, 0.0, 0.0])[:d]
    a, b = rng.standard_normal((n, d)) * scales + shift, rng.standard_normal((m, d)) * scales
    return torch.from_numpy(a), torch.from_numpy(b), scales, shift


def cosine(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float(a @ b / (a.norm() * b.norm()))


def test_a_direction_of_any_vector_has_norm_one_and_remembers_the_length():
    vector = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float16)
    found = Direction.of(vector, HOOK, name="x", method="mean")
    assert found.norm == pytest.approx(5.0)
    torch.testing.assert_close(found.vector, torch.tensor([0.6, -0.8, 0.0]))


@pytest.mark.parametrize(
    ("vector", "message"),
    [(torch.zeros(3), "is 0 everywhere"), (torch.tensor([1.0, np.nan]), "not finite"), (torch.ones(2, 3), r"\(2, 3\)")],
)
def test_a_vector_that_points_nowhere_is_refused(vector, message):
    with pytest.raises(InputError, match=message):
        Direction.of(vector, HOOK, name="x", method="mean")


def test_a_saved_direction_comes_back_whole(tmp_path):
    vector = torch.randn(11, generator=torch.Generator().manual_seed(0))
    made = Direction.of(vector, HOOK, name="sports ⚽", method="pca", auroc=Interval(0.9, 0.85, 0.94, 50),
                        provenance={"model": {"name": "m"}, "texts": [3, 4]})  # fmt: skip
    back = Direction.load(made.save(tmp_path / "a" / "b.safetensors"))
    assert torch.equal(back.vector, made.vector)
    assert [getattr(back, n) for n in ("hook", "name", "method", "auroc", "provenance", "norm")] == [
        getattr(made, n) for n in ("hook", "name", "method", "auroc", "provenance", "norm")
    ]
    assert Direction.load(
        Direction.of(vector, HOOK, name="n", method="file").save(tmp_path / "c.safetensors")
    ).auroc is None  # fmt: skip


def test_files_that_hold_no_direction_are_one_line(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Direction.load(tmp_path / "no.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(InputError, match="cannot be read"):
        Direction.load(tmp_path / "cut.safetensors")
    save_file({"vector": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not saved by this package"):
        Direction.load(tmp_path / "other.safetensors")
    save_file({"vector": torch.ones(3)}, tmp_path / "half.safetensors", {"glp_lens_direction": json.dumps({"hook": 1})})
    with pytest.raises(InputError, match="damaged"):
        Direction.load(tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"\.safetensors"):
        Direction.of(torch.ones(3), HOOK, name="x", method="mean").save(tmp_path / "x.pt")


def test_mean_is_the_difference_of_the_means():
    a, b, _, _ = classes()
    expected = a.numpy().mean(0) - b.numpy().mean(0)
    np.testing.assert_allclose(estimate(a, b, "mean").numpy(), expected, rtol=1e-12)


def test_a_probe_finds_the_best_linear_discriminant():
    """For Gaussian classes of one covariance that is its inverse times the shift."""
    a, b, scales, shift = classes(4000, 3500)
    assert cosine(estimate(a, b, "probe"), shift / scales**2) > 0.98
    assert cosine(estimate(a, b, "mean"), shift / scales**2) < 0.9


def test_a_probe_is_the_logistic_regression_in_activation_units():
    a, b, _, _ = classes()
    x, y = torch.cat([a, b]).numpy(), np.repeat([1, 0], [len(a), len(b)])
    scaler = StandardScaler().fit(x)
    found = estimate(a, b, "probe").numpy()
    candidates = [
        LogisticRegression(C=C, max_iter=2000).fit(scaler.transform(x), y).coef_[0] / scaler.scale_
        for C in np.logspace(-4, 1, 6)
    ]
    assert min(np.abs(found - candidate).max() / np.abs(found).max() for candidate in candidates) < 1e-3


def test_pca_of_differences_is_their_first_principal_direction():
    a, _, _, _ = classes(80)
    v = np.array([0.0, 3.0, 0.0, -4.0, 0.0, 0.0, 0.0]) / 5
    steps = np.random.default_rng(1).normal(6, 2, 80)
    b = a - torch.from_numpy(steps[:, None] * v)
    found = estimate(a, b, "pca").numpy()
    np.testing.assert_allclose(found, v * np.sqrt((steps**2).mean()), atol=1e-9)
    np.testing.assert_allclose(estimate(b, a, "pca").numpy(), -found, atol=1e-9)


def test_methods_refuse_rows_they_cannot_use():
    a, b, _, _ = classes(6, 5)
    with pytest.raises(InputError, match="got 6 and 5"):
        estimate(a, b, "pca")
    with pytest.raises(InputError, match="at least 5 rows of each class, got 6 and 3"):
        estimate(a, b[:3], "probe")
    with pytest.raises(InputError, match="method must be"):
        estimate(a, b, "magic")
    with pytest.raises(InputError, match="same mean activation"):
        from_rows(a, a, HOOK)


def test_the_auroc_is_that_of_the_projection_of_rows_the_vector_has_not_seen():
    a, b, _, _ = classes()
    c, d, _, _ = classes(90, 70, seed=5)
    found = from_rows(a, b, HOOK, held_out=(c, d))
    scores = torch.cat([c, d]) @ found.vector.double()
    assert found.auroc.value == pytest.approx(roc_auc_score(np.repeat([1, 0], [90, 70]), scores.numpy()))
    assert found.auroc.ci_low < found.auroc.value < found.auroc.ci_high
    assert found.auroc.n == 160


def test_rows_of_texts_are_those_of_each_text_alone(tiny_model):
    texts = tiny_texts(7)
    last = text_activations(tiny_model, texts, HOOK, context=12, batch_size=3)
    mean = text_activations(tiny_model, texts, HOOK, context=12, batch_size=3, read="mean")
    for i, text in enumerate(texts):
        tokens, mask = lm.pad(lm.to_ids(tiny_model, [text], 12, truncate="left"))
        alone = lm.activations(tiny_model, tokens, mask, [HOOK])[HOOK][0]
        torch.testing.assert_close(last[i], alone[-1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mean[i], alone[1:].mean(0), atol=1e-5, rtol=1e-4)


def test_known_texts_are_not_read_again(tiny_model, monkeypatch):
    texts = tiny_texts(9)
    fresh, first = (text_activations(tiny_model, some, HOOK, batch_size=4) for some in (texts, texts[2:7]))
    known = {}
    assert torch.equal(text_activations(tiny_model, texts[2:7], HOOK, batch_size=4, known=known), first)
    read = []
    monkeypatch.setattr(
        lm, "to_ids", lambda model, new, *a, _real=lm.to_ids, **k: read.extend(new) or _real(model, new, *a, **k)
    )
    rows = text_activations(tiny_model, texts[::-1], HOOK, batch_size=4, known=known)
    assert read == [*texts[:6:-1], *texts[1::-1]]
    torch.testing.assert_close(rows, fresh.flip(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(rows[2:7], first.flip(0))
    assert torch.equal(text_activations(tiny_model, texts[::-1], HOOK, known=known), rows)
    assert len(read) == 4


def test_spans_are_averaged_from_their_start(tiny_model):
    ids = lm.to_ids(tiny_model, tiny_texts(5), 30)
    starts = [3, 1, 4, 2, 500]
    found = span_activations(tiny_model, ids, starts, HOOK, batch_size=2)
    for i, (row, start) in enumerate(zip(ids, starts, strict=True)):
        tokens, mask = lm.pad([row])
        alone = lm.activations(tiny_model, tokens, mask, [HOOK])[HOOK][0]
        torch.testing.assert_close(found[i], alone[min(start, len(row) - 1) :].mean(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["mean", "probe", "pca"])
def test_from_texts_finds_a_direction_that_tells_new_texts_apart(tiny_hooked, method):
    a, b = of_words(SPORT, 60, 0), of_words(MONEY, 50, 1)
    found = from_texts(tiny_hooked, a, b, HOOK, method=method, name="sport", read="mean", batch_size=17)
    assert (found.hook, found.name, found.method) == (HOOK, "sport", method)
    assert float(found.vector.norm()) == pytest.approx(1, abs=1e-6)
    if method != "pca":  # of random pairs, pca may find what varies most in both
        assert found.auroc.value > 0.75
    rows = text_activations(tiny_hooked, [*of_words(SPORT, 40, 2), *of_words(MONEY, 40, 3)], HOOK, read="mean")
    fresh = roc_auc_score(np.repeat([1, 0], 40), (rows @ found.vector).numpy())
    assert abs(fresh - found.auroc.value) < 0.2
    assert found.provenance["model"]["name"]
    n = (40, 40) if method == "pca" else (48, 40)
    assert (found.provenance["texts"]["positive"], found.provenance["texts"]["negative"]) == n
    json.dumps(found.provenance)


def test_held_out_texts_have_no_part_in_the_vector(tiny_hooked, monkeypatch):
    from glp_lens.directions import texts as module

    seen = []
    real = module.text_activations
    monkeypatch.setattr(module, "text_activations", lambda m, t, *a, **k: seen.append(list(t)) or real(m, t, *a, **k))
    a, b = of_words(SPORT, 20, 0), of_words(MONEY, 25, 1)
    a[3] = a[7] = a[11]  # copies: held out and trained on must not share them
    for seed in range(4):
        found = from_texts(tiny_hooked, a, b, HOOK, seed=seed)
        n = [found.provenance["texts"]["positive"], found.provenance["texts"]["negative"]]
        train = seen[-1][: sum(n)]
        assert not {*train} & {*seen[-1][sum(n) :]}
        alone = from_texts(tiny_hooked, train[: n[0]], train[n[0] :], HOOK, held_out=0)
        torch.testing.assert_close(found.vector, alone.vector, atol=1e-5, rtol=1e-4)
        assert alone.auroc is None
    repeated = from_texts(tiny_hooked, a, b, HOOK, seed=3)
    assert torch.equal(repeated.vector, found.vector)
    assert repeated.auroc == found.auroc


def test_pairs_are_held_out_together(tiny_hooked, monkeypatch):
    from glp_lens.directions import texts as module

    seen = []
    real = module.text_activations
    monkeypatch.setattr(module, "text_activations", lambda m, t, *a, **k: seen.append(list(t)) or real(m, t, *a, **k))
    a = of_words(SPORT, 15, 0)
    b = [text + " money" for text in a]
    from_texts(tiny_hooked, a, [*b, "a text of no pair"], HOOK, method="pca")
    parts = np.split(np.array(seen[0]), [12, 24, 27])
    assert [text + " money" for text in parts[0]] == list(parts[1])
    assert [text + " money" for text in parts[2]] == list(parts[3])
    assert "a text of no pair" not in seen[0]


@pytest.mark.parametrize(
    ("positive", "negative", "options", "message"),
    [
        (["one two"] * 9, [" "], {}, "not empty"),
        (["one two"] * 9, ["three four"] * 3, {}, "at least 4 texts of each side, got 9 and 3"),
        (["one two"] * 9, ["three four"] * 9, {}, "all texts of a side equal one that is held out"),
        (["one two"] * 9, ["three four"] * 9, {"held_out": 1.0}, r"held_out must lie in \[0, 1\)"),
        (["one two"] * 9, ["one two"] * 9, {"held_out": 0}, "same mean activation"),
    ],
)
def test_texts_that_give_no_direction_are_one_line(tiny_hooked, positive, negative, options, message):
    with pytest.raises(InputError, match=message):
        from_texts(tiny_hooked, positive, negative, HOOK, **options)
