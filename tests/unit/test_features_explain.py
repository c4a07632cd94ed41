"""Explanations and their tests against a server on this machine that knows, or does not know, the answers."""

import re

import numpy as np
import pandas as pd
import pytest

from glp_lens.endpoint import Endpoint, EndpointSettings
from glp_lens.errors import InputError
from glp_lens.features import FeatureFolder
from glp_lens.features.cases import cases, neighbours, shown
from glp_lens.features.explain import Case, Explainer, Passage, columns_of
from glp_lens.features.passages import Passages, Watched
from tests.unit.feature_folder import DEAD, GLP, SAE, write_features
from tests.unit.test_steering_hosted import KEY, server  # noqa: F401

PASSAGE = re.compile(r"(\d+)\. <passage>(.*?)</passage>", re.DOTALL)


def endpoint_of(server, folder=None, **options):  # noqa: F811
    url = f"http://127.0.0.1:{server.server_port}/v1"
    settings = EndpointSettings(hosted_url=url, hosted_model="big", hosted_key="JUDGE_KEY", **options)
    return Endpoint(settings, folder, backoff=0.001)


def passage(words, peak):
    """A passage of words in which a feature is on at one of them."""
    values = np.zeros(len(words))
    values[peak] = 2.0
    return Passage([f" {word}" for word in words], values)


def case(feature=3, n=12):
    rng = np.random.default_rng(feature)
    words = [[*rng.choice(["the", "old", "river"], 4), "goal", *rng.choice(["was", "here"], 3)] for _ in range(n)]
    off = [" the old river was here" + f" {i}" for i in range(n)]
    return Case(feature, [passage(each, 4) for each in words], off, [" near a coach"] * 3 + off[:4])


def knowing(text, n):
    """An answer that knows that the feature is on at `goal`."""
    if "said to be about" not in text:
        return "They share a word.\nExplanation: **the word goal**"
    assert "about: the word goal" in text
    marks = "«" in text
    return "\n".join(f"{i}: {3 * (('« goal»' if marks else 'goal') in words)}" for i, words in PASSAGE.findall(text))


def test_an_explanation_that_is_right_has_the_best_scores(server, tmp_path):  # noqa: F811
    server.reply = knowing
    explainer = Explainer(endpoint_of(server, tmp_path, hosted_prompt_price=2.0), seed=1)
    given = [case(), case(9, 5)]
    texts = explainer.explain([each.active[:3] for each in given])
    assert texts == ["the word goal"] * 2
    asked = server.requests[0][2]["messages"]
    assert "« goal»" in asked[1]["content"]
    assert "only material" in asked[0]["content"]
    made = explainer.test(given, texts).set_index("feature")
    assert made["explanation"].tolist() == texts
    assert made["n"].tolist() == [12, 5]
    for test in ("detection", "neighbours", "fuzzing"):
        value, low, high, accuracy = (made[column] for column in columns_of(test))
        assert (value == 1).all()
        assert (accuracy == 1).all()
        assert (low < 1).all()
        assert (high == 1).all()
    assert explainer.endpoint.usage.unparsable == 0
    assert explainer.endpoint.usage.cost == pytest.approx(explainer.endpoint.usage.asked * 100 * 2 / 1e6)
    asked = explainer.endpoint.usage.asked
    again = Explainer(endpoint_of(server, tmp_path), seed=1)
    pd.testing.assert_frame_equal(
        again.test(given, again.explain([e.active[:3] for e in given])).set_index("feature"), made
    )
    assert (again.endpoint.usage.asked, again.endpoint.usage.cached, again.endpoint.usage.cost) == (0, asked, 0)
    assert all(KEY not in path.read_text() for path in tmp_path.rglob("*.json"))


def test_an_explanation_that_tells_nothing_is_at_chance(server):  # noqa: F811
    server.reply = lambda text, n: "\n".join(f"{i}: {(7 * int(i) + n) % 4}" for i, _ in PASSAGE.findall(text))
    made = Explainer(endpoint_of(server, hosted_concurrency=1)).test([case(n=20)], ["anything"]).iloc[0]
    for test in ("detection", "fuzzing"):
        assert made[f"{test}_low"] < 0.5 < made[f"{test}_high"]
    server.reply = lambda text, n: "\n".join(f"{i}: 1" for i, _ in PASSAGE.findall(text))
    made = Explainer(endpoint_of(server)).test([case(n=20)], ["anything"]).iloc[0]
    assert (made["detection"], made["detection_accuracy"], made["fuzzing"]) == (0.5, 0.5, 0.5)


def test_questions_do_not_tell_their_answers(server):  # noqa: F811
    """Active passages stand at all places of a question, and no passage stands in one with both marks."""
    server.reply = knowing
    Explainer(endpoint_of(server), seed=4).test([case(n=40)], ["the word goal"])
    contents = [body["messages"][1]["content"] for _, _, body in server.requests]
    places = [int(i) for text in contents if "«" not in text for i, words in PASSAGE.findall(text) if "goal" in words]
    assert set(places) == set(range(1, 11))
    right = 0
    for text in (text for text in contents if "«" in text):
        words = [re.sub("[«»]", "", each) for _, each in PASSAGE.findall(text)]
        assert len({*words}) >= len(words) - 3  # of few words, so that different passages may be alike
        right += len(re.findall("« goal»", text))
        assert "«" not in "".join(words)
    assert right == 40  # each once, and once with another token marked


def test_answers_without_ratings_are_counted_and_left_out(server):  # noqa: F811
    server.reply = lambda text, n: "I cannot." if "«" in text else knowing(text, n)
    explainer = Explainer(endpoint_of(server))
    made = explainer.test([case()], ["the word goal"]).iloc[0]
    assert made["detection"] == 1
    assert np.isnan([made[column] for column in columns_of("fuzzing")]).all()
    assert explainer.endpoint.usage.unparsable == 4
    server.reply = lambda text, n: "Nothing."
    assert explainer.explain([case().active]) == [""]
    untold = explainer.test([case()], [""]).iloc[0]
    assert (untold["explanation"], untold["n"]) == ("", 12)
    assert np.isnan(untold["detection"])


def test_passages_hold_no_marks_but_ours():
    one = Passage([" «x»", " y", " z"], np.array([1.0, 0.6, 0.1]))
    assert one.text(one.marked()) == '« "x"»« y» z'
    assert one.unmarked(np.random.default_rng(0)) == []  # two are marked, and only one is off


def test_an_endpoint_is_needed():
    with pytest.raises(InputError, match="a hosted model needs hosted_url"):
        Endpoint(EndpointSettings())


def watched_of(folder, model, features):
    return Watched.of(folder, model.label, None, np.array(features))


def test_what_is_shown_is_not_tested_and_inactive_passages_are_of_other_texts(tmp_path):
    folder = write_features(tmp_path)
    features = [f for f in range(8) if f != DEAD]
    watched = {GLP.label: watched_of(folder, GLP, list(range(24))), SAE.label: watched_of(folder, SAE, [0, 3, 7])}
    rng = np.random.default_rng(0)
    peaks = {GLP.label: rng.normal(size=(1, 60, 24)), SAE.label: rng.normal(size=(1, 60, 3))}
    peaks = {label: each.astype(np.float32) for label, each in peaks.items()}
    passages = Passages(np.arange(60), [np.full(9, i) for i in range(60)], peaks)
    made = cases(
        folder, GLP.label, features, watched, passages, lambda ids: [f" p{i}" for i in ids.tolist()],
        most_shown=2, tested=6, seed=0,
    )  # fmt: skip
    seen = shown(folder, GLP.label, features, 2)
    assert [each.feature for each in made] == features
    examples = folder.table(GLP.label, "examples").query("group == 'top'")
    for each, own, feature in zip(made, seen, features, strict=True):
        top = examples[examples["feature"] == feature].sort_values("rank")
        assert [p.tokens for p in own] == [list(tokens) for tokens in top["tokens"].iloc[[0, 2]]]
        assert [p.tokens for p in each.active[:2]] == [list(tokens) for tokens in top["tokens"].iloc[[1, 3]]]
        assert len(each.active) == 6  # the others from bands
        assert all(p.values.max() > 0 for p in each.active)
        own_peaks = peaks[GLP.label][0, :, feature]
        numbers = [int(text.split(" p")[1]) for text in each.random]
        assert len(numbers) == 6
        assert (own_peaks[numbers] <= np.median(own_peaks)).all()
        assert all(text.count(" p") == 7 for text in each.random)  # as long as the active ones
        near = [int(text.split(" p")[1]) for text in each.neighbours]
        assert (own_peaks[near] <= np.median(own_peaks)).all()


def test_neighbours_are_the_nearest_of_each_kind_and_never_the_feature_itself(tmp_path):
    folder = write_features(tmp_path)
    rows = [(5, "direction", "glp", 5, 1.0), (5, "direction", "glp", 6, 0.2), (5, "direction", "my sae", 5, 0.9),
            (5, "activation", "glp", 6, 0.8), (7, "activation", "glp", 1, 0.1)]  # fmt: skip
    folder.write_table(GLP, "neighbours", pd.DataFrame(rows, columns=["feature", "by", "model", "other", "value"]))
    assert neighbours(folder, "glp", [5, 8]) == {5: [("my sae", 5), ("glp", 6)], 8: []}
    (tmp_path / "glp" / "neighbours.parquet").unlink()
    assert neighbours(FeatureFolder.open(tmp_path), "glp", [5]) == {5: []}
