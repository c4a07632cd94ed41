"""Which size of prior to train, for how many rows, and what loss to expect, from the cells of a scaling run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glp_lens.errors import InputError
from glp_lens.intervals import Interval
from glp_lens.scaling.fits import LEAST, fit

if TYPE_CHECKING:
    import pandas as pd

_SHAPE = ["d_model", "d_mlp", "n_layers"]


@dataclass(frozen=True)
class Choice:
    """One size of prior, trained as long as rows and time allow.

    Attributes:
        d_model, d_mlp, n_layers: shape of the denoiser.
        rows: to train on, counted as often as they are seen.
        passes: over the distinct rows.
        flops: of the training.
        seconds: that it takes.
        loss: held-out flow-matching loss of one training, and the 95% interval that it should fall in.
        below: per cent below the least loss of any Gaussian, with interval; None where the run does not know that.
        reach: rows over the most that the run gave this size; above 1 the loss is extrapolated.
    """

    d_model: int
    d_mlp: int
    n_layers: int
    rows: int
    passes: float
    flops: float
    seconds: float
    loss: Interval
    below: Interval | None
    reach: float


def choose(
    cells: pd.DataFrame,
    *,
    rows: int,
    minutes: float | None = None,
    flops_per_second: float | None = None,
    width_ratio: float = 1.0,
) -> list[Choice]:
    """The sizes of a run as they would be trained with so many rows and minutes, the lowest expected loss first.

    Each size has its own fit of loss to compute, over its budgets and seeds. No size is trained for more passes over
    the rows than the run made over its own: what more passes do is not known. Losses are of the run's activations.

    Args:
        cells: table of a run, as `read_cells` gives it.
        rows: distinct activations that there are to train on.
        minutes: that the training may take; by default as long as the passes last.
        flops_per_second: speed of the machine; by default each size's own in the run.
        width_ratio: width of the activations over that of the run's. Denoisers are as many times as wide, and a row
            costs its square; that they have the loss of the run's after as many rows is then a guess.

    Raises:
        InputError: no size of the run has enough budgets for a fit, or the time is too short for any.
    """
    glps = cells[(cells.kind == "glp") & cells.loss.notna()]
    gaussian = cells[cells.kind == "gaussian"].loss.dropna()
    bound = float(gaussian.iloc[0]) if len(gaussian) else None
    passes = max(1.0, float(glps.passes.max())) if len(glps) else 1.0
    made = []
    for shape, size in glps.groupby(_SHAPE):
        if size.flops.nunique() < LEAST:
            continue
        each = float((size.flops / size.rows).median())
        speed = flops_per_second or float((size.flops / size.seconds).median())
        cost = each * width_ratio**2
        most = int(passes * rows)
        seen = most if minutes is None else int(min(most, 60 * minutes * speed / cost))
        if seen < size.rows.min():  # shorter than any training of the run: the learning rate has hardly risen
            continue
        value, low, high = map(float, fit(size.flops, size.loss, size.trunk).predict([each * seen])[:, 0])
        trunks = size.trunk.nunique()
        below = None
        if bound is not None:
            share, least, most_below = (100 * (1 - loss / bound) for loss in (value, high, low))
            below = Interval(share, least, most_below, trunks)
        made.append(
            Choice(
                d_model=round(width_ratio * shape[0]),
                d_mlp=round(width_ratio * shape[1]),
                n_layers=int(shape[2]),
                rows=seen,
                passes=seen / rows,
                flops=cost * seen,
                seconds=cost * seen / speed,
                loss=Interval(value, low, high, trunks),
                below=below,
                reach=seen / float(size.rows.max()),
            )
        )
    if not made:
        raise InputError(
            f"no size of this run can be judged: expected at least {LEAST} budgets of one and room for its smallest; "
            "train more budgets, or allow more rows or minutes"
        )
    return sorted(made, key=lambda choice: choice.loss.value)
