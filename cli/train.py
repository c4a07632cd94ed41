"""`train`: one model of activations from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from glp_lens_cli import options as o
from glp_lens_cli._app import split

from glp_lens.errors import InputError

_GLP, _SAE, _PCA, _RANDOM = "GLP", "SAE", "PCA", "RANDOM"
_CURVE, _SCALE = "GLP: curve and checkpoints", "GLP: memory and machines"


def train(
    kind: Annotated[str, typer.Argument(help="glp, sae, pca, gaussian, raw or random.", show_default=False)],
    store: o.Stores = "acts",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the model; by default models/KIND.", rich_help_panel="Run"),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Activations shown to a GLP or SAE.")] = 400_000,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Rows a step; by default those of the recipe, and 512 for an SAE."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate; by default that of the recipe, and 2e-3 for an SAE."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="'fast': the fewest rows to a loss of what was tried (lr 2e-3, batch 256); 'paper': the paper's "
            "(lr 5e-5, batch 4096), for long runs; 'small': plain AdamW (lr 2e-3, batch 512).",
            rich_help_panel=_GLP,
        ),
    ] = "fast",
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", help="'adamw', or 'muon' for the inner matrices.", rich_help_panel=_GLP),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema", help="Save an average of the weights with this decay, such as 0.999.", rich_help_panel=_GLP
        ),
    ] = None,
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
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Blocks; by default 3.", rich_help_panel=_GLP)
    ] = None,
    finetune: Annotated[
        str | None,
        typer.Option(
            "--finetune",
            help="Folder or Hub id of a GLP to train on from; its normaliser stays as it is.",
            rich_help_panel=_GLP,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", help="Which checkpoint of --finetune; by default the last.", rich_help_panel=_GLP),
    ] = None,
    condition: Annotated[
        str | None,
        typer.Option(
            "--condition", help="Label of the store with each row's class, to condition on.", rich_help_panel=_GLP
        ),
    ] = None,
    massive: Annotated[
        str,
        typer.Option(
            "--massive",
            help="Rows with a norm beyond the gap in the data ('gap'), or over this many times the median, do not "
            "count; 0 counts all.",
            rich_help_panel=_GLP,
        ),
    ] = "gap",
    validation: Annotated[
        str | None,
        typer.Option(
            "--validation",
            help="Store of held-out activations, for the curve; of several layers as in --store.",
            rich_help_panel=_CURVE,
        ),
    ] = None,
    checkpoints: Annotated[
        int,
        typer.Option(
            "--checkpoints",
            min=0,
            help="Keep about this many models on the way in OUT/checkpoints, at steps evenly spaced on a "
            "logarithmic scale.",
            rich_help_panel=_CURVE,
        ),
    ] = 0,
    logger: Annotated[
        str | None,
        typer.Option("--logger", help="Also send the curve to trackio, wandb or tensorboard.", rich_help_panel=_CURVE),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option("--accumulate", min=1, help="Compute each step in this many parts.", rich_help_panel=_SCALE),
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute",
            help="Compute activations again in the backward pass rather than keep them.",
            rich_help_panel=_SCALE,
        ),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Under torchrun, spread weights and optimiser over the processes.", rich_help_panel=_SCALE
        ),
    ] = False,
    latents: Annotated[
        int | None,
        typer.Option(
            "--latents", min=1, help="Dictionary size of the SAE; by default four times d_in.", rich_help_panel=_SAE
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Latents active on a row.", rich_help_panel=_SAE)] = 32,
    components: Annotated[
        int | None, typer.Option("--components", min=1, help="By default all.", rich_help_panel=_PCA)
    ] = None,
    features: Annotated[
        int | None,
        typer.Option("--features", min=1, help="Random features; by default four times d_in.", rich_help_panel=_RANDOM),
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
            help="Use a --validation store, or --finetune a GLP, of another hook point, language model or weight "
            "processing.",
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
    """Train a GLP, SAE, PCA, Gaussian, or the raw or random baseline on a store.

    An interrupted GLP continues when the same command is run again.

    On several GPUs: torchrun --nproc-per-node 8 -m glp_lens_cli train glp --device cuda ...
    """
    from glp_lens.pipeline.train import TrainSettings
    from glp_lens.pipeline.train import train as run

    if lr is not None and not 0 < lr < 1:
        raise InputError(f"--lr must be between 0 and 1, got {lr}")
    settings = TrainSettings(
        kind=kind, store=split(store) or store, out=out, rows=rows, batch_size=batch_size, lr=lr, recipe=recipe,
        optimizer=optimizer, ema=ema, d_model=width, d_mlp=mlp, n_layers=layers, finetune=finetune,
        checkpoint=checkpoint, condition=condition, massive=massive, validation=split(validation or ""),
        checkpoints=checkpoints, logger=logger, accumulate=accumulate, recompute=recompute, shard=shard,
        n_latents=latents, k=k, n_components=components, n_features=features, wait=wait,
        allow_mismatch=allow_mismatch, device=device, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    run(settings, say=typer.echo)
