"""The one shape that every evaluation suite writes and every report reads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import pandas as pd

from glp_lens.errors import InputError
from glp_lens.files import read_json, versions, write_atomic, write_json
from glp_lens.types import Json

FORMAT = 1


@dataclass(frozen=True)
class Metric:
    """One measured number, tidy: one row of `metrics.csv`.

    Attributes:
        suite: `probing`, `steering`, `fidelity` or `density`.
        model: label of the model, for example `glp` or `sae`.
        task: dataset, concept or document set; `all` for a mean over them.
        setting: everything else that identifies the number, as `key=value` joined by `;`.
        metric: name of the quantity, with its unit where it has one.
        value: the number; NaN if it could not be measured (say why in `Results.failures`).
        ci_low: lower end of the 95% interval, NaN if there is none.
        ci_high: upper end.
        n: number of independent units (rows, prompts, tasks, documents) behind it.
    """

    suite: str
    model: str
    task: str
    setting: str
    metric: str
    value: float
    ci_low: float = math.nan
    ci_high: float = math.nan
    n: int = 0


@dataclass
class Results:
    """Metrics of one suite with all that is needed to read or repeat them.

    Attributes:
        suite: name of the suite.
        metrics: the numbers.
        config: the suite's settings.
        data: where models, activations and texts came from.
        failures: one sentence for each thing skipped or failed.
        extras: JSON-like material for the report (examples, curves), not metrics.
        seconds: wall-clock time of the suite.
        versions: package versions, filled in when the results are made.
    """

    suite: str
    metrics: list[Metric] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    extras: Json = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=versions)

    def add(self, model: str, task: str, setting: str, metric: str, value: float, **rest: Any) -> None:
        """Append one metric of this suite; `rest` is `ci_low`, `ci_high`, `n`."""
        self.metrics.append(Metric(self.suite, model, task, setting, metric, float(value), **rest))

    def frame(self) -> pd.DataFrame:
        """The metrics as a table, one row a metric."""
        return metrics_frame(self.metrics)

    def to_json(self) -> Json:
        """As JSON; NaN, which JSON lacks, becomes null."""
        return _plain(asdict(self))

    def save(self, folder: str | Path) -> Path:
        """Write `results.json` and `metrics.csv` to `folder`, each atomically."""
        folder = Path(folder)
        write_atomic(folder / "metrics.csv", self.frame().to_csv(index=False))
        write_json(folder / "results.json", {"format": FORMAT, **self.to_json()})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: nothing there, or another format.
        """
        path = Path(folder) / "results.json"
        value = read_json(path, "results")
        if value.pop("format", None) != FORMAT or not {f.name for f in fields(cls)} >= set(value):
            raise InputError(f"{path} is not a results file of format {FORMAT}: run the suite again")
        try:
            written: list[Json] = value["metrics"]
            value["metrics"] = [Metric(**{k: math.nan if v is None else v for k, v in m.items()}) for m in written]  # type: ignore[arg-type]
            return cls(**value)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): run the suite again") from None


def metrics_frame(metrics: Iterable[Metric]) -> pd.DataFrame:
    """Metrics as a table with the columns of `metrics.csv`, also when there are none."""
    return pd.DataFrame([vars(m) for m in metrics], columns=[f.name for f in fields(Metric)])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
