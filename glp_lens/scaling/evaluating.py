"""What is measured of the models of a scaling run: the held-out loss of a prior, and the numbers of the suites."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens import numerics
from glp_lens.errors import InputError
from glp_lens.evals.results import Results, Setting
from glp_lens.scaling.cells import (
    CELL_FOLDERS,
    UTILITIES,
    UTILITY_COLUMNS,
    Cell,
    read_utilities,
    write_cells,
    write_utilities,
)
from glp_lens.training.objective import Batch, validation_loss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

    from glp_lens.activations import ActivationStore
    from glp_lens.models.glp import GLP

LOSS_ROWS = 16_384
"""Held-out rows, at most, that the loss is measured on: the same for all priors, with the same noise."""
_LOSS = "validation_loss"


@numerics.own()
def held_out_loss(model: GLP, heldout: ActivationStore) -> tuple[float, dict[str, float]]:
    """Flow-matching loss per element of a prior on held-out rows, and by tenths of the noise level, as `0.0-0.1`.

    Rows, noise and noise levels are the same for all priors that share a normaliser, so that their losses differ by the
    priors alone. Rows that were too long to count in training are left out.

    Raises:
        InputError: no row is left.
    """
    rows = heldout.sample(LOSS_ROWS, seed=0)
    if model.max_norm is not None:
        rows = rows[rows.norm(dim=1) <= model.max_norm]
    if not len(rows):
        raise InputError(f"{heldout.path} has no row that is short enough to count: collect it as the training store")
    found = validation_loss(model.denoiser, Batch(model.normalize(rows)))
    bands = {name.partition("sigma=")[2]: value for name, value in found.items() if name != _LOSS}
    return found[_LOSS], bands


def write_tables(out: Path, measured: Mapping[str, Sequence[str]], new: str | None = None) -> None:
    """Write the tables of cells, and of what the suites have measured of them.

    Args:
        measured: by the name of each trained cell, the suites that are done.
        new: the only cell whose results changed since the last call; for the others what the table holds is kept.

    Raises:
        InputError: a damaged file of a cell or of results.
    """
    import pandas as pd

    folders = {name: out / CELL_FOLDERS / name for name in measured}
    cells = {name: Cell.load(folder) for name, folder in folders.items()}
    pairs = [(name, suite) for name, suites in measured.items() for suite in suites]
    frames, kept = [], set[tuple[str, str]]()
    if new is not None and (out / UTILITIES).exists():
        with suppress(InputError):  # a damaged one is made again
            before = read_utilities(out)
            there = list(zip(before.cell, before.suite, strict=True))
            kept = {pair for pair in pairs if pair[0] != new} & {*there}
            frames.append(before[[pair in kept for pair in there]])
    frames += [
        utilities(name, cells[name].kind, _results(results))
        for name, suite in pairs
        if (name, suite) not in kept and ((results := folders[name] / "results" / suite) / "results.json").exists()
    ]
    frames = [frame for frame in frames if len(frame)]
    write_cells(out, cells.values())
    write_utilities(out, pd.concat(frames) if frames else pd.DataFrame(columns=list(UTILITY_COLUMNS)))


def _results(folder: Path) -> Results:
    """Of a suite, which here is run again by running the whole again."""
    try:
        return Results.load(folder)
    except InputError as error:
        raise InputError(f"{error}; in a scaling run, delete the file and run again") from None


def utilities(cell: str, label: str, results: Results) -> pd.DataFrame:
    """The numbers of a suite on one cell, with `UTILITY_COLUMNS`.

    What is not of the model as it is, but of another way to use it or of a control, has a last part `entry=...` in its
    setting: `entry=sigma=0.3`, `entry=difference`, `entry=plain`.

    Args:
        label: what the suite called the model.
    """
    import pandas as pd

    rows: list[Mapping[str, object]] = []
    for metric in results.metrics:
        entry = metric.model.removeprefix(label).strip() if metric.model.startswith(label) else metric.model
        setting = metric.setting | Setting(entry=entry) if entry else metric.setting
        rows.append({**metric.row(), "cell": cell, "setting": str(setting)})
    return pd.DataFrame(rows, columns=list(UTILITY_COLUMNS))
