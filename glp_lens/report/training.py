"""What each model got: data and compute."""

from __future__ import annotations

from collections.abc import Sequence

from glp_lens.display.elements import Cell, Table
from glp_lens.display.labels import DASH, count, display, duration, flops
from glp_lens.types import Json


def training_table(rows: Sequence[Json], store_rows: int | None = None) -> Table:
    """What each model got: rows seen, passes, parameters, operations, seconds, and its own settings.

    Args:
        rows: one mapping a model; one without `rows_distinct` saw at most the store's rows.
        store_rows: rows of the store, if known.
    """
    shown = ("model", "rows_seen", "rows_distinct", "parameters", "flops", "seconds")
    body = []
    for row in rows:
        seen, distinct = row.get("rows_seen"), row.get("rows_distinct")
        if distinct is None and seen is not None:
            distinct = min(seen, store_rows) if store_rows else None
        passes = f"{seen / distinct:.1f} passes" if seen and distinct and seen > distinct else ""
        rest = "; ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in row.items() if k not in shown)
        body.append(
            [
                Cell(display(str(row.get("model", "")))),
                Cell(count(seen), passes),
                Cell(count(distinct)),
                Cell(count(row.get("parameters"))),
                Cell(flops(row.get("flops"))),
                Cell(duration(row.get("seconds"))),
                Cell(rest or DASH),
            ]
        )
    header = ["Model", "Rows seen", "Distinct rows", "Parameters", "Training FLOPs", "Time", "Settings"]
    caption = "Data and compute of each model. A row is the activation of one token."
    return Table(caption, header, body, prose=("Settings",))


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
