"""The shape every suite writes: what is saved comes back, and nothing else is taken for it."""

import json
import math

import pandas as pd
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.results import Metric, Results, metrics_frame

COLUMNS = ["suite", "model", "task", "setting", "metric", "value", "ci_low", "ci_high", "n"]


@pytest.fixture
def results():
    made = Results("probing", config={"seed": 3, "sigmas": (0.1, 0.5)}, failures=["sae: skipped"], seconds=1.5)
    made.add("glp", "all", "sigma=0.1;k=5", "auc", 0.75, ci_low=0.7, ci_high=0.8, n=12)
    made.add("sae, wide", "162_agnews_1", "", "auc", math.nan)
    made.extras["curve"] = [1.0, math.nan, math.inf]
    made.data["rows"] = {1: "one"}
    return made


def test_save_and_load_give_the_same_results(results, tmp_path):
    again = Results.load(results.save(tmp_path / "new" / "folder"))
    assert again.metrics[0] == results.metrics[0]
    assert math.isnan(again.metrics[1].value)
    assert math.isnan(again.metrics[1].ci_low)
    assert again.metrics[1].n == 0
    assert again.config == {"seed": 3, "sigmas": [0.1, 0.5]}
    assert again.failures == results.failures
    assert again.versions == results.versions
    assert again.seconds == 1.5
    assert again.extras["curve"] == [1.0, None, None]
    pd.testing.assert_frame_equal(again.frame(), results.frame())


def test_files_are_standard_json_and_tidy_csv(results, tmp_path):
    results.save(tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)["format"] == 1
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table.columns) == COLUMNS
    assert table.value.tolist()[0] == 0.75
    assert math.isnan(table.value[1])
    assert table.model.tolist() == ["glp", "sae, wide"]
    assert table.n.tolist() == [12, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "metrics.csv"}


def test_saving_again_replaces(results, tmp_path):
    results.save(tmp_path)
    Results("probing").save(tmp_path)
    assert Results.load(tmp_path).metrics == []
    assert list(pd.read_csv(tmp_path / "metrics.csv").columns) == COLUMNS


def test_the_table_has_its_columns_without_metrics():
    assert list(metrics_frame([]).columns) == COLUMNS
    assert len(metrics_frame([Metric("s", "m", "t", "", "x", 1.0)])) == 1


def test_numbers_survive_to_the_last_digit(tmp_path):
    made = Results("density")
    made.add("glp", "all", "", "loss", 1 / 3)
    made.save(tmp_path)
    assert Results.load(tmp_path).metrics[0].value == 1 / 3
    assert pd.read_csv(tmp_path / "metrics.csv", float_precision="round_trip").value[0] == 1 / 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("{", "cannot be read"),
        ("[]", "expected a JSON object"),
        ('{"format": 1, "colour": "red"}', "not a results file of format 1"),
        ('{"format": 2, "suite": "probing", "metrics": []}', "not a results file of format 1"),
        ('{"suite": "probing", "metrics": []}', "not a results file of format 1"),
        ('{"format": 1, "suite": "probing"}', "damaged"),
        ('{"format": 1, "metrics": []}', "damaged"),
        ('{"format": 1, "suite": "probing", "metrics": [3]}', "damaged"),
        ('{"format": 1, "suite": "probing", "metrics": [{"model": "glp"}]}', "damaged"),
    ],
)
def test_other_files_are_refused_in_one_line(text, words, tmp_path):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=words) as caught:
        Results.load(tmp_path)
    assert "\n" not in str(caught.value)
