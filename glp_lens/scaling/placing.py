"""Where one model stands among the cells of a scaling run."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from glp_lens.display.labels import count, flops, number
from glp_lens.types import Json

if TYPE_CHECKING:
    import pandas as pd

_BATCH = 0.1
"""Share of the rows by which what a training saw may differ from its budget."""


def cell_of(cells: pd.DataFrame, kind: str, training: Json) -> pd.Series | None:
    """The cell of a run that a GLP or SAE is, by what its training was; None if it is of none.

    Args:
        cells: table of a run, as `read_cells` gives it.
        kind: of the model.
        training: the part `training` of its provenance.
    """
    rows, parameters, seed = (training.get(name) for name in ("rows_seen", "parameters", "seed"))
    own = cells[(cells.kind == kind) & (cells.parameters == parameters) & (cells.seed == seed)]
    if not rows or own.empty:
        return None
    nearest = own.loc[(own.rows / rows - 1).abs().idxmin()]  # whole batches are seen, not quite the budget
    return nearest if abs(nearest.rows / rows - 1) < _BATCH else None


def place(cells: pd.DataFrame, cell: pd.Series) -> str:
    """What a model card says of the cell's place in its run, as Markdown: cost, loss, and the cells it is beside.

    Args:
        cells: all cells of the run.
        cell: a row of them.
    """
    peers = cells[cells.kind == cell.kind]
    others = ", ".join(f"{len(of)} {kind}" for kind, of in cells[cells.kind != cell.kind].groupby("kind", sort=False))
    among = f"one of {len(peers)} {cell.kind} cells" if len(peers) > 1 else f"the only {cell.kind} cell"
    lines = [
        f"`{cell.cell}`, {among}" + (f" (beside {others})" if others else "") + ": "
        f"{count(cell.parameters)} parameters, {count(cell.rows)} rows seen ({number(cell.passes, 2)} passes), "
        f"{flops(cell.flops)} FLOPs."
    ]
    if isfinite(cell.loss):
        lines += _loss(cells, peers[peers.loss.notna()], cell)
    return "\n".join(f"- {line}" for line in lines)


def _loss(cells: pd.DataFrame, peers: pd.DataFrame, cell: pd.Series) -> list[str]:
    """The cell's loss beside the Gaussian's, other seeds', and that of cells that cost no more."""
    lines = [f"Held-out flow-matching loss {number(cell.loss)}, the same rows and noise for all cells"]
    gaussian = cells[cells.kind == "gaussian"].loss.dropna()
    if cell.kind == "glp" and len(gaussian):
        bound = float(gaussian.iloc[0])
        below = 100 * (1 - cell.loss / bound)
        side = "below" if below >= 0 else "above"
        lines[0] += f": {number(abs(below), 1)}% {side} the least that any Gaussian can reach ({number(bound)})"
    if len(peers) == 1:
        return [f"{lines[0]}."]
    rank = int((peers.loss < cell.loss).sum()) + 1
    lines[0] += f"; {rank} of {len(peers)} by loss."
    shape = [name for name in ("rows", "parameters", "d_model", "d_mlp", "n_layers", "latents") if cell.notna()[name]]
    seeds = peers[(peers[shape] == cell[shape]).all(axis=1) & (peers.cell != cell.cell)].loss
    if len(seeds):
        lines.append(f"Other seeds of it: {', '.join(map(number, seeds))}.")
    cheaper = peers[(peers.flops <= cell.flops) & (peers.loss < cell.loss)].sort_values("loss")
    if len(cheaper):
        best = cheaper.iloc[0]
        lines.append(f"For no more compute `{best.cell}` has {number(best.loss)} ({flops(best.flops)} FLOPs).")
    else:
        lines.append("No cell of the run reaches that for as much compute or less.")
    return lines
