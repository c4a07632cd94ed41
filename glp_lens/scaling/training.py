"""Training the models of a scaling run: ladders of budgets that share their beginning, SAEs and baselines."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from glp_lens import numerics
from glp_lens.models.fitting import initial_denoiser
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.glp import GLP
from glp_lens.models.pca import PCA
from glp_lens.models.raw import Raw
from glp_lens.models.sae import SAE
from glp_lens.scaling.cells import Cell
from glp_lens.scaling.evaluating import held_out_loss
from glp_lens.scaling.grid import GridSettings, Unit, flops_of, shape_of
from glp_lens.training import distributed
from glp_lens.training.config import RunOptions
from glp_lens.training.history import write_history
from glp_lens.training.loop import train
from glp_lens.training.objective import Batch

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore
    from glp_lens.artifacts import ActivationModel
    from glp_lens.models.denoiser import DenoiserConfig
    from glp_lens.training.config import TrainConfig

MODEL = "model"
"""Folder of the saved model in that of a cell."""
_STEPS = 6
"""Steps of a training whose time is measured, after two that are not."""


def train_cell(
    cell: Cell,
    unit: Unit,
    grid: GridSettings,
    store: ActivationStore,
    heldout: ActivationStore,
    folder: Path,
    trunk: Path,
    *,
    keep_states: bool = False,
    device: str = "cpu",
) -> None:
    """Train a model and save it, its training curve and its cell; an interrupted training continues.

    The longest training of a unit keeps a state for each of the others where its learning rate is still theirs, and
    they begin there. Without that state they begin at an earlier one, or at their first step, with the same weights at
    the end.
    Of several processes, all train and the main one saves.

    Args:
        folder: of the cell.
        trunk: folder for the states of the unit's trainings.
        keep_states: also keep one for budgets larger than all of the unit.

    Raises:
        InputError: a store that cannot be trained on, or a diverged loss.
    """
    if cell.kind == "glp":
        model: ActivationModel = _fit_glp(cell, unit, grid, store, trunk, keep_states, device)
    else:
        model = _fit(cell, grid, store, device)
    if not distributed.is_main():
        return
    training, loss = model.provenance["training"], None
    bands: dict[str, float] = {}
    if isinstance(model, GLP):
        loss, bands = held_out_loss(model, heldout)
        write_history(folder, model.history)
    elif isinstance(model, Gaussian):
        loss = model.optimal_loss_mean()
    model.save_pretrained(folder / MODEL)
    measured = {name: training[name] for name in ("parameters", "flops", "seconds")}
    replace(cell, **measured, loss=loss, bands=bands).save(folder)
    _state(cell, trunk).unlink(missing_ok=True)


def _state(cell: Cell, trunk: Path) -> Path:
    return trunk / f"{cell.cell}.state"


def held_state(trunk: Path, cell: Cell, grid: GridSettings) -> int:
    """Steps of the last state in a folder that a training can begin from; 0 if there is none."""
    return _last(_held(trunk), grid.config(cell.rows, cell.seed or 0)) if cell.kind == "glp" else 0


def _held(trunk: Path) -> dict[int, Path]:
    """The states in a folder in which the learning rate was still held, by their number of steps."""
    return {int(path.stem.removeprefix("step_")): path for path in trunk.glob("step_*.state")}


def _last(there: Iterable[int], config: TrainConfig) -> int:
    return max((steps for steps in there if steps <= config.steps_held), default=0)


def _fit_glp(
    cell: Cell, unit: Unit, grid: GridSettings, store: ActivationStore, trunk: Path, keep_states: bool, device: str
) -> GLP:
    """A prior, from where a longer training left its state, or from the first step."""
    config = grid.config(cell.rows, cell.seed or 0)
    distributed.barrier()  # all processes must see the same files
    begun = _last(there := _held(trunk), config)
    wanted = {grid.config(each.rows, each.seed or 0).steps_held for each in unit.cells if each.rows < cell.rows}
    wanted |= {config.steps_held} if keep_states else set()
    distributed.barrier()  # and none write before all have seen them
    run = RunOptions(
        state=_state(cell, trunk),
        start=there.get(begun),
        keep={steps: trunk / f"step_{steps:08d}.state" for steps in wanted if steps > begun and steps not in there},
    )
    assert cell.d_model is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="a denoiser of width")  # told once, before the first
        return GLP.fit(
            store, config, d_model=cell.d_model, d_mlp=cell.d_mlp, n_layers=cell.n_layers or 1,
            device=distributed.device(device), run=run,
        )  # fmt: skip


def _fit(cell: Cell, grid: GridSettings, store: ActivationStore, device: str) -> ActivationModel:
    if cell.kind == "sae":
        return SAE.fit(
            store, n_latents=cell.latents, k=grid.sae_k, rows=cell.rows, device=device, seed=cell.seed or 0
        )  # fmt: skip
    if cell.kind == "pca":
        return PCA.fit(store, n_components=cell.rank)
    return Gaussian.fit(store) if cell.kind == "gaussian" else Raw.fit(store)


def remove_states(trunk: Path, *, but_longest: bool = False) -> None:
    """Remove the states of a unit's trainings, or all but that of most steps in which the learning rate was held."""
    if not but_longest or not (there := _held(trunk)):
        shutil.rmtree(trunk, ignore_errors=True)
        return
    for path in _others(trunk, there):
        path.unlink(missing_ok=True)


def has_other_states(trunk: Path, *, but_longest: bool) -> bool:
    """Whether there are states that `remove_states` would remove."""
    there = _held(trunk) if but_longest else {}
    return bool(_others(trunk, there)) if there else trunk.exists()


def _others(trunk: Path, there: dict[int, Path]) -> list[Path]:
    return [path for path in trunk.glob("*.state") if path != there[max(there)]]


def seconds_per_flop(cell: Cell, grid: GridSettings, d_in: int, *, device: str = "cpu") -> float:
    """Time of a GLP's training, by its floating-point operations: from steps of its smallest and largest batches."""
    config = grid.config(cell.rows, cell.seed or 0)
    shape = shape_of(d_in, cell.d_model or 1, cell.d_mlp or 1, cell.n_layers or 1)
    most = config.largest_batch // config.batch_size
    small = _seconds_a_step(shape, config, 1, device)
    more = (_seconds_a_step(shape, config, most, device) - small) / (most - 1) if most > 1 else 0.0
    seconds = config.updates * (small - more) + config.steps * more  # what a step takes rises evenly with its batches
    return seconds / flops_of(shape, config)


def _seconds_a_step(shape: DenoiserConfig, config: TrainConfig, together: int, device: str) -> float:
    """Median time of a few steps of so many batches, on random rows."""
    size = together * config.batch_size
    short = replace(config, rows=size * (_STEPS + 2), batch_size=size, grow_rows=0, warmup_rows=0, init="default")
    denoiser = initial_denoiser(shape, short).to(device)
    rows = torch.randn(size, shape.d_input, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    began: list[float] = []

    def feed(_: int) -> Generator[Batch]:
        while True:
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            began.append(time.perf_counter())
            yield Batch(rows)

    denoiser.requires_grad_(True)
    with numerics.training():
        train(denoiser, feed, short, run=RunOptions(log_points=1))
    return median(after - before for before, after in pairwise(began[2:]))


def sae_seconds_per_flop(cell: Cell, grid: GridSettings, store: ActivationStore, *, device: str = "cpu") -> float:
    """Time of a few steps of an SAE's training, by their floating-point operations; what comes before not counted."""
    fit: Callable[[int], SAE] = lambda rows: SAE.fit(  # noqa: E731
        store, n_latents=cell.latents, k=grid.sae_k, rows=rows, device=device
    )
    # The first is not counted: it also loads sae-lens.
    _, few, many = (fit(512 * steps).provenance["training"] for steps in (2, 2, 2 + 2 * _STEPS))
    return float(max(0.0, many["seconds"] - few["seconds"]) / max(1.0, many["flops"] - few["flops"]))
