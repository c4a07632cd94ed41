"""The training curve as a table beside the model: `history.parquet`, one row for each logging point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.errors import InputError
from glp_lens.files import Kind, read_table, write_table
from glp_lens.types import Json

if TYPE_CHECKING:
    import pandas as pd

FILE = "history.parquet"
_KIND = Kind("training curve", "delete it")


def write_history(folder: str | Path, entries: Sequence[Json]) -> Path:
    """Write the whole curve; returns the file.

    The columns are the names in `TrainResult.history`; values that an entry lacks are missing in its row.
    """
    import pandas as pd

    path = Path(folder) / FILE
    write_table(path, pd.DataFrame(list(entries)), _KIND)
    return path


def add_to_history(folder: str | Path, entry: Json) -> None:
    """Append one entry to the curve in a folder, so that a killed training leaves its curve.

    Entries of that step or later, which a resumed training repeats, are replaced.
    """
    path = Path(folder) / FILE
    before: list[Json] = []
    if path.exists():
        curve = read_history(folder)
        before = curve[curve["step"] < entry["step"]].to_dict("records")
    write_history(folder, [*before, entry])


def read_history(folder: str | Path) -> pd.DataFrame:
    """The curve in a folder.

    Raises:
        InputError: there is none, or the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise InputError(f"no {FILE} in {folder}: a trained GLP's folder has one")
    frame = read_table(path, _KIND)
    strange = [str(name) for name in frame if not (isinstance(name, str) and frame[name].dtype.kind in "if")]
    if "step" not in frame or strange or frame["step"].isna().any():
        what = f"{', '.join(strange)[:100]} holds no numbers" if strange else "it has no step in each row"
        raise InputError(f"{path} is no training curve ({what}): {_KIND.remedy}")
    return frame
