"""`collect`: activations of a language model into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from glp_lens_cli import options as o
from glp_lens_cli._app import split


def collect(
    out: o.Out = Path("acts"),
    model: o.Model = "HuggingFaceTB/SmolLM2-135M-Instruct",
    hook: Annotated[
        str,
        typer.Option(
            "--hook",
            help="Hook points, separated by commas; by default the residual stream after the middle layer.",
            rich_help_panel="Language model",
        ),
    ] = "",
    backend: o.Backend = "bridge",
    lm_dtype: o.Dtype = "bfloat16",
    context: o.Context = 128,
    texts: o.Texts = "",
    split_: Annotated[
        str,
        typer.Option(
            "--split",
            help="Part of the texts: 'train', 'heldout' (a twentieth, chosen by hash) or 'all'.",
            rich_help_panel="Data",
        ),
    ] = "train",
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=0, help="Activations to keep; 0 keeps all.", rich_help_panel="Data")
    ] = 150_000,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Format on disk: bfloat16, float16 or float32.", rich_help_panel="Data"),
    ] = "bfloat16",
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    config: o.Config = None,
) -> None:
    """Collect activations into a store: HDF5 shards with token, document and position of every row.

    BOS, position 0, padding and massive activations are left out and counted. An interrupted run continues.
    """
    from glp_lens import corpus, lm
    from glp_lens.activations import collect as run
    from glp_lens.errors import InputError

    if split_ not in ("train", "heldout", "all"):
        raise InputError(f"--split must be train, heldout or all, got {split_!r}")
    documents = (
        corpus.split_documents(
            corpus.from_files(split(texts), piece=corpus.CHARACTERS_PER_TOKEN * context),
            split_,  # type: ignore[arg-type]
            seed=seed,
        )
        if texts
        else corpus.packaged(seed, split_)  # type: ignore[arg-type]
    )
    opened = lm.open_model(model, device=device, dtype=lm_dtype, backend=backend)  # type: ignore[arg-type]
    found = run(
        opened,
        documents,
        split(hook) or None,
        out,
        max_tokens=tokens or None,
        context=context,
        dtype=dtype,
        seed=seed,
        corpus=f"{texts or 'sae-probes texts'} ({split_})",
    )
    for store in found.values() if isinstance(found, dict) else [found]:
        typer.echo(f"{len(store):,} rows of width {store.d_in} from {store.hook}: {store.path}")
