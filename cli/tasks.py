"""`tasks`: the packaged tasks that `probe`, `detect` and `compare` take by name."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ._completing import task_names

_OTHERS = (
    "* is measured by probe and compare when no --tasks are named. probe also takes files of yours; detect takes "
    "shuffled, code, steered and family:NAME too."
)


def tasks(
    patterns: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names or shell patterns, such as '*glue*'; by default all.",
            autocompletion=task_names,
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the packaged probing tasks: name, family, number of texts, classes."""
    from glp_lens.evals.probing.tasks import overview

    frame = overview(patterns or "all")
    if as_json:
        typer.echo(json.dumps(frame.to_dict("records"), indent=2))
        return
    names = [f"{row.task}{' *' if row.default else ''}" for row in frame.itertuples()]
    rows = [("task", "family", "texts", "class 0 / class 1")]
    rows += [
        (name, row.family, f"{row.texts:,}", f"{row.class_0} / {row.class_1}{f'; {row.note}' if row.note else ''}")
        for name, row in zip(names, frame.itertuples(), strict=True)
    ]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, family, texts, classes in rows:
        typer.echo(f"{name:{wide[0]}}  {family:{wide[1]}}  {texts:>{wide[2]}}  {classes}")
    typer.echo(_OTHERS)
