"""Training a prior on a store of activations, or on a stream while it is collected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from glp_lens.activations.stream import ActivationStream
from glp_lens.errors import InputError
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.rows import check_rows
from glp_lens.training import distributed
from glp_lens.training.config import TrainConfig
from glp_lens.training.loop import train
from glp_lens.training.objective import Batch
from glp_lens.types import Acts, Json

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore
    from glp_lens.models.glp import GLP


def initial_denoiser(shape: DenoiserConfig, seed: int) -> Denoiser:
    """A denoiser with random weights that depend on the seed alone; no global generator is touched."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reseed the generators of all accelerators too.
        torch.default_generator.manual_seed(seed)
        return Denoiser(shape)


def fit(
    model: GLP,
    store: ActivationStore | ActivationStream,
    config: TrainConfig,
    *,
    validation: Acts | None = None,
    state: Path | None = None,
) -> None:
    """Train a prior in place, on the device that it is on, and write down in its provenance what it saw.

    Raises:
        InputError: settings that cannot train, or a diverged loss.
    """
    stream = store if isinstance(store, ActivationStream) else None
    if stream is not None and distributed.world_size() > 1:
        raise InputError("a stream has one trainer at a time: collect a store for several processes")
    share = config.batch_size // distributed.world_size()

    def rows(start: int) -> Iterator[Acts]:
        if isinstance(store, ActivationStream):
            return store.batches(share, seed=config.seed, start_batch=start)
        rank, world_size = distributed.rank(), distributed.world_size()
        return store.batches(share, seed=config.seed, start_batch=start, rank=rank, world_size=world_size)

    def feed(start: int) -> Iterator[Batch]:
        for x in rows(start):
            yield Batch(model.normalize(x.to(model.device)))

    held = None
    if validation is not None:
        held = Batch(model.normalize(check_rows(validation, store.d_in).to(model.device)))
    result = train(
        model.denoiser,
        feed,
        config,
        validation=held,
        state=state,
        identity={"denoiser": model.denoiser.config.to_json(), "store": store.provenance().get("manifest_hash")},
        save_now=lambda step: stream is not None and stream.commit_due(step * config.batch_size),
        on_saved=lambda step: stream.commit(step * config.batch_size) if stream else None,
    )
    model.history = result.history
    model.provenance = {
        "store": store.provenance(),
        "training": _training(model.denoiser, config, rows_distinct=len(store), seconds=result.seconds),
    }


def _training(denoiser: Denoiser, config: TrainConfig, *, rows_distinct: int, seconds: float) -> Json:
    """What a training was and cost, for the provenance."""
    seen = config.steps * config.batch_size
    return {
        "rows_seen": seen,
        "rows_distinct": min(seen, rows_distinct),
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "flops": 3 * denoiser.flops_per_row(config.rows_per_sigma) * seen,
        "seconds": seconds,
        "seed": config.seed,
        "recipe": f"{config.optimizer} lr {config.lr:g}, batch {config.batch_size}, {config.sigmas} sigma",
    }
