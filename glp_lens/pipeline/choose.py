"""Choosing: which prior a scaling run says to train for so many rows and minutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens.scaling.choosing import Choice


@dataclass(frozen=True, kw_only=True)
class ChooseJob(Settings):
    """Settings of `choose`."""

    panel = "Choice"

    run: Path
    """Folder of a run of 'scale'."""
    rows: int = option(min=1)
    """Distinct activations that there are to train on."""
    minutes: float | None = option(None, min=0.01)
    """Minutes that the training may take; by default as long as the passes over the rows last."""
    flops_per_second: float | None = option(None, min=1)
    """Speed of the machine in training; by default that of each size in the run."""
    width_ratio: float = option(1.0, min=0.01, max=100)
    """Width of your activations over that of the run's: shapes scale with it, and losses are then a guess."""


@checked
def choose(settings: ChooseJob, *, say: Callable[[str], None] = print) -> list[Choice]:
    """Tell from a scaling run which prior to train, on how many rows, for what loss.

    Args:
        say: prints a line.

    Returns:
        One for each size that can be judged, the best first.

    Raises:
        InputError: no scaling run, or one of too few budgets.
    """
    from glp_lens.display.labels import count, duration, interval, number, with_interval
    from glp_lens.errors import counted
    from glp_lens.scaling.cells import read_cells
    from glp_lens.scaling.choosing import choose as choose_from

    choices = choose_from(
        read_cells(settings.run), rows=settings.rows, minutes=settings.minutes,
        flops_per_second=settings.flops_per_second, width_ratio=settings.width_ratio,
    )  # fmt: skip
    for each in choices:
        ends = interval(*each.loss[1:3]) or "(no interval, trained once)"
        loss = f"loss {number(each.loss.value)} {ends}"
        if each.below is not None:
            percent = with_interval(*each.below[:3], 1)
            loss += f", per cent below the best Gaussian: {percent}"
        if each.reach > 1:
            loss += f"; extrapolated, {number(each.reach, 1)} times the most rows of the run"
        say(
            f"width {each.d_model}, {counted(each.n_layers, 'block')} of {each.d_mlp}: {count(each.rows)} rows "
            f"({number(each.passes, 1)} passes) in {duration(each.seconds)}: {loss}"
        )
    best = choices[0]
    say(
        f"glp-lens train glp --width {best.d_model} --mlp {best.d_mlp} --layers {best.n_layers} --rows {best.rows} "
        "--store ACTS --out OUT"
    )
    return choices
