"""The training curve as a table beside the model: `history.parquet`, one row for each logging point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.errors import InputError, first_line
from glp_lens.files import write_atomic
from glp_lens.types import Json

if TYPE_CHECKING:
    import pandas as pd

FILE = "history.parquet"


def write_history(folder: str | Path, entries: Sequence[Json]) -> Path:
    """Write the whole curve; returns the file.

    The columns are the names in `TrainResult.history`; values that an entry lacks are missing in its row.
    """
    import pandas as pd

    path = Path(folder) / FILE
    write_atomic(path, pd.DataFrame(list(entries)).to_parquet(index=False))
    return path


def add_to_history(folder: str | Path, entry: Json) -> None:
    """Append one entry to the curve in a folder, so that a killed training leaves its curve.

    Entries of that step or later, which a resumed training repeats, are replaced.
    """
    path = Path(folder) / FILE
    before = read_history(folder).query("step < @entry['step']").to_dict("records") if path.exists() else []
    write_history(folder, [*before, entry])


def read_history(folder: str | Path) -> pd.DataFrame:
    """The curve in a folder.

    Raises:
        InputError: there is none, or the file is damaged.
    """
    import pandas as pd

    path = Path(folder) / FILE
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise InputError(f"no {FILE} in {folder}: a trained GLP's folder has one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as parquet ({first_line(error)}): delete it") from None
