"""`train`: one model of activations from a store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from glp_lens_cli import options as o

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore, ActivationStream
    from glp_lens.artifacts import ActivationModel

_GLP, _SAE = "GLP", "SAE"


def train(
    kind: Annotated[str, typer.Argument(help="glp, sae, pca, gaussian or raw.", show_default=False)],
    store: o.Store = Path("acts"),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the model; by default models/KIND.", rich_help_panel="Run"),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Activations shown to a GLP or SAE.")] = 400_000,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Rows a step; by default 512 (4096 with --recipe paper)."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate; by default 2e-3 (5e-5 with --recipe paper)."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="'small': stratified noise levels, for short runs; 'paper': the paper's (lr 5e-5, batch 4096, "
            "uniform noise levels).",
            rich_help_panel=_GLP,
        ),
    ] = "small",
    width: Annotated[
        int | None,
        typer.Option(
            "--width", min=1, help="Width of the GLP's denoiser; by default twice d_in.", rich_help_panel=_GLP
        ),
    ] = None,
    mlp: Annotated[
        int | None,
        typer.Option("--mlp", min=1, help="Meta-neurons a block; by default four times d_in.", rich_help_panel=_GLP),
    ] = None,
    layers: Annotated[int, typer.Option("--layers", min=1, help="Blocks.", rich_help_panel=_GLP)] = 3,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="Store of held-out activations, for the curve.", rich_help_panel=_GLP),
    ] = None,
    latents: Annotated[
        int | None,
        typer.Option(
            "--latents", min=1, help="Dictionary size of the SAE; by default four times d_in.", rich_help_panel=_SAE
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Latents active on a row.", rich_help_panel=_SAE)] = 32,
    components: Annotated[
        int | None, typer.Option("--components", min=1, help="By default all.", rich_help_panel="PCA")
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait",
            help="Wait for a store that is not there yet: a stream whose collector is starting.",
            rich_help_panel="Run",
        ),
    ] = False,
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch",
            help="Use a --validation store of another hook point, language model or weight processing.",
            rich_help_panel=_GLP,
        ),
    ] = False,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a model that is already there.", rich_help_panel="Run"),
    ] = False,
    config: o.Config = None,
) -> None:
    """Train a GLP, SAE, PCA, Gaussian or raw baseline on a store.

    An interrupted GLP continues when the same command is run again.
    """
    from glp_lens import models, provenance
    from glp_lens.errors import InputError
    from glp_lens.lm import check_device

    models.model_class(kind)  # refuse an unknown kind before any work
    folder = out or Path("models") / kind
    if (folder / "config.json").exists() and not overwrite:
        raise InputError(f"{folder} already holds a model: choose another --out, or pass --overwrite")
    if lr is not None and not 0 < lr < 1:
        raise InputError(f"--lr must be between 0 and 1, got {lr}")
    check_device(device)
    opened = _open(store, kind, wait=wait)
    held = _open_validation(validation, opened, allow_mismatch=allow_mismatch) if validation else None
    folder.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written must fail before the training
    state = folder / "training.state"
    fitted: ActivationModel
    if kind == "glp":
        settings = _recipe(recipe, rows, batch_size, lr, seed)
        fitted = models.model_class("glp").fit(  # type: ignore[attr-defined]
            opened, settings, d_model=width, d_mlp=mlp, n_layers=layers, device=device,
            validation=held.sample(2048, seed=0) if held else None, state=state,
        )  # fmt: skip
    elif kind == "sae":
        fitted = models.model_class("sae").fit(  # type: ignore[attr-defined]
            opened, n_latents=latents, k=k, rows=rows, batch_size=batch_size or 512, lr=lr or 2e-3,
            device=device, seed=seed,
        )  # fmt: skip
    else:
        fitted = _closed_form(kind, opened, components, seed)
    typer.echo(f"saved {kind}: {fitted.save_pretrained(folder)}")
    state.unlink(missing_ok=True)
    typer.echo(provenance.describe(fitted))


def _open(folder: Path, kind: str, *, wait: bool) -> ActivationStore | ActivationStream:
    """The store, or the stream that is being collected."""
    from glp_lens.activations import ActivationStore, ActivationStream
    from glp_lens.activations.manifest import MANIFEST, Manifest
    from glp_lens.activations.waiting import wait_until
    from glp_lens.errors import InputError

    if wait:
        wait_until(lambda: (folder / MANIFEST).is_file() or None, lambda: f"waiting for a store in {folder}")
    if not (folder / MANIFEST).is_file() or Manifest.read(folder).window is None:
        return ActivationStore.open(folder)
    if kind not in ("glp", "sae"):
        raise InputError(f"{folder} is a stream, which a {kind} cannot be fitted on: collect a store without --window")
    # The SAE's trainer keeps no checkpoint, so what it has read is used up.
    return ActivationStream.open(folder, checkpointed=kind == "glp")


def _open_validation(
    folder: Path, store: ActivationStore | ActivationStream, *, allow_mismatch: bool
) -> ActivationStore:
    """The held-out store, refused if it holds other activations than the training store."""
    from glp_lens import provenance
    from glp_lens.activations import ActivationStore

    held = ActivationStore.open(folder)
    provenance.check(
        f"{store.path} was collected",
        store.provenance(),
        held.provenance(),
        remedy=f"collect {folder} the same way",
        allow_mismatch=allow_mismatch,
    )
    return held


def _recipe(name: str, rows: int, batch_size: int | None, lr: float | None, seed: int) -> object:
    from glp_lens.errors import InputError
    from glp_lens.training.config import TrainConfig

    recipes = {
        "paper": TrainConfig(rows=max(rows, 4096)),
        "small": TrainConfig(rows=max(rows, 512), batch_size=512, lr=2e-3, sigmas="stratified"),
    }
    if name not in recipes:
        raise InputError(f"--recipe must be one of {', '.join(recipes)}, got {name!r}")
    base = recipes[name]
    return dataclasses.replace(base, rows=rows, batch_size=batch_size or base.batch_size, lr=lr or base.lr, seed=seed)


def _closed_form(
    kind: str, store: ActivationStore | ActivationStream, components: int | None, seed: int
) -> ActivationModel:
    from glp_lens import models

    options = {"n_components": components, "max_rows": len(store)} if kind == "pca" else {}
    return models.model_class(kind).fit(store, seed=seed, **options)  # type: ignore[attr-defined,no-any-return]
