"""`push`: a saved model to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ._app import Config, refuse_empty, split


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved model.", show_default=False)],
    repository: Annotated[
        str, typer.Argument(help="owner/name on the Hub; created if it is not there.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to push to, created if it is not there.")
    ] = None,
    form: Annotated[
        Literal["own", "released"],
        typer.Option("--format", help="released is how the released GLP code reads a GLP."),
    ] = "own",
    layer_prefix: Annotated[
        str | None,
        typer.Option(
            "--layer-prefix", help="Of released: transformers' name of the list of blocks; by default as recorded."
        ),
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option("--results", help="For the model card: results of the model, as in 'card'.", metavar="PATH"),
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="For the model card, for example mit.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="Of the commit.")] = None,
    config: Config = None,
) -> None:
    """Publish a model with a model card, with the token of `hf auth login` or HF_TOKEN."""
    from glp_lens import hub, models, pipeline

    refuse_empty(revision=revision, layer_prefix=layer_prefix, license=license, message=message)
    hub.check_id(repository)
    model = models.load(folder)
    folders = [Path(item) for text in results or () for item in split(text)]
    sections = pipeline.card_sections(model, folders, saved=folder, say=typer.echo)
    commit = model.push_to_hub(
        repository, private=private, revision=revision, commit_message=message, license=license, format=form,
        layer_prefix=layer_prefix, sections=sections,
    )  # fmt: skip
    typer.echo(f"pushed {folder}: {commit}")
