"""`features`: measure what features of models are active on and what they write, look at them, take them elsewhere."""

from __future__ import annotations

import typer

from ._app import Commands

_HELP = "Look at features: what each one is active on, what it writes, and which others are like it."
app = typer.Typer(cls=Commands, no_args_is_help=True, help=_HELP)


@app.callback(help=_HELP)
def _group() -> None:
    pass
