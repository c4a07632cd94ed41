"""What `features show` and `features top` print: all that is known, and nothing that controls the terminal."""

import contextlib
import io

import pandas as pd
import pytest
from glp_lens_cli import _features, app
from typer.testing import CliRunner

from glp_lens.errors import InputError
from glp_lens.features.top import COLUMNS, over_text
from glp_lens.pipeline import ShowFeaturesJob, show_features
from tests.unit.feature_folder import DEAD, write_features

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path):
    return write_features(tmp_path / "features")


def shown(folder, *words):
    result = runner.invoke(app, ["features", "show", *words, "--folder", str(folder.path)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_view_holds_the_rows_of_its_feature(folder):
    views = show_features(ShowFeaturesJob(built=folder.path, names=("my sae/7", "1:3", "0:2", "my sae/7")))
    assert [each.name for each in views] == ["my sae/7", "glp/1:3", "glp/0:2"]
    for each in views:
        for name, rows in each.tables.items():
            whole = folder.table(each.model.label, name)
            pd.testing.assert_frame_equal(
                rows.reset_index(drop=True), whole[whole.feature == each.index].reset_index(drop=True)
            )
    assert views[0].rows("prior").empty
    assert views[1].statistics.unit == 3


def test_all_that_is_known_is_shown(folder):
    text = " ".join(shown(folder, "0:1").split())
    labels, tasks = folder.table("glp", "labels"), folder.table("glp", "tasks")
    for word in (
        "glp/0:1", labels.label[1], "(automatic)", tasks.task[1], "[0.850, 0.940]", "Highest", "Lowest", "80%-100%",
        "jacobian", "class mean", "by activation", "stability",
    ):  # fmt: skip
        assert word in text
    for strength in (0.5, 1.0, 2.0):
        assert f" of 1 at {strength}" in text
    near = folder.table("glp", "neighbours").query("feature == 1 and model == 'glp'").iloc[0]
    assert f"glp/{near.other // 12}:{near.other % 12} {near.value:+.2f}" in text


def test_the_number_of_passages_is_chosen(folder):
    few, more = (shown(folder, "my sae/7", "--examples", n).count("«") for n in ("1", "3"))
    assert (few, more) == (1 + 5, 3 + 5 * 2)  # top, and five bands of two


def test_a_dead_feature_is_shown_as_one(folder):
    assert ", dead" in shown(folder, str(DEAD))


def test_tokens_cannot_control_the_terminal(monkeypatch):
    assert _features.visible("a\x1b[2J\n\t\u202eb\x9b") == "a\\x1b[2J↵⇥\\u202eb\\x9b"
    assert _features.visible(" Ünï ☃") == " Ünï ☃"
    row = ("glp\x1b]0;x\x07", 3, "0:3", 1, "\x1b[31m", 2.0, 0.1, 5.0, 0.01, "[bold]\x1b[0m")
    frame = pd.DataFrame([row], columns=list(COLUMNS))
    monkeypatch.setenv("COLUMNS", "200")
    assert "\x1b" not in _printed(frame)
    assert "[bold]" in _printed(frame)  # no markup


def _printed(frame):
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        _features.show_top(frame, 3)
    return stream.getvalue()


def test_over_a_text_each_feature_stands_once_where_it_is_furthest():
    rows = [
        ("b", 1, "1", 1, "x", 0.0, 0.0, -7.0, 0.1, ""), ("b", 2, "2", 1, "x", 0.0, 0.0, 3.0, 0.1, ""),
        ("b", 1, "1", 2, "y", 0.0, 0.0, 4.0, 0.1, ""), ("a", 1, "1", 1, "x", 0.0, 0.0, 9.0, 0.1, ""),
        ("b", 5, "5", 2, "y", 0.0, 0.0, 5.0, 0.1, ""),
    ]  # fmt: skip
    most = over_text(pd.DataFrame(rows, columns=list(COLUMNS)), 2)
    assert most[["model", "feature", "position", "z"]].to_numpy().tolist() == [
        ["b", 1, 1, -7.0], ["b", 5, 2, 5.0], ["a", 1, 1, 9.0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("features", "message"),
    [(("2:1",), "2 blocks of 12"), (("x",), "3:1024"), (("sae/1",), "my sae"), ((), "name of a feature")],
)
def test_features_that_are_not_there_are_refused(folder, features, message):
    with pytest.raises(InputError, match=message):
        show_features(ShowFeaturesJob(built=folder.path, names=features))


def test_without_features_it_says_how_to_make_them(tmp_path):
    with pytest.raises(InputError, match="features build"):
        show_features(ShowFeaturesJob(built=tmp_path, names=("1",)))
