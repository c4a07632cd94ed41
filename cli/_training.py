"""What `train` does: opening stores and streams, training a prior with its curve, and the other kinds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from glp_lens_cli._app import split

from glp_lens.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from glp_lens.activations import ActivationStore, ActivationStream
    from glp_lens.artifacts import ActivationModel
    from glp_lens.training.config import TrainConfig
    from glp_lens.types import Json

    Store = ActivationStore | ActivationStream

STATE = "training.state"
CHECKPOINTS = "checkpoints"


def check_options(ctx: typer.Context, kind: str, kinds: set[str]) -> None:
    """Refuse options on the command line that belong to other kinds, named by the panel of the help they are in."""
    for option in ctx.command.params:
        of = str(getattr(option, "rich_help_panel", None)).split(":", maxsplit=1)[0]
        source = ctx.get_parameter_source(option.name or "")
        if of in kinds and of != kind.upper() and source is not None and source.name == "COMMANDLINE":
            raise InputError(f"{option.opts[0]} is an option of a {of}, not of kind {kind!r}: leave it out")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make the model's folder, and keep other trainings out of it; of several processes the main one does."""
    from glp_lens.activations.writer import lock
    from glp_lens.training import distributed

    held = lock(folder) if distributed.is_main() else None
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


def open_stores(text: str, kind: str, *, wait: bool) -> list[Store]:
    """The stores, or streams that are being collected: one, or for a GLP several siblings."""
    found = [_open(folder, kind, wait=wait) for folder in _folders(text)]
    if len(found) > 1 and kind != "glp":
        raise InputError(f"a {kind} is trained on one store, got {len(found)}: only a GLP takes siblings")
    return found


def _folders(text: str) -> list[Path]:
    """Folders of stores: those named, or the siblings in the one named."""
    from glp_lens.activations.manifest import MANIFEST

    folders = [Path(item) for item in split(text)] or [Path(text)]
    if len(folders) == 1 and not (folders[0] / MANIFEST).is_file():
        return sorted(path.parent for path in folders[0].glob(f"*/{MANIFEST}")) or folders
    return folders


def _open(folder: Path, kind: str, *, wait: bool) -> Store:
    from glp_lens.activations import ActivationStore, ActivationStream
    from glp_lens.activations.manifest import MANIFEST, Manifest
    from glp_lens.activations.waiting import wait_until

    if wait:
        wait_until(lambda: (folder / MANIFEST).is_file() or None, lambda: f"waiting for a store in {folder}")
    if not (folder / MANIFEST).is_file() or Manifest.read(folder).window is None:
        return ActivationStore.open(folder)
    if kind not in ("glp", "sae"):
        raise InputError(f"{folder} is a stream, which a {kind} cannot be fitted on: collect a store without --window")
    # The SAE's trainer keeps no checkpoint, so what it has read is used up.
    return ActivationStream.open(folder, checkpointed=kind == "glp")


def open_validation(text: str, stores: list[Store], *, allow_mismatch: bool) -> list[ActivationStore]:
    """The held-out stores, refused if they hold other activations than the training stores."""
    from glp_lens import provenance
    from glp_lens.activations import ActivationStore

    held = [ActivationStore.open(folder) for folder in _folders(text)]
    by_hook = {store.hook: store for store in held}
    for store in stores:
        found = by_hook.get(store.hook, held[0])
        provenance.check(
            f"{store.path} was collected",
            store.provenance(),
            found.provenance(),
            remedy=f"collect {found.path} the same way",
            allow_mismatch=allow_mismatch,
        )
    return held


def train_glp(
    folder: Path,
    stores: list[Store],
    config: TrainConfig,
    *,
    finetune: tuple[str, str] | None,
    shape: dict[str, int | None],
    device: str,
    logger: str | None,
    checkpoints: int,
    overwrite: bool,
    **options: Any,
) -> ActivationModel:
    """Train a prior, or train on one, and write down its curve in `folder` on the way.

    Args:
        finetune: folder or Hub id, and checkpoint, of the prior to start from.
        shape: of a new prior.
        options: of both `GLP.fit` and `GLP.finetune`.
    """
    from glp_lens.models.glp import GLP
    from glp_lens.training import distributed
    from glp_lens.training.config import RunOptions

    if finetune and any(shape.values()):
        raise InputError("a prior that is finetuned keeps its shape: leave out --width, --mlp and --layers")
    state = folder / STATE
    if distributed.is_main():
        _clear(folder, state, overwrite=overwrite)
    distributed.barrier()
    own = {name: options.pop(name) for name in ("recompute", "shard")}
    with _curve(folder, logger, asdict(config)) as told:
        options["run"] = RunOptions(
            state=state, snapshots=checkpoints, checkpoints=folder / CHECKPOINTS, on_entry=told, **own
        )
        if finetune:
            start = GLP.from_pretrained(*finetune).to(device)
            return start.finetune(stores if len(stores) > 1 else stores[0], config, **options)
        options.pop("allow_mismatch")
        shape = {"n_layers": 3, **{name: n for name, n in shape.items() if n}}
        return GLP.fit(stores if len(stores) > 1 else stores[0], config, device=device, **shape, **options)


def _clear(folder: Path, state: Path, *, overwrite: bool) -> None:
    """Remove what an earlier training left, unless this one goes on with it."""
    from glp_lens.training.history import FILE

    if state.exists():
        return
    (folder / FILE).unlink(missing_ok=True)
    if overwrite:
        for old in (folder / CHECKPOINTS).glob("step_*"):
            shutil.rmtree(old)


@contextmanager
def _curve(folder: Path, logger: str | None, config: Json) -> Iterator[Callable[[Json], None]]:
    """What is told each entry of a history; the curve is drawn at the end, however it came."""
    from glp_lens.report.plots import loss_curve
    from glp_lens.training import distributed
    from glp_lens.training.history import FILE, add_to_history, read_history
    from glp_lens.training.loggers import open_logger

    sink = open_logger(logger, folder, config) if logger and distributed.is_main() else None

    def told(entry: Json) -> None:
        add_to_history(folder, entry)
        if sink:
            sink.log(entry)

    try:
        yield told
    finally:
        if sink:
            sink.close()
        if distributed.is_main() and (folder / FILE).exists():
            loss_curve(read_history(folder), folder / "loss.png", title="Training of the GLP")


def train_other(
    kind: str, store: Store, *, rows: int, batch_size: int | None, lr: float | None, latents: int | None, k: int,
    components: int | None, features: int | None, device: str, seed: int,
) -> ActivationModel:  # fmt: skip
    """Train an SAE or fit a model in closed form."""
    from glp_lens import models

    cls: Any = models.model_class(kind)
    if kind == "sae":
        return cls.fit(  # type: ignore[no-any-return]
            store, n_latents=latents, k=k, rows=rows, batch_size=batch_size or 512, lr=lr or 2e-3, device=device,
            seed=seed,
        )  # fmt: skip
    options = {"pca": {"n_components": components, "max_rows": len(store)}, "random": {"n_features": features}}
    return cls.fit(store, seed=seed, **options.get(kind, {}))  # type: ignore[no-any-return]
