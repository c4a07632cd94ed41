"""Training a prior in place: on the rows of a store, of sibling stores, or of streams while they are collected."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import torch
import xxhash

from glp_lens import numerics
from glp_lens.errors import InputError
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.sources import Prior as BatchedPrior
from glp_lens.models.sources import Sources
from glp_lens.training import checkpoint, distributed
from glp_lens.training.config import RunOptions, TrainConfig
from glp_lens.training.loop import train
from glp_lens.training.objective import Batch, lost_levels
from glp_lens.types import Acts, Json


class Prior(BatchedPrior, Protocol):
    """A prior in training: a denoiser, and what is saved with it."""

    denoiser: Denoiser
    history: list[Json]
    provenance: Json

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save the prior in a folder."""


def initial_denoiser(shape: DenoiserConfig, config: TrainConfig) -> Denoiser:
    """A denoiser with random weights that depend only on shape and config; no global generator is used."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the generators of all accelerators too.
        torch.default_generator.manual_seed(config.seed)
        denoiser = Denoiser(shape)
        if config.init == "tied":
            _tie(denoiser)
    return denoiser


@torch.no_grad()
def _tie(denoiser: Denoiser) -> None:
    """Make the untrained network return about its input: most of the velocity is noise that the input contains.

    The input projection is orthogonal and the output projection its transpose; the modulation starts around one.
    """
    torch.nn.init.orthogonal_(denoiser.in_proj.weight)
    denoiser.out_proj.weight.copy_(denoiser.in_proj.weight.T)
    denoiser.in_proj.bias.zero_()
    denoiser.out_proj.bias.zero_()
    for block in denoiser.blocks:
        block.time_proj.bias.fill_(1.0)


def fit(
    model: Prior,
    sources: Sources,
    config: TrainConfig,
    *,
    validation: Acts | Sources | None = None,
    run: RunOptions | None = None,
    finetuned_from: Json | None = None,
) -> None:
    """Train a prior in place, on its device, and set its history and provenance.

    The arguments are those of `GLP.fit`, with opened sources.

    Raises:
        InputError: settings that cannot train, or a diverged loss.
    """
    run = run or RunOptions()
    config = config.for_width(model.denoiser.config.d_model)
    if run.snapshots and run.checkpoints is None:
        raise InputError("snapshots need a folder: pass RunOptions(checkpoints=...)")
    streams = sources.streams(config.batch_size)
    origin: Json = {"store": sources.provenance()}
    if finetuned_from:
        origin["finetuned_from"] = finetuned_from
    # Only the main process gets entries, and only it saves.
    entries = checkpoint.history(run.state) if run.state else []

    def record(entry: Json) -> None:
        entries.append(entry)
        if run.on_entry:
            run.on_entry(entry)

    def describe(prior: Prior, history: list[Json], steps: int) -> None:
        prior.history = history
        seconds = history[-1]["seconds"] if history else 0.0
        training = _training(prior.denoiser, config, steps=steps, rows_distinct=sources.rows, seconds=seconds)
        if sources.massive:
            training["massive_rows"] = sources.massive
        if sources.label is not None:
            training["condition"] = sources.label
        prior.provenance = {**origin, "training": training}

    def save_snapshot(step: int) -> None:
        if run.checkpoints is not None and distributed.is_main():
            prior = copy.copy(model)
            describe(prior, [entry for entry in entries if entry["step"] <= step], step)
            prior.save_pretrained(run.checkpoints / f"step_{step:08d}")

    def commit(step: int) -> None:
        for stream, rows in streams:
            stream.commit(step * rows)

    feed, last = sources.feed(config, model), list[Batch]()

    def watched(start: int) -> Generator[Batch]:
        with closing(feed(start)) as batches:
            for batch in batches:
                last[:] = [batch]
                yield batch

    model.denoiser.requires_grad_(True)
    try:
        with numerics.training():
            result = train(
                model.denoiser,
                watched,
                config,
                validation=None if validation is None else sources.held_out(validation, model),
                run=replace(run, on_entry=record),
                identity=_identity(model, sources, origin),
                save_now=lambda step: any(stream.commit_due(step * rows) for stream, rows in streams),
                on_saved=commit,
                on_snapshot=save_snapshot,
            )
    finally:
        model.denoiser.requires_grad_(False).eval()
    origin["store"] = sources.provenance()  # of streams, now of all their rows
    describe(model, result.history, config.steps)
    model.provenance["training"]["seconds"] = result.seconds
    if last and distributed.is_main():
        with numerics.training():
            _tell_lost(model, lost_levels(model.denoiser, last[0], autocast=config.autocast))


def _tell_lost(model: Prior, levels: list[float]) -> None:
    """Warn of noise levels that a training lost, and keep them in the provenance."""
    if levels:
        model.provenance["training"]["lost_levels"] = [round(level, 3) for level in levels]
        warnings.warn(
            f"the denoiser lost {len(levels)} of 1000 noise levels, between {min(levels):.3f} and {max(levels):.3f}, "
            "where its loss stands out: projections and samples pass them; train again with another seed",
            stacklevel=6,
        )


def _identity(model: Prior, sources: Sources, origin: Json) -> Json:
    """What determines the result of a training besides its config; a saved state is continued only if it is equal."""
    stores = [[source.layer, source.provenance().get("manifest_hash"), source.limit] for source in sources.sources]
    classes = [vector.numpy().tobytes() for _, vector in sorted(model.class_vectors.items())]
    return {
        "denoiser": model.denoiser.config.to_json(),
        "stores": stores,
        "classes": xxhash.xxh3_64_hexdigest(b"".join(classes)),
        "label": sources.label,
        "finetuned_from": origin.get("finetuned_from", {}).get("weights"),
    }


def _training(denoiser: Denoiser, config: TrainConfig, *, steps: int, rows_distinct: int, seconds: float) -> Json:
    """Settings and cost of a training, for the provenance."""
    seen = steps * config.batch_size
    grown = f" to {config.largest_batch}" if config.largest_batch > config.batch_size else ""
    return {
        "rows_seen": seen,
        "rows_distinct": min(seen, rows_distinct),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "flops": 3 * denoiser.flops_per_row(config.rows_per_sigma) * seen,
        "seconds": seconds,
        "seed": config.seed,
        "recipe": f"{config.optimizer} lr {config.lr:g}, batch {config.batch_size}{grown}, {config.sigmas} sigma",
        "config": asdict(config),
    }
