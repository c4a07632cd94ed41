"""The grid of a scaling run: which models it trains, in which units they are made, and what they cost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from glp_lens.errors import InputError
from glp_lens.scaling.cells import Cell
from glp_lens.settings import Settings, option
from glp_lens.training.config import TrainConfig, recipe

if TYPE_CHECKING:
    from glp_lens.models.denoiser import DenoiserConfig


@dataclass(frozen=True, kw_only=True)
class GridSettings(Settings):
    """Sizes, budgets and seeds of the models of a scaling run."""

    panel = "Grid"

    widths: tuple[int, ...] = option((576, 768, 1152), min=1, memory=True)
    """Widths of the GLPs' denoisers, separated by commas; those below the width of the activations lose by it."""
    layers: tuple[int, ...] = option((3,), min=1, memory=True)
    """Numbers of blocks; each goes with each width."""
    shapes: tuple[str, ...] = option(())
    """Pairs of width and blocks, such as '576x1, 768x3', in place of each width with each number of blocks."""
    mlp_ratio: float = option(2.0, min=0.01, max=64)
    """Meta-neurons in each block, in widths."""
    rows: tuple[int, ...] = option((100_000, 200_000, 400_000), min=1)
    """Activations that a GLP or SAE sees; each with each size. More than the store holds means several passes."""
    glp_seeds: tuple[int, ...] = option((1,), min=1)
    """Number of trainings of each GLP, that differ in the seed: one number, or one for each width or pair of shapes."""
    warmup_rows: int | None = option(None, min=1)
    """Rows in which a GLP's learning rate rises, in all budgets; by default a tenth of the smallest."""
    most_flops: float | None = option(None, min=1, max=1e30)
    """Leave out trainings that take more floating-point operations than this."""
    sae_latents: tuple[int, ...] = option((), min=1, memory=True)
    """Dictionary sizes of SAEs, separated by commas; by default there are none."""
    sae_rows: tuple[int, ...] = option((), min=1)
    """Activations that an SAE sees, where they are not those of --rows."""
    pca_ranks: tuple[int, ...] = option((), min=1)
    """Numbers of components of PCAs, separated by commas; by default there are none."""
    glp_batch: int | None = option(None, min=1, memory=True)
    """Rows in each step of a GLP; by default those of the recipe 'fast', 256 and more as it goes on."""
    glp_lr: float | None = option(None, min=0, max=1)
    """Peak learning rate of the GLPs; by default that of the recipe 'fast', which falls with the width."""
    sae_k: int = option(32, min=1)
    """Latents of an SAE that are active on a row."""

    def __post_init__(self) -> None:
        """Refuse grids that cannot be trained.

        Raises:
            InputError: repeated or missing values, budgets that are too small, or numbers of seeds for other widths.
        """
        super().__post_init__()
        for name in ("widths", "layers", "shapes", "rows", "sae_latents", "sae_rows", "pca_ranks"):
            if len(set(values := getattr(self, name))) < len(values):
                raise InputError(f"{name} must differ, got {', '.join(map(str, values))}")
        for name in ("widths", "layers", "rows", "glp_seeds"):
            if not getattr(self, name):
                raise InputError(f"{name} must be at least one number")
        for shape in self.shapes:
            if not re.fullmatch(r"[1-9][0-9]{0,6}x[1-9][0-9]{0,3}", shape):
                raise InputError(f"shapes must be pairs of width and blocks, such as 768x3, got {shape!r}")
        each = self.shapes or self.widths
        if len(self.glp_seeds) not in (1, len(each)):
            kind = "shapes" if self.shapes else "widths"
            raise InputError(f"glp_seeds must be one number, or one for each of {len(each)} {kind}")
        if self.glp_lr is not None and not 0 < self.glp_lr < 1:
            raise InputError(f"glp_lr must be between 0 and 1, got {self.glp_lr}")
        recipe("fast", min(self.rows), batch_size=self.glp_batch)  # refuses what is less than one batch
        if self.rise >= min(self.rows):
            raise InputError(f"warmup_rows must be less than the smallest of rows, {min(self.rows)}, got {self.rise}")
        if self.sae_latents and self.sae_k > min(self.sae_latents):
            raise InputError(f"sae_k must be at most the smallest of sae_latents, {min(self.sae_latents)}")

    @property
    def trained(self) -> list[tuple[int, int, int]]:
        """Width, blocks and number of seeds of each size of GLP."""
        pairs = [tuple(map(int, shape.split("x"))) for shape in self.shapes]
        seeds = self.glp_seeds * (1 if len(self.glp_seeds) > 1 else len(self.shapes or self.widths))
        if pairs:
            return [(width, layers, count) for (width, layers), count in zip(pairs, seeds, strict=True)]
        each = product(zip(self.widths, seeds, strict=True), self.layers)
        return [(width, layers, count) for (width, count), layers in each]

    @property
    def rise(self) -> int:
        """Rows in which the learning rate of all GLPs rises."""
        return self.warmup_rows or max(1, min(self.rows) // 10)

    def config(self, rows: int, seed: int) -> TrainConfig:
        """How a GLP is trained for a budget: trainings of one size and seed begin alike, whatever their budgets."""
        changes: dict[str, Any] = {"batch_size": self.glp_batch, "lr": self.glp_lr, "seed": seed}
        return recipe("fast", rows, warmup_rows=self.rise, **changes)


def planned(grid: GridSettings, *, seed: int, d_in: int, stored: int) -> list[Cell]:
    """The cells of a grid, with what is known of them before they are trained: all but `seconds` and losses.

    Args:
        seed: the first one.
        d_in: width of the activations.
        stored: rows of the store.

    Raises:
        InputError: nothing is left of the grid, or a PCA of more components than there are dimensions.
    """
    cells = [Cell("gaussian", "gaussian", d_in * (d_in + 1) // 2 + d_in, stored, 1.0, 0.0, 0.0)]
    cells.append(Cell("raw", "raw", 0, 0, 0.0, 0.0, 0.0))
    for rank in grid.pca_ranks:
        if rank > d_in:
            raise InputError(f"pca_ranks must be at most {d_in}, the width of the activations, got {rank}")
        cells.append(Cell(f"pca-{rank}", "pca", (rank + 2) * d_in, stored, 1.0, 0.0, 0.0, rank=rank))
    for latents, rows in product(grid.sae_latents, grid.sae_rows or grid.rows):
        parameters = 2 * latents * d_in + latents + d_in
        cells.append(
            Cell(
                f"sae-{latents}-r{rows}-s{seed}", "sae", parameters, rows, rows / stored, 6.0 * parameters * rows, 0.0,
                latents=latents, seed=seed,
            )
        )  # fmt: skip
    for width, layers, count in grid.trained:
        shape = shape_of(d_in, width, max(1, round(grid.mlp_ratio * width)), layers)
        for own, rows in product(range(seed, seed + count), grid.rows):
            config, trunk = grid.config(rows, own), f"glp-w{width}x{layers}"
            cells.append(
                Cell(
                    f"{trunk}-r{rows}-s{own}", "glp", shape.n_parameters, rows, rows / stored,
                    flops_of(shape, config), 0.0, d_model=width, d_mlp=shape.d_mlp, n_layers=layers, seed=own,
                    trunk=f"{trunk}-s{own}",
                )
            )  # fmt: skip
    if grid.most_flops is not None:
        cells = [cell for cell in cells if cell.flops <= grid.most_flops]
        if not any(cell.kind == "glp" for cell in cells):
            raise InputError(f"no training of a GLP takes at most {grid.most_flops:g} FLOPs: raise most_flops")
    return cells


@cache
def shape_of(d_in: int, width: int, mlp: int, layers: int) -> DenoiserConfig:
    """The shape of a GLP's denoiser."""
    from glp_lens.models.denoiser import DenoiserConfig

    return DenoiserConfig(d_in, width, mlp, layers)


def flops_of(shape: DenoiserConfig, config: TrainConfig) -> float:
    """Floating-point operations of a training from its first step to its last."""
    return 3 * _flops_per_row(shape, config.rows_per_sigma) * config.steps * config.batch_size


@cache
def _flops_per_row(shape: DenoiserConfig, rows_per_sigma: int) -> float:
    import torch

    from glp_lens.models.denoiser import Denoiser

    with torch.device("meta"):  # which takes no memory
        return Denoiser(shape).flops_per_row(rows_per_sigma)


@dataclass(frozen=True)
class Unit:
    """Cells that are made one after the other, since they share the beginning of a training.

    Attributes:
        name: of the trunk, or of the only cell.
        cells: the longest training first.
        flops: of the trainings, the shared part counted once.
        begun: steps of the shared part that an earlier run has kept the state of.
    """

    name: str
    cells: tuple[Cell, ...]
    flops: float
    begun: int = 0


def units(cells: Iterable[Cell], grid: GridSettings) -> list[Unit]:
    """The units of a grid, the longest first, so that several workers end at about the same time."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.trunk or cell.cell, []).append(cell)
    made = []
    for name, group in groups.items():
        ladder = tuple(sorted(group, key=lambda cell: -cell.rows))
        unit = Unit(name, ladder, 0.0)
        made.append(replace(unit, flops=sum(own_flops(cell, unit, grid) for cell in ladder)))
    return sorted(made, key=lambda unit: -unit.flops)


def own_flops(cell: Cell, unit: Unit, grid: GridSettings) -> float:
    """Operations that a training of a unit adds: all of the longest that are not begun, of others the last part."""
    if cell.seed is None or cell.kind != "glp":
        return cell.flops
    config = grid.config(cell.rows, cell.seed)
    begun = unit.begun if cell is unit.cells[0] else config.steps_held
    return cell.flops * (1 - begun / config.steps)


def part(all_units: Sequence[Unit], i: int, n: int) -> list[Unit]:
    """The i-th of n parts of the units, of about equal work: each unit goes to the part that has least."""
    loads = [0.0] * n
    chosen = []
    for unit in all_units:
        lightest = loads.index(min(loads))
        loads[lightest] += unit.flops + 0.02 * len(unit.cells) * all_units[0].flops  # evaluations take time too
        if lightest == i:
            chosen.append(unit)
    return chosen
