"""How long a scaling run takes: from short trainings before it, and on the way from what it has done."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from glp_lens.errors import readable_size
from glp_lens.scaling.cells import Cell
from glp_lens.scaling.grid import GridSettings, Unit, own_flops

_STATE, _MODEL = 12, 4
"""Bytes of a parameter in a state of training, with AdamW's two averages, and in a saved model."""


@dataclass
class Times:
    """What trainings and evaluations take on this machine.

    Attributes:
        seconds: of each stage that is done: of cells by name, of suites as `CELL.SUITE`.
        rates: seconds of a floating-point operation, by shape of a model (`shape`), where they were measured.
    """

    seconds: Mapping[str, float]
    rates: dict[tuple[object, ...], float] = field(default_factory=dict)

    def training(self, cell: Cell, unit: Unit, grid: GridSettings) -> float:
        """Expected seconds of a cell's training, without the part that a longer one has done; NaN if unknown."""
        if not cell.flops:
            return self.seconds.get(cell.cell, 0.0)
        known = (self.rates[key] for key in (shape(cell), (cell.kind,), ()) if key in self.rates)
        rate = next(known, math.nan)
        return rate * own_flops(cell, unit, grid)

    def measuring(self, cell: Cell, suites: Sequence[str]) -> float:
        """Expected seconds of the suites on a cell: their mean on cells that are done, of its kind if there are any."""
        return sum(self._measuring(cell, suite) for suite in suites)

    def _measuring(self, cell: Cell, suite: str) -> float:
        known = {name: value for name, value in self.seconds.items() if name.endswith(f".{suite}")}
        alike = [value for name, value in known.items() if name.startswith(cell.kind)]
        return mean(alike or known.values() or [0.0])

    def learn(self, trained: Iterable[Cell]) -> None:
        """Take the rates of trainings that are done, for each shape, for each kind, and for all."""
        done = [cell for cell in trained if cell.flops]
        keys: tuple[Callable[[Cell], tuple[object, ...]], ...] = (shape, lambda cell: (cell.kind,), lambda _: ())
        for key_of in keys:
            work: dict[tuple[object, ...], list[float]] = {}
            for cell in done:
                total = work.setdefault(key_of(cell), [0.0, 0.0])
                total[0] += cell.seconds
                total[1] += cell.flops
            self.rates |= {key: seconds / flops for key, (seconds, flops) in work.items()}


def shape(cell: Cell) -> tuple[object, ...]:
    """What the time of an operation in a cell's training depends on."""
    return (cell.kind, cell.d_model, cell.n_layers, cell.latents)


def table(
    units: Sequence[Unit],
    training: Mapping[str, float],
    measuring: float | None,
    done: Collection[str],
    workers: int,
    *,
    keep_models: bool,
    keep_states: bool,
) -> list[str]:
    """Lines that tell what a run trains, and what that takes: parameters, operations, time and disk.

    Args:
        training: expected seconds of the trainings that are not done, by name of the cell.
        measuring: expected seconds of the evaluations that are not done; 0 where unknown, None if there are none.
        done: names of the cells that are, with all their evaluations.
        workers: cells that are made at a time.
    """
    lines = [f"{'cell':<28} {'parameters':>12} {'passes':>7} {'FLOPs':>9} {'seconds':>9} {'model':>9}"]
    for cell in (cell for unit in units for cell in unit.cells):
        seconds = "done" if cell.cell in done else f"{training.get(cell.cell, 0.0):.0f}"
        size = readable_size(_MODEL * cell.parameters)
        lines.append(
            f"{cell.cell:<28} {cell.parameters:>12,} {cell.passes:>7.2f} {cell.flops:>9.2e} {seconds:>9} {size:>9}"
        )
    alone = sum(cell.flops for unit in units for cell in unit.cells)
    shared = sum(unit.flops for unit in units)
    number = sum(len(unit.cells) for unit in units)
    lines.append(f"{number} cells: {shared:.2e} FLOPs, where one by one they would take {alone:.2e}")
    line = f"about {duration(sum(training.values()) / workers)} of training"
    if measuring:
        line += f" and {duration(measuring / workers)} of evaluations, going by those that are done"
    elif measuring is not None:
        line += ", evaluations not counted"
    line += f", with {workers} at a time" if workers > 1 else ""
    lines.append(f"{len(done)} of them are done; left: {line}" if done else line)
    ladders = [unit for unit in units if len(unit.cells) > 1]
    if ladders:
        longest = sum(unit.cells[0].flops for unit in ladders)
        together = sum(unit.flops for unit in ladders) / longest
        single = sum(cell.flops for unit in ladders for cell in unit.cells) / longest
        lines.append(
            f"a ladder of budgets costs {together:.2f} trainings of its largest budget, one by one {single:.2f}"
        )
    states = max((_STATE * unit.cells[0].parameters * (len(unit.cells) + 1) for unit in ladders), default=0) * workers
    models = sum(_MODEL * cell.parameters for unit in units for cell in unit.cells)
    kept = f"{readable_size(models)} of models, and " if keep_models else ""
    if keep_states:
        longest = sum(_STATE * unit.cells[0].parameters for unit in units if unit.cells[0].kind == "glp")
        kept += f"{readable_size(longest)} of states that stay, and "
    lines.append(f"disk: {kept}at most {readable_size(states)} of states on the way")
    return lines


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in words."""
    if math.isnan(seconds):
        return "an unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
