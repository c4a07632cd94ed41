"""The `glp-lens` command: thin commands over the library, each job's options made of its settings."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from glp_lens import pipeline
from glp_lens.evals.registry import in_report
from glp_lens.settings import Settings

from . import features, push, store
from ._app import Commands
from ._derive import command

# Tokenizer threads beside forked workers only bring a warning here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    name="glp-lens",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Learn, test and use the distribution of a language model's activations.\n\n"
    "Start with [bold]glp-lens quickstart[/bold]: it runs everything on a small language model and writes a "
    "report. The other commands run its stages one by one, on your own model and texts.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

QUICKSTART = """See the whole idea work: GLP, SAE, PCA and baselines compared on a small language model.

Minutes on two CPU cores, offline if the packaged model is installed. Writes report.html, results.json,
metrics.csv and the trained models to --out. Run it again to continue where it stopped.
"""


def _add(name: str, settings: type[Settings], job: str, help: str, *arguments: str) -> None:
    """Add the command of a job."""
    told = {"command"} & inspect.signature(getattr(pipeline, job)).parameters.keys()

    def run(values: Settings) -> None:
        line = shlex.join(["glp-lens", *sys.argv[1:]])
        getattr(pipeline, job)(values, **dict.fromkeys(told, line))

    app.command(name)(command(settings, run, help, arguments=arguments))


def _about(function: Callable[..., object]) -> str:
    """The help text of a command: the docstring of its job, without the arguments."""
    return inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0]


_add("quickstart", pipeline.CompareJob, "compare", QUICKSTART)
_add("collect", pipeline.CollectJob, "collect", _about(pipeline.collect))
_add("train", pipeline.TrainJob, "train", _about(pipeline.train), "kind")
_add("direction", pipeline.DirectionJob, "direction", _about(pipeline.direction))
_add("generate", pipeline.GenerateJob, "generate", _about(pipeline.generate))
_add("sample", pipeline.SampleJob, "sample", _about(pipeline.sample), "folder")
for suite in in_report():
    _add(suite.command, suite.settings, "run_suite", _about(suite.job.measure))
_add("score", pipeline.ScoreJob, "score", _about(pipeline.score))
_add("compare", pipeline.CompareJob, "compare", _about(pipeline.compare))
_add("report", pipeline.ReportJob, "report", _about(pipeline.report), "folders")
app.command("push")(push.push)
app.add_typer(features.app, name="features")
app.add_typer(store.app, name="store")


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"glp-lens {version('glp-lens')}")
        raise typer.Exit


@app.callback()
def _glp_lens(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass
