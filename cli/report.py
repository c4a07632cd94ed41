"""`report`: one page from results that are already there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from glp_lens_cli import options as o


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders with results.json of suites, or parents of them.", show_default=False),
    ],
    out: o.Out = Path("report"),
    title: Annotated[str, typer.Option("--title", help="Headline of the page.")] = "Activation models compared",
    focus: Annotated[str, typer.Option("--focus", help="The model whose wins and losses are told.")] = "glp",
    overwrite: o.Replace = False,
    config: o.Config = None,
) -> None:
    """Write report.html, metrics.csv and results.json from the results of any suites."""
    from glp_lens.errors import InputError
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.compare import merge_results
    from glp_lens.report import write_report

    o.refuse_overwrite(out / "report.html", out / "results.json", overwrite=overwrite)
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"folder {folder} does not exist")
        files = sorted(file for file in folder.glob("**/results.json") if not _is_merged(file))
        if not files:
            raise InputError(f"{folder} holds no results.json of a suite: run probe, steer or fidelity first")
        found += [Results.load(file.parent) for file in files]
    context = {"title": title, "focus": focus}
    typer.echo(f"report: {write_report(found, out, context)}")
    merge_results(found, out, context)


def _is_merged(file: Path) -> bool:
    """Whether a results.json is what `compare` and `report` put together from those of the suites."""
    from glp_lens.files import read_json

    return "suites" in read_json(file, "results")
