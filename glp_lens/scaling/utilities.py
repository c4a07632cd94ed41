"""What priors are for, as one number a cell: which rows of the suites' results are shown against loss and compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from glp_lens.evals.fidelity.matching import match, power_law
from glp_lens.evals.results import Setting

ALL = "all"
"""The task of means over tasks."""
EQUAL_FVU = 0.2
"""Share of variance left unexplained at which models are compared by what the language model loses."""
FLUENCY = "80% of unsteered"
_REPAIRS = ("paper", "project", "difference", "orthogonal")


@dataclass(frozen=True)
class Utility:
    """One number that tells how useful a model is.

    Attributes:
        name: in results, `auc`.
        title: for readers, with its unit.
        suite, metric: where it comes from.
        higher: whether more of it is better.
        chosen: what its setting must be, from those that were measured.
    """

    name: str
    title: str
    suite: str
    metric: str
    higher: bool
    chosen: Callable[[Setting], bool]


def _all_features(setting: Setting) -> bool:
    return setting.without("entry") == Setting(split=setting.get("split"), mode="all")


def _equal(setting: Setting) -> bool:
    return setting.get("mode") == "equal" and setting.get("layer") is None


UTILITIES = (
    Utility("auc", "1-D probing, AUC of all features", "probing", "auc", True, _all_features),
    Utility("auc_equal", "1-D probing, AUC at equal numbers of features", "probing", "auc", True, _equal),
    Utility("steering_area", "steering: area under concept and fluency", "steering", "pareto_area", True,
            lambda setting: True),
    Utility("concept", "steering: concept at 80% fluency, 0 to 2", "steering", "concept_at_fluency", True,
            lambda setting: setting.get("fluency>") == FLUENCY),
    Utility("delta_nll", f"LM loss added at FVU {EQUAL_FVU:g}, nats a token", "fidelity", "delta_nll", False,
            lambda setting: True),
    Utility("detection", "detection AUROC", "detect", "auroc", True, lambda setting: setting.get("pool") == "mean"),
    Utility("bits", "bits per dimension", "density", "bits_per_dim", False,
            lambda setting: setting.get("rows") == "dequantised"),
)  # fmt: skip


def _of_model(setting: Setting) -> bool:
    """Whether a row is of the cell's model, whatever its options, and not of a control beside it."""
    words = (setting.get("entry") or "").split()
    return all("=" in word or word in _REPAIRS for word in words)


def utility_table(cells: pd.DataFrame, measured: pd.DataFrame) -> tuple[pd.DataFrame, list[Utility]]:
    """One number for each cell and utility.

    Of several tasks their mean is taken, where the suite made it. Of several settings those of the split without
    repeats, of the repair `difference`, of the model as it is rather than with other options, and of the largest
    number of features that all priors and some cell of every other kind have; then the one that most cells have.
    Values decide nothing of this.

    Args:
        cells: as `read_cells` gives them.
        measured: as `read_utilities` gives it.

    Returns:
        The table (`cell`, `kind`, `utility`, `value`, `ci_low`, `ci_high`, `n`, and `tasks`: the values of single
        tasks, by name), and the utilities that it holds, the title of one at equal numbers of features with that
        number.
    """
    kinds = dict(zip(cells.cell, cells.kind, strict=True))
    known = measured[measured.cell.isin(kinds)]
    known = known.assign(kind=known.cell.map(kinds), setting=[Setting.parse(s) for s in known.setting])
    known = _where(known, _of_model)
    tables, found = [], []
    for utility in UTILITIES:
        each = known[(known.suite == utility.suite) & (known.metric == utility.metric) & np.isfinite(known.value)]
        own = _one_task(_where(each, utility.chosen))
        title = utility.title
        if utility.name == "delta_nll":
            own = _at_equal_fvu(known[known.suite == utility.suite])
        elif utility.name == "auc_equal":
            own, features = _most_features(own)
            title = f"1-D probing, AUC at {features:g} features"
        if len(own):
            own = _one_setting(own)
            tables.append(own.assign(utility=utility.name, tasks=_by_task(own, each)))
            found.append(replace(utility, title=title))
    columns = ["cell", "kind", "utility", "value", "ci_low", "ci_high", "n", "tasks"]
    return pd.concat(tables)[columns].reset_index(drop=True) if tables else pd.DataFrame(columns=columns), found


def _one_task(own: pd.DataFrame) -> pd.DataFrame:
    """Rows of the mean over tasks, or of the one task there is."""
    tasks = set(own.task)
    return own if len(tasks) == 1 else own[own.task == ALL]


def _by_task(own: pd.DataFrame, each: pd.DataFrame) -> list[dict[str, float]]:
    """The values of single tasks in the settings of some rows."""
    if "setting" not in own:
        return [{} for _ in range(len(own))]
    each = each[(each.task != ALL) & each.setting.isin(set(own.setting))]
    found: dict[tuple[str, Setting], dict[str, float]] = {}
    for row in each.itertuples():
        found.setdefault((row.cell, row.setting), {})[row.task] = row.value
    return [found.get((row.cell, row.setting), {}) for row in own.itertuples()]


def _where(measured: pd.DataFrame, test: Callable[[Setting], bool]) -> pd.DataFrame:
    return measured[measured.setting.map(test).astype(bool)]


def _most_features(own: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Rows of the largest number of features that all priors and some cell of every other kind have."""
    features = own.setting.map(lambda setting: setting.number("features"))
    priors = [set(features[own.cell == cell]) for cell in own.cell[own.kind == "glp"].unique()]
    others = [set(features[own.kind == kind]) for kind in own.kind.unique() if kind != "glp"]
    shared = set.intersection(*priors, *others) if priors else set()
    most = max(shared, default=np.nan)
    return own[features == most], float(most)


def _one_setting(own: pd.DataFrame) -> pd.DataFrame:
    """One row a cell."""
    if "setting" not in own:
        return own
    for key, wanted in (("split", "dedup"), ("repair", "difference"), ("entry", None)):
        at = own.setting.map(lambda setting, key=key: setting.get(key))
        preferred = at.isna() if wanted is None else at == wanted
        # Cells that have other values of the key alone keep theirs.
        own = own[preferred | ~own.cell.isin(own.cell[preferred])]
    common = own.setting.map(own.drop_duplicates(["cell", "setting"]).setting.value_counts())
    own = own.assign(common=common).sort_values("common", ascending=False, kind="stable").drop_duplicates("cell")
    return own.sort_index()


def _at_equal_fvu(measured: pd.DataFrame) -> pd.DataFrame:
    """Delta loss at `EQUAL_FVU`, on the line between two settings of a cell, or between two ranks of PCA.

    Cells that were measured on one side of it only are left out.
    """
    wide = measured[measured.metric.isin(["fvu", "delta_nll"])].drop_duplicates(["cell", "setting", "metric"])
    wide = wide.pivot(index=["cell", "kind", "setting"], columns="metric", values="value").reset_index()
    if not {"fvu", "delta_nll"} <= set(wide):
        return measured[:0]
    rows = []
    pca = wide.kind == "pca"  # its cells are ranks of one model
    for cell, own in [*wide[~pca].groupby("cell"), *((own.cell.iloc[-1], own) for _, own in wide[pca].groupby("kind"))]:
        curve = {str(i): row for i, row in enumerate(own.dropna().itertuples())}
        point = match({name: row.fvu for name, row in curve.items()}, EQUAL_FVU)
        if point is not None:
            value = power_law(curve[point.low].delta_nll, curve[point.high].delta_nll, point.weight)
            rows.append({"cell": cell, "kind": own.kind.iloc[0], "value": float(value)})
    return pd.DataFrame(rows, columns=["cell", "kind", "value"]).assign(ci_low=np.nan, ci_high=np.nan, n=0)
