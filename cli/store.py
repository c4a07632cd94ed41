"""`store`: look into activation stores, and check them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from glp_lens_cli._app import Commands

app = typer.Typer(cls=Commands, no_args_is_help=True, help="Look into activation stores, and check them.")


@app.callback()
def _group() -> None:
    """Look into activation stores, and check them."""


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what a store holds: model, hook point, rows, norms, exclusions, corpus."""
    from glp_lens.activations import ActivationStore, describe_store

    about = describe_store(ActivationStore.open(folder))
    if as_json:
        typer.echo(json.dumps(about, indent=2))
        return
    for line in _lines(about):
        typer.echo(line)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)]) -> None:
    """Read all of a store and compare it with the checksums of when it was written."""
    from glp_lens.activations import ActivationStore

    store = ActivationStore.open(folder)
    store.verify()
    size = sum(shard.bytes for shard in store.manifest.shards)
    typer.echo(f"ok: {len(store):,} rows in {len(store.manifest.shards)} shards, {size:,} bytes: {folder}")


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    """A nested mapping as aligned lines."""
    lines: list[str] = []
    for key, item in value.items():
        name = f"{indent}{key.replace('_', ' ')}"
        if isinstance(item, dict):
            lines += [name, *_lines(item, indent + "  ")]
        else:
            shown = f"{item:,.4g}" if isinstance(item, float) else f"{item:,}" if type(item) is int else str(item)
            lines.append(f"{name:28} {shown}")
    return lines
