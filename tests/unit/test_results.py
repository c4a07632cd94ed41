"""The shape every suite writes: what is saved comes back, and nothing else is taken for it."""

import csv
import json
import math
from pathlib import Path

import pandas as pd
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.results import COLUMNS, Metric, Results, Setting, metrics_frame, structured_frame

PUBLISHED = sorted((Path(__file__).parents[2] / "docs" / "results").glob("*/metrics.csv"))


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
    assert list(table.columns) == [*COLUMNS]
    assert table.value.tolist()[0] == 0.75
    assert math.isnan(table.value[1])
    assert table.model.tolist() == ["glp", "sae, wide"]
    assert table.n.tolist() == [12, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "metrics.csv"}


def test_a_table_that_pandas_read_gives_the_metrics_back(results, tmp_path):
    table = pd.read_csv(results.save(tmp_path) / "metrics.csv")
    again = [Metric.from_row(row) for row in table.to_dict("records")]
    assert [str(metric) for metric in again] == [str(metric) for metric in results.metrics]
    assert again[1].setting == Setting()


def test_a_setting_is_equal_to_what_its_text_says():
    assert Setting(between="pca;k=4") == Setting.parse("between=pca;k=4")
    assert Metric("density", "glp", "heldout", "sigma=all", "flow_loss", 1.0).setting == Setting(sigma="all")


def test_saving_again_replaces(results, tmp_path):
    results.save(tmp_path)
    Results("probing").save(tmp_path)
    assert Results.load(tmp_path).metrics == []
    assert list(pd.read_csv(tmp_path / "metrics.csv").columns) == [*COLUMNS]


def test_the_table_has_its_columns_without_metrics():
    assert list(metrics_frame([]).columns) == [*COLUMNS]
    assert len(metrics_frame([Metric("s", "m", "t", Setting(), "x", 1.0)])) == 1


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


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_metrics_are_written_as_they_were_read(path, tmp_path):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    numbers = {"value": float, "ci_low": float, "ci_high": float, "n": int}
    results = Results("any")
    for row in rows:
        results.metrics.append(
            Metric.from_row(row | {k: to(row[k]) if row[k] else math.nan for k, to in numbers.items()})
        )
    again = Results.load(results.save(tmp_path))
    assert again.save(tmp_path / "again").joinpath("metrics.csv").read_bytes() == path.read_bytes()


def test_settings_have_parts_and_are_written_as_in_files():
    text = "fluency>=80% of unsteered;sigma=(0.1, 0.3);between=a s=1,b s=2;k=dense"
    setting = Setting.parse(text)
    assert str(setting) == text
    assert setting.get("fluency>") == "80% of unsteered"
    assert setting.get("between") == "a s=1,b s=2"
    assert setting.get("alpha") is None
    assert str(setting.without("between")) == "fluency>=80% of unsteered;sigma=(0.1, 0.3);k=dense"
    assert math.isnan(setting.number("k"))
    assert math.isnan(setting.number("alpha"))
    assert Setting(alpha=0.4, steps=3).number("alpha") == 0.4
    assert Setting(sigma="0.1-0.2").range("sigma") == (0.1, 0.2)
    assert all(map(math.isnan, Setting(sigma="all").range("sigma")))
    assert str(Setting.parse("real vs shuffled") | Setting(a=True)) == "real vs shuffled;a=True"
    assert not Setting.parse("")


def test_settings_are_values_in_tables():
    results = Results("probing")
    for k in (1.0, 5.0):
        results.add("glp", "all", Setting(split="dedup", k=k), "auc", k)
        results.add("glp", "all", f"split=dedup;k={k:g}", "auc_diff:sae", -k)
    frame = structured_frame(results.metrics)
    at = frame[frame.setting == Setting.parse("split=dedup;k=5")]
    assert at.value.tolist() == [5, -5]
    assert list(zip(at.metric, at.other, strict=True)) == [("auc", ""), ("auc_diff", "sae")]
    assert len(frame.drop_duplicates("setting")) == 2
    assert frame.setting.isin([Setting(split="dedup", k=1)]).sum() == 2
    assert results.frame().metric.tolist() == ["auc", "auc_diff:sae"] * 2
    assert Setting(k=1, split="dedup") != Setting(split="dedup", k=1)
