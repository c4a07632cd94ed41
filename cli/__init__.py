"""The `glp-lens` command: thin commands over the library. Each file holds one group."""

from __future__ import annotations

import os

import typer
from glp_lens_cli import collect, compare, probe, push, report, store, suites, train
from glp_lens_cli._app import Commands

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
app.command("quickstart", help=compare.QUICKSTART)(compare.compare)
app.command("collect")(collect.collect)
app.command("train")(train.train)
app.command("probe")(probe.probe)
app.command("steer")(suites.steer)
app.command("fidelity")(suites.fidelity)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("push")(push.push)
app.add_typer(store.app, name="store")
