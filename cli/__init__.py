"""The `glp-lens` command: thin commands over the library, each job's options made of its settings."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from glp_lens import pipeline
from glp_lens.evals.registry import in_report

from . import doctor, features, push, store, tasks
from ._app import Commands
from ._derive import about, add

# Tokenizer threads beside forked workers only bring a warning here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    name="glp-lens",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Learn, test and use the distribution of a language model's activations. "
    "Start with [bold]glp-lens quickstart[/bold]: all of it on a small language model, with a report at the end.",
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

QUICKSTART = """See it all work: GLP, SAE, PCA and baselines compared on a small language model.

Minutes on two CPU cores, offline if the packaged model is installed. Writes report.html, results.json, metrics.csv \
and the trained models to --out. Run it again to continue where it stopped.
"""


add(app, "quickstart", pipeline.CompareJob, "compare", QUICKSTART)
add(app, "collect", pipeline.CollectJob, "collect", about(pipeline.collect))
add(app, "train", pipeline.TrainJob, "train", about(pipeline.train), "kind")
add(app, "direction", pipeline.DirectionJob, "direction", about(pipeline.direction))
add(app, "generate", pipeline.GenerateJob, "generate", about(pipeline.generate))
add(app, "sample", pipeline.SampleJob, "sample", about(pipeline.sample), "folder")
for suite in in_report():
    add(app, suite.command, suite.settings, "run_suite", about(suite.job.measure))
add(app, "score", pipeline.ScoreJob, "score", about(pipeline.score))
add(app, "compare", pipeline.CompareJob, "compare", about(pipeline.compare))
add(app, "scale", pipeline.ScaleJob, "scale", about(pipeline.scale))
add(app, "report", pipeline.ReportJob, "report", about(pipeline.report), "folders")
add(app, "choose", pipeline.ChooseJob, "choose", about(pipeline.choose), "run")
add(app, "card", pipeline.CardJob, "card", about(pipeline.card), "saved")
app.command("push")(push.push)
app.command("tasks")(tasks.tasks)
app.command("doctor")(doctor.doctor)
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
