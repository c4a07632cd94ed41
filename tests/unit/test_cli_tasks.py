"""`glp-lens tasks`: the names that `--tasks` takes, with what is in them."""

import json

import numpy as np
from glp_lens_cli import app
from typer.testing import CliRunner

from glp_lens import corpus
from glp_lens.evals.probing.tasks import DEFAULT_TASKS, families, names, overview


def said(*words, code=0):
    done = CliRunner().invoke(app, ["tasks", *words])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def test_every_task_is_listed_with_its_family_and_texts():
    rows = json.loads(said("--json"))
    assert [row["task"] for row in rows] == names("all")
    assert sum(row["default"] for row in rows) == len(DEFAULT_TASKS)
    assert {row["family"] for row in rows} == set(families())
    known = {row["task"]: row for row in rows}
    table = corpus.read_dataset("36_sciq_tf")
    assert known["36_sciq_tf"]["texts"] == len(table)
    assert [known["36_sciq_tf"][f"class_{i}"] for i in (0, 1)] == np.unique(table["target"]).astype(str).tolist()
    assert "business news" in known["140_news_class_Technology"]["note"]


def test_patterns_choose_and_are_those_of_probe():
    lines = said("*glue_s*", "5_hist_fig_ismale").splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["92_glue_sst2", "5_hist_fig_ismale"]
    assert "detect takes" in lines[-1]
    assert len(overview(["*glue*"])) == len(names("*glue*"))


def test_a_name_that_is_none_is_told():
    error = said("nothing", code=2)
    assert "no probing task matches 'nothing'" in error
    assert "glp-lens tasks" in error
