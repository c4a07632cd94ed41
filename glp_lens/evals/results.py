"""The one shape that every evaluation suite writes and every report reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, Self

import pandas as pd

from glp_lens.errors import InputError
from glp_lens.files import Kind, is_number, read_json, versions, write_atomic, write_json
from glp_lens.types import Json

FORMAT = 1
FILE = Kind("results", "run the suite again")


class Setting:
    """What identifies a number besides model, task and metric: values by key, in order.

    In files it is `key=value;key=value`; a key without a value stands for itself, as in `real vs shuffled`. Values are
    kept as they are written there. Settings are immutable and equal if all parts are, in their order; they are not
    iterable, so that pandas compares them as single values.

    >>> setting = Setting(split="dedup") | Setting(mode="equal", features=64)
    >>> str(setting), setting.get("split"), setting.number("features")
    ('split=dedup;mode=equal;features=64', 'dedup', 64.0)
    """

    __slots__ = ("_parts",)

    def __init__(self, values: Mapping[str, object] | None = None, /, **more: object) -> None:
        """Values by key, as a mapping or as keywords."""
        text = ";".join(f"{key}={_written(value)}" for key, value in {**(values or {}), **more}.items())
        self._parts = _parts(text)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A setting as files have it."""
        setting = cls()
        setting._parts = _parts(text)
        return setting

    def get(self, key: str) -> str | None:
        """The value of a key as it is written; None without one."""
        return next((value for own, value in self._parts if own == key), None)

    def number(self, key: str) -> float:
        """The value of a key as a number; NaN if there is none, or it is none."""
        try:
            return float(self.get(key) or math.nan)
        except ValueError:
            return math.nan

    def range(self, key: str) -> tuple[float, float]:
        """The value of a key that is written `low-high`; NaN if it is not."""
        low, _, high = (self.get(key) or "").partition("-")
        try:
            return float(low), float(high)
        except ValueError:
            return math.nan, math.nan

    def without(self, key: str) -> Setting:
        """All parts but that of a key."""
        rest = Setting()
        rest._parts = tuple(part for part in self._parts if part[0] != key)
        return rest

    def __or__(self, other: Setting) -> Setting:
        joined = Setting()
        joined._parts = self._parts + other._parts
        return joined

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setting) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    def __bool__(self) -> bool:
        return bool(self._parts)

    def __str__(self) -> str:
        return ";".join(key if value is None else f"{key}={value}" for key, value in self._parts)

    def __repr__(self) -> str:
        return f"Setting.parse({str(self)!r})"


def _parts(text: str) -> tuple[tuple[str, str | None], ...]:
    pairs = (part.partition("=") for part in text.split(";")) if text else ()
    return tuple((key, value if equals else None) for key, equals, value in pairs)


def _written(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Metric:
    """One measured number, tidy: one row of `metrics.csv`.

    Attributes:
        suite: `probing`, `steering`, `fidelity`, `density`, `generation`, `detect` or `features`.
        model: label of the model, for example `glp` or `sae`.
        task: dataset, concept or document set; `all` for a mean over them.
        setting: everything else that identifies the number.
        metric: name of the quantity, with its unit where it has one.
        value: the number; NaN if it could not be measured (say why in `Results.failures`).
        ci_low: lower end of the 95% interval, NaN if there is none.
        ci_high: upper end.
        n: number of independent units (rows, prompts, tasks, documents) behind it.
        other: what the model is compared with, or which kind of the quantity it is; in files it stands behind the
            metric's name, `auc_diff:sae`.
    """

    suite: str
    model: str
    task: str
    setting: Setting
    metric: str
    value: float
    ci_low: float = math.nan
    ci_high: float = math.nan
    n: int = 0
    other: str = ""

    def __post_init__(self) -> None:
        """Take a setting as files have it, too."""
        if isinstance(self.setting, str):
            object.__setattr__(self, "setting", Setting.parse(self.setting))

    @property
    def name(self) -> str:
        """The metric as files name it."""
        return f"{self.metric}:{self.other}" if self.other else self.metric

    def row(self) -> Json:
        """As a row of the files, by the names of `COLUMNS`."""
        return {key: getattr(self, key) for key in COLUMNS} | {"setting": str(self.setting), "metric": self.name}

    @classmethod
    def from_row(cls, row: Json) -> Self:
        """The inverse of `row`; also of rows that were saved as JSON, with null for NaN, or read by pandas."""
        values: Json = {key: math.nan if value is None else value for key, value in row.items()}
        metric, _, other = values["metric"].partition(":")
        # An empty text is NaN in a table that pandas has read.
        texts = {key: value for key in ("model", "task", "setting") if isinstance(value := values[key], str)}
        texts = {"model": "", "task": "", "setting": "", **texts}
        return cls(**values | texts | {"setting": Setting.parse(texts["setting"]), "metric": metric, "other": other})


COLUMNS = ("suite", "model", "task", "setting", "metric", "value", "ci_low", "ci_high", "n")
"""Of `metrics.csv`."""
_NUMBER: set[type] = {int, float, NoneType}
_TEXT: set[type] = {str, NoneType}
_KINDS: dict[str, set[type]] = {
    "suite": {str}, "model": _TEXT, "task": _TEXT, "setting": _TEXT, "metric": {str}, "value": _NUMBER,
    "ci_low": _NUMBER, "ci_high": _NUMBER, "n": _NUMBER,
}  # fmt: skip
"""What the columns of metrics are in JSON."""
_TYPES = {"suite": str, "metrics": list, "config": dict, "data": dict, "failures": list, "extras": dict,
          "seconds": int | float, "versions": dict}  # fmt: skip
"""What `Results` are in JSON."""


@dataclass
class Results:
    """Metrics of one suite with all that is needed to read or repeat them.

    >>> results = Results("probing")
    >>> results.add("glp", "all", Setting(split="dedup", mode="all"), "auc", 0.81, n=13)
    >>> results.add("glp", "all", "split=dedup;mode=all", "auc_diff:sae", 0.02, ci_low=0.01, ci_high=0.03, n=13)
    >>> [(metric.setting.get("mode"), metric.metric, metric.other, metric.value) for metric in results.metrics]
    [('all', 'auc', '', 0.81), ('all', 'auc_diff', 'sae', 0.02)]
    >>> results.frame().metric.tolist()
    ['auc', 'auc_diff:sae']

    Attributes:
        suite: name of the suite.
        metrics: the numbers.
        config: the suite's settings.
        data: where models, activations and texts came from.
        failures: one sentence for each thing skipped or failed.
        extras: JSON-like material for the report (examples, curves), not metrics.
        seconds: wall-clock time of the suite.
        versions: package versions, filled in when the results are made.
        tables: what is too large for JSON, such as generated texts, by name, in memory alone: a suite that has some
            writes them itself.
    """

    suite: str
    metrics: list[Metric] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    extras: Json = field(default_factory=dict)
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=versions)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False, compare=False)

    def add(self, model: str, task: str, setting: Setting | str, metric: str, value: float, **rest: Any) -> None:
        """Append one metric of this suite; `rest` is `ci_low`, `ci_high`, `n`, `other`.

        Setting and metric may also be as files have them: `alpha=0.4;sigma=0.2` and `harmonic_diff:plain`.
        """
        if ":" in metric:
            metric, _, rest["other"] = metric.partition(":")
        self.metrics.append(Metric(self.suite, model, task, setting, metric, float(value), **rest))  # type: ignore[arg-type]

    def frame(self) -> pd.DataFrame:
        """The metrics as in `metrics.csv`, one row a metric."""
        return metrics_frame(self.metrics)

    def to_json(self) -> Json:
        """As JSON; NaN, which JSON lacks, becomes null."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tables"}
        return without_nan(values | {"metrics": [metric.row() for metric in self.metrics]})  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: Json) -> Self:
        """What `to_json` gave; KeyError, TypeError or AttributeError if it is something else."""
        for name, kind in _TYPES.items():
            if name in value and (isinstance(value[name], bool) or not isinstance(value[name], kind)):
                raise TypeError(f"its {name} is {value[name]!r:.40}")
        if not all(isinstance(text, str) for text in [*value.get("failures", ()), *value.get("versions", {}).values()]):
            raise TypeError("its failures or versions are no texts")
        if not is_number(value.get("seconds", 0.0)):
            raise TypeError("its seconds are no number")
        _check_rows(value["metrics"])
        return cls(**value | {"metrics": [Metric.from_row(row) for row in value["metrics"]]})

    def save(self, folder: str | Path, name: str = "results.json") -> Path:
        """Write a file of this name and `metrics.csv` to `folder`, each atomically."""
        folder = Path(folder)
        write_atomic(folder / "metrics.csv", self.frame().to_csv(index=False))
        write_json(folder / name, {"format": FORMAT, **self.to_json()}, FILE)
        return folder

    @classmethod
    def load(cls, folder: str | Path, name: str = "results.json") -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: nothing there, or another format.
        """
        path = Path(folder) / name
        value = read_json(path, FILE)
        if value.pop("format", None) != FORMAT or not {f.name for f in fields(cls)} - {"tables"} >= set(value):
            raise InputError(f"{path} is not a results file of format {FORMAT}: run the suite again")
        try:
            return cls.from_json(value)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}): run the suite again") from None


def _check_rows(rows: list[Json]) -> None:
    """KeyError or TypeError if rows that were read are not of the types that were written."""
    for name, kinds in _KINDS.items():
        column = list(map(itemgetter(name), rows))
        found = set(map(type, column))
        if not found <= kinds or (int in found and any(type(v) is int and abs(v) >= 2**63 for v in set(column))):
            raise TypeError(f"{name} of its metrics holds other things than were written")


def metrics_frame(metrics: Iterable[Metric]) -> pd.DataFrame:
    """Metrics as a table with the columns of `metrics.csv`, also when there are none."""
    return pd.DataFrame([metric.row() for metric in metrics], columns=list(COLUMNS))


def structured_frame(metrics: Iterable[Metric]) -> pd.DataFrame:
    """Metrics as a table with a column for each attribute of `Metric`, settings as `Setting`."""
    return pd.DataFrame([vars(metric) for metric in metrics], columns=[f.name for f in fields(Metric)])


def without_nan(value: Any) -> Any:
    """A JSON-like value with null for NaN and infinity, which JSON lacks, lists for tuples, and texts as keys."""
    if isinstance(value, dict):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
