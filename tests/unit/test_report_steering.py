"""Steering of several concepts and many methods in the report."""

import gzip
import json
import re
from pathlib import Path

import pytest

from glp_lens.evals.results import Results
from glp_lens.evals.steering import page
from glp_lens.evals.steering.analysis import analyse
from glp_lens.report import verdicts, write_report
from tests.unit.steering_frame import steering_frame
from tests.unit.test_report import Page

EARLIER = Path(__file__).parents[1] / "golden" / "steering_results.json.gz"
"""A suite's results as an earlier build wrote them, of one concept and one run."""
RUNS = ((0, "float32"), (1, "float32"), (0, "bfloat16"))
GAINS = {"glp": 0.0, "glp difference": 0.3, "gaussian": -0.3, "sae": 0.3, "shrink": 0.0, "random labels": -0.3}
CONCEPTS = ("sports", "business", "world", "china", "python", "spam")
EVIL = "<script>alert('x')</script> & co"


@pytest.fixture(scope="module")
def results():
    frame = steering_frame(GAINS, concepts=CONCEPTS, runs=RUNS, spread=0.15, texts=["plain words", EVIL])
    metrics, extras = analyse(frame, resamples=200)
    results = Results("steering", metrics=metrics, extras=extras, config={"experiment": "topics"})
    for concept, value in zip(CONCEPTS, (0.99, 0.95, 0.96, 0.97, 0.93, 0.94), strict=True):
        results.add("judge:minilm", concept, "words=15", "judge_auroc:held_out", value, n=100)
    results.add("judge:gemma3-270m", "all", "", "judge_auroc:spliced", 0.85, n=400)
    return results


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    again = Results.load(results.save(out / "steering"))
    return out, write_report([again], out).read_text(encoding="utf-8")


def test_one_table_comes_first_then_a_picture_then_all_else(written):
    out, text = written
    assert Page(text).open == []
    assert text.count("<svg") == 2
    for name in ("steering_frontier", "steering_by_concept"):
        assert (out / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    details = text.index("Against no repair, mean over concepts (6 concepts, 144 prompts)")
    assert text.index("<table") < text.index("<svg") < text.index("<details", text.index("<svg")) < details
    assert "<script" not in text


def test_verdicts_have_their_numbers_and_reasons(results, written):
    words = " ".join(" ".join(Page(written[1]).words).split())
    found = {(v.first, v.second): v for v in verdicts(results.frame())}
    assert set(found) == {(f, s) for f in ("glp", "glp difference") for s in ("plain", "shrink", "sae")}
    ahead = found["glp difference", "plain"]
    assert ahead.outcome == "ahead"
    assert ahead.sentence.startswith("GLP difference beats no repair in steering over 6 concepts: harmonic mean +0.")
    assert ahead.sentence.endswith("6 of 6 conditions hold.")
    assert ahead.detail == "By concept: ahead in sports, business, world, china, python, spam."
    unclear = found["glp", "plain"]
    assert unclear.outcome == "unclear"
    assert re.search(r"Differences below \d\.\d\d and \d\.\d\d could not have been seen\.", unclear.detail)
    assert found["glp", "sae"].outcome == "behind"
    assert "no clear difference anywhere" in words
    assert "replicates, difference to no repair" in words
    for told in ("0.930 to 0.990", "6 concepts", "AUROC, spliced", "0.850"):
        assert told in words


def test_a_method_in_focus_is_told_from_its_side(results):
    found = {(v.first, v.second): v.outcome for v in verdicts(results.frame(), focus="gaussian")}
    assert found == {("gaussian", other): "behind" for other in ("plain", "shrink", "sae")}
    of_sae = {(v.first, v.second): v.outcome for v in verdicts(results.frame(), focus="sae")}
    assert of_sae["sae", "plain"] == "ahead"
    assert of_sae["sae", "gaussian"] == "ahead"
    assert ("plain", "sae") not in of_sae


def test_replicates_are_not_taken_for_the_main_run(results):
    shown = page.text_table(results).splitlines()
    assert len(shown) == len(GAINS) + 1  # a line a method, over all concepts, of the main run alone
    rows = {m.model: m.value for m in results.metrics
            if m.task == "all" and str(m.setting).startswith("alpha=chosen") and m.metric == "harmonic"
            and m.setting.get("noise_seed") is None}  # fmt: skip
    for line in shown:
        label = next(label for label in sorted(rows, key=len, reverse=True) if line.startswith(label))
        assert f"{rows[label]:.3f}" in line


def test_results_of_a_single_run_from_before_still_make_their_page(tmp_path):
    old = Results.from_json(json.loads(gzip.decompress(EARLIER.read_bytes())))
    text = write_report([old], tmp_path).read_text(encoding="utf-8")
    assert Page(text).open == []
    assert text.count("<svg") == 1
    words = " ".join(" ".join(Page(text).words).split())
    assert "GLP beats Gaussian in steering towards sports: harmonic mean of concept and fluency" in words
    assert "No clear winner between GLP and no repair in sports at equal fluency" in words
