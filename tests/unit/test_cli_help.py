"""The help of every command fits on a screen and says where the rest is; the shell completes what can be named."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
from glp_lens_cli import app

from glp_lens import pipeline
from glp_lens.settings import Settings, options
from tests.fuzz.lines import BASES

JOBS = [job for job in vars(pipeline).values() if isinstance(job, type) and issubclass(job, Settings)]
COMMANDS = ["", "features", "store", *BASES]
LONG = {"quickstart", "collect", "train", "probe", "steer", "compare", "scale", "features build"}
"""Some of the commands that have more options than fit."""


@pytest.fixture(scope="module")
def glp_lens():
    """The commands, built once for all tests."""
    return typer.main.get_command(app)


@pytest.fixture
def shown(glp_lens, monkeypatch, capsys):
    """Runs a line and gives back what it prints on a terminal of 100 columns."""

    def run(line: str) -> str:
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            glp_lens.main(shlex.split(line), prog_name="glp-lens")
        assert end.value.code == 0, line
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_screen(command, shown):
    lines = shown(f"{command} --help").rstrip().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert not any(word in line for word in ("Args:", "Returns:", "Raises:") for line in lines)  # of Python


@pytest.mark.parametrize("command", sorted(LONG))
def test_short_help_has_what_is_needed_and_says_how_to_see_the_rest(command, shown, glp_lens):
    found = glp_lens
    for word in command.split():
        found = found.commands[word]
    brief, full = shown(f"{command} --help"), shown(f"{command} --help-all")
    flags = {flag for each in found.params for flag in each.opts if flag.startswith("--")} - {"--help-all"}
    assert {flag for flag in flags if flag not in full.split()} == set()
    assert {flag for flag in flags if flag not in brief.split()} != set()
    assert all(each.opts[0] in brief for each in found.params if each.required and each.param_type_name == "option")
    assert "--help-all" in brief
    assert f"all {len(found.params) - 1} options" in " ".join(brief.split())  # all but --help-all, with arguments


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_essentials_are_settings(job):
    assert {*job.essentials} <= {each.name for each in options(job)}


def test_help_changes_nothing_of_a_command_that_is_run_afterwards(shown, glp_lens):
    """In one process, as a program that calls the commands would."""
    params = glp_lens.commands["sample"].params
    before = [(each.name, each.help, list(each.opts), list(each.secondary_opts)) for each in params]
    shown("sample --help")
    assert glp_lens.commands["sample"].params is params
    assert [(each.name, each.help, list(each.opts), list(each.secondary_opts)) for each in params] == before


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("glp-lens qui", {"quickstart"}, {"collect"}),
        ("glp-lens features e", {"explain", "export"}, {"build"}),
        ("glp-lens steer --strength", {"--strengths", "--strength-unit"}, {"--models"}),
        ("glp-lens train p", {"pca"}, {"glp"}),
        ("glp-lens probe --pooling m", {"mean", "max"}, {"last"}),
        ("glp-lens compare --suites density,prob", {"density,probing"}, {"density", "probing"}),
        ("glp-lens steer --repairs paper,d", {"paper,difference"}, set()),
        ("glp-lens steer --concepts sp", {"sports", "spam"}, {"world"}),
        ("glp-lens collect --hook blocks.3.hook_resid_p", {"blocks.3.hook_resid_post"}, {"blocks.3.hook_mlp_out"}),
        ("glp-lens probe --tasks 9*_glue*,5_hist", {"9*_glue*,5_hist_fig_ismale"}, {"5_hist_fig_ismale"}),
        ("glp-lens tasks 5_hist", {"5_hist_fig_ismale"}, {"6_hist_fig_isamerican"}),
        ("glp-lens collect --device c", {"cpu", "cuda"}, {"mps"}),
    ],
)
def test_the_shell_completes(line, some, none, glp_lens, monkeypatch, capsys):
    words = line.split()
    monkeypatch.setenv("_GLP_LENS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit):
        glp_lens.main(prog_name="glp-lens")
    offered = {*capsys.readouterr().out.split()}
    assert some <= offered
    assert not none & offered


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_completion_works_in_a_shell(tmp_path):
    """The script that the command prints, in a real bash, which asks the command again."""
    (tmp_path / "glp-lens").write_text(f'#!/bin/sh\nexec {sys.executable} -m glp_lens_cli "$@"\n')
    (tmp_path / "glp-lens").chmod(0o755)
    lines = """
        eval "$(_GLP_LENS_COMPLETE=source_bash glp-lens)"
        complete -p glp-lens
        COMP_WORDS=(glp-lens store ver) COMP_CWORD=2
        _glp_lens_completion glp-lens
        echo "offered ${COMPREPLY[@]}"
    """
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, env=env, check=True)
    assert "offered verify" in done.stdout
    assert "-o default" in done.stdout  # where nothing is offered, paths are
