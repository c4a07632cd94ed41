"""The two tables of a scaling run: its cells, and what the suites measured of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from glp_lens.errors import InputError
from glp_lens.files import Kind, read_json, read_table, write_json, write_table

if TYPE_CHECKING:
    import pandas as pd

    from glp_lens.types import Json

CellKind = Literal["glp", "sae", "pca", "gaussian", "raw"]
CELLS, UTILITIES = "cells.parquet", "utilities.parquet"
"""Names of the tables in the folder of a scaling run."""
CELL_FOLDERS = "cells"
"""Folder of a scaling run with a folder for each cell."""
_CELL = Kind("cell of a scaling run", "delete its folder and run again")
_CELLS_FILE = Kind("cells of a scaling run", "run again")
_UTILITIES_FILE = Kind("utilities of a scaling run", "run again")
UTILITY_COLUMNS = ("cell", "suite", "task", "setting", "metric", "value", "ci_low", "ci_high", "n")
"""Of the table of utilities: those of `metrics.csv`, with the cell for the model."""
BAND = "loss:sigma="
"""Columns of the loss by noise level begin so, as in `loss:sigma=0.0-0.1`."""


@dataclass(frozen=True)
class Cell:
    """One model of a scaling run: what it is, what it cost, and its loss. None is what it has none of.

    Attributes:
        cell: name, `glp-w384x3-r300000-s0`, `sae-1152-r300000-s0`, `pca-64`, `gaussian`, `raw`.
        kind: of model.
        parameters: number of numbers in the model.
        rows: of training, counted as often as they are seen.
        passes: over the rows of the store, as many as `rows` make.
        flops: of the training, forward and backward; a branch has those of the whole training it is equal to.
        seconds: wall-clock time that the training would have taken alone, so with the part shared with other budgets.
        d_model, d_mlp, n_layers: shape of a GLP's denoiser.
        latents: of an SAE.
        rank: of a PCA.
        seed: of the training.
        trunk: name of the longest training of this shape and seed, whose beginning the cells of a ladder share.
        loss: flow-matching loss per element on the held-out rows, with the noise that all cells share; of the
            Gaussian, the loss that the best denoiser would have if the training rows were Gaussian.
        bands: the same by tenths of the noise level, `0.0-0.1` and so on.
    """

    cell: str
    kind: CellKind
    parameters: int
    rows: int
    passes: float
    flops: float
    seconds: float
    d_model: int | None = None
    d_mlp: int | None = None
    n_layers: int | None = None
    latents: int | None = None
    rank: int | None = None
    seed: int | None = None
    trunk: str | None = None
    loss: float | None = None
    bands: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `cell.json` into the folder of the cell."""
        write_json(folder / "cell.json", asdict(self), _CELL, self.cell)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote; the folder has the cell's name.

        Raises:
            InputError: there is none, or it is damaged.
        """
        value = read_json(folder / "cell.json", _CELL, folder.name)
        try:
            return cls(**value)
        except TypeError as error:
            raise InputError(f"{folder / 'cell.json'} is damaged ({error}): {_CELL.remedy}") from None

    def row(self) -> Json:
        """As a row of the table."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "bands"}
        return plain | {BAND + name: value for name, value in self.bands.items()}


CELL_COLUMNS = tuple(each.name for each in fields(Cell) if each.name != "bands")
"""Of the table of cells, which also has one for each band of noise levels."""
_TEXTS, _COUNTS = ("cell", "kind", "trunk"), ("parameters", "rows")


def write_cells(folder: Path, cells: Iterable[Cell]) -> None:
    """Write `cells.parquet`: numbers that a cell lacks are NaN, its trunk an empty text."""
    import pandas as pd

    rows = [cell.row() for cell in cells]
    bands = sorted({name for row in rows for name in row if name.startswith(BAND)})
    frame = pd.DataFrame(rows, columns=[*CELL_COLUMNS, *bands])
    types = {name: "int64" if name in _COUNTS else "float64" for name in frame if name not in _TEXTS}
    write_table(folder / CELLS, frame.astype(types).fillna({"trunk": ""}), _CELLS_FILE)


def read_cells(folder: Path) -> pd.DataFrame:
    """The table of cells, with `CELL_COLUMNS` and those of the bands.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return _read(folder / CELLS, _CELLS_FILE, CELL_COLUMNS)


def write_utilities(folder: Path, frame: pd.DataFrame) -> None:
    """Write `utilities.parquet`, with `UTILITY_COLUMNS`."""
    types = dict.fromkeys(("value", "ci_low", "ci_high"), "float64") | {"n": "int64"}
    write_table(folder / UTILITIES, frame[list(UTILITY_COLUMNS)].astype(types), _UTILITIES_FILE)


def read_utilities(folder: Path) -> pd.DataFrame:
    """The table of utilities: one row for each number that a suite measured of a cell.

    Raises:
        InputError: there is none, or it is damaged.
    """
    return _read(folder / UTILITIES, _UTILITIES_FILE, UTILITY_COLUMNS)


def _read(path: Path, kind: Kind, columns: tuple[str, ...]) -> pd.DataFrame:
    frame = read_table(path, kind)
    if missing := [name for name in columns if name not in frame]:
        raise InputError(f"{path} lacks {', '.join(missing)}: {kind.remedy}")
    return frame
