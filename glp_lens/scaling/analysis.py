"""What the cells of a scaling run say together: fits, how well they foretell, and what utility has to do with loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.errors import InputError
from glp_lens.evals.results import Results, Setting
from glp_lens.scaling.cells import BAND, read_cells, read_utilities
from glp_lens.scaling.correlations import rank_correlation
from glp_lens.scaling.fits import DECADES, LEAST, Fit, bought, fit, frontier
from glp_lens.scaling.leads import leads
from glp_lens.scaling.utilities import Utility, utility_table

FILE_NAME = "scaling.json"
"""Of the analysis, in the folder of a scaling run."""
HELD_OUT, FRONTIER = "heldout", "frontier"
HOURS = (1.0, 10.0)
"""Of training, whose expected loss is told."""
_BEYOND = 2.0
"""Powers of ten of compute beyond the cells that curves are drawn to."""
_AGAINST = {"glp": ("loss", "flops"), "sae": ("flops",), "pca": ("rank",)}
"""What utilities are set against, by kind: all ranks of PCA cost the same."""
_LEAST_CELLS = 5
"""Cells of which a rank correlation is told."""
_LEAST_SIZES = 3
"""Sizes on a frontier from which on its law has an interval."""
_LOST = 0.02
"""Loss in a tenth of the noise levels above that of another seed, from which on it is told."""


@dataclass(frozen=True)
class Analysis:
    """All that pictures and page are made of.

    Attributes:
        cells: as `read_cells` gives it, priors with `size` (`w384x3`: width and blocks).
        groups: the priors, one row for the seeds of each size and budget: `size`, `parameters`, `rows`, `passes`,
            `flops`, `loss` (mean), `seeds`, `frontier`.
        laws: fits by `frontier` or size; without those of too few budgets.
        utilities: one number a cell and utility, see `utility_table`; with the cell's `loss`, `flops` and `size`.
        shown: the utilities.
        gaussian_loss: the least loss of any Gaussian, if it is known.
        results: all numbers.
    """

    cells: pd.DataFrame
    groups: pd.DataFrame
    laws: Mapping[str, Fit]
    utilities: pd.DataFrame
    shown: list[Utility]
    gaussian_loss: float | None
    results: Results


def analyse(folder: Path, *, say: Callable[[str], None] = print) -> Results:
    """Write `scaling.json`, `metrics.csv`, `plots/` and `report.html` of a scaling run from its two tables.

    Args:
        folder: with `cells.parquet` and `utilities.parquet`.
        say: prints a line.

    Raises:
        InputError: no tables, damaged ones, or none of its priors has a loss.
    """
    from glp_lens.scaling.page import write_page

    found = analysis(read_cells(folder), read_utilities(folder))
    found.results.save(folder, FILE_NAME)
    say(f"scaling: {write_page(found, folder)}")
    return found.results


def analysis(cells: pd.DataFrame, measured: pd.DataFrame) -> Analysis:
    """Analyse the tables of a scaling run.

    Results are of suite `scaling`. Task `heldout`: `loss` and `below_bound_percent` of each size and budget, fits
    (`exponent`, `coefficient`, `floor`, `decades`) with setting `cells=...;floor=fitted` or `floor=0`, what a fit
    without the largest cells says of them (`held=largest` budget, `held=size`), `loss_expected` after `hours` on this
    machine. Tasks named as utilities: `utility` of each cell, `spearman` against loss and FLOPs, also with FLOPs
    `given`, `lead:KIND` at matched compute, and `leads_from:KIND`, the FLOPs from which on all leads are clear.

    Args:
        cells: as `read_cells` gives them.
        measured: as `read_utilities` gives it.

    Raises:
        InputError: none of the priors has a loss.
    """
    began = time.perf_counter()
    cells = cells.assign(size=[_size(cell) for cell in cells.itertuples()])
    priors = cells[(cells.kind == "glp") & cells.loss.notna() & (cells.flops > 0)]
    if priors.empty:
        raise InputError("no prior of this scaling run has a loss yet: run it again, it goes on where it stopped")
    gaussian = cells[cells.kind == "gaussian"].loss.dropna()
    bound = float(gaussian.iloc[0]) if len(gaussian) else None
    results = Results(
        "scaling", data={"cells": len(cells), "priors": len(priors), "trunks": int(priors.trunk.nunique())}
    )
    groups = _groups(priors)
    _add_losses(results, priors, groups, bound)
    results.failures += _broken(priors)
    laws = {name: law for name, own in _parts(priors, groups) if (law := _add_fits(results, name, own)) is not None}
    _add_held_out(results, priors, groups)
    if (law := laws.get(FRONTIER)) is not None:
        _add_expected(results, priors, groups, law, bound)
    table, shown = utility_table(cells, measured)
    table = table.merge(cells[["cell", "size", "rows", "loss", "flops", "rank", "trunk"]], on="cell")
    _add_utilities(results, table, shown)
    leads(results, table, shown)
    results.extras = {
        "curves": {name: _curve(law) for name, law in laws.items()},
        "utilities": {u.name: {"title": u.title, "higher": u.higher} for u in shown},
    }
    results.seconds = time.perf_counter() - began
    return Analysis(cells, groups, laws, table, shown, bound, results)


def _size(cell: Any) -> str:
    return f"w{cell.d_model:.0f}x{cell.n_layers:.0f}" if cell.kind == "glp" else ""


def _groups(priors: pd.DataFrame) -> pd.DataFrame:
    groups = (
        priors.groupby(["size", "rows"], as_index=False)
        .agg(parameters=("parameters", "first"), passes=("passes", "first"), flops=("flops", "mean"),
             loss=("loss", "mean"), seeds=("loss", "size"))
        .sort_values(["parameters", "rows"], ignore_index=True)
    )  # fmt: skip
    return groups.assign(frontier=frontier(groups.flops, groups.loss))


def _of(priors: pd.DataFrame, groups: pd.DataFrame) -> pd.DataFrame:
    """The priors of some groups, all seeds."""
    return priors.merge(groups[["size", "rows"]], on=["size", "rows"])


def _parts(priors: pd.DataFrame, groups: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The cells that are fitted together: those on the frontier, and those of each size."""
    yield FRONTIER, _of(priors, groups[groups.frontier])
    for size in groups["size"].unique():
        yield size, priors[priors["size"] == size]


def _law(name: str, own: pd.DataFrame, floor: float | None = None) -> Fit:
    """The law of some cells; that of the frontier resamples sizes, as all seeds of a size may lie off it together.

    One or two sizes give it no interval: one of two could be off by anything.
    """
    by = own.trunk
    if name == FRONTIER:
        by = own["size"] if own["size"].nunique() >= _LEAST_SIZES else pd.Series(FRONTIER, index=own.index)
    return fit(own.flops, own.loss, by, floor=floor)


def _add_losses(results: Results, priors: pd.DataFrame, groups: pd.DataFrame, bound: float | None) -> None:
    for group in groups.itertuples():
        setting = Setting(size=group.size, parameters=group.parameters, rows=group.rows)
        results.add("glp", HELD_OUT, setting, "loss", group.loss, n=group.seeds)
        results.add("glp", HELD_OUT, setting, "flops", group.flops)
        results.add("glp", HELD_OUT, setting, "on_frontier", float(group.frontier))
        if bound is not None:
            results.add("glp", HELD_OUT, setting, "below_bound_percent", 100 * (1 - group.loss / bound), n=group.seeds)
    if bound is not None:
        results.add("gaussian", HELD_OUT, "", "loss", bound)
    for size, own in priors[priors.seconds > 0].groupby("size"):
        results.add("glp", HELD_OUT, Setting(size=size), "flops_per_second", (own.flops / own.seconds).median(),
                    n=len(own))  # fmt: skip
    spread = priors.groupby(["size", "rows"]).loss.agg(["var", "size"]).dropna()
    if degrees := int((spread["size"] - 1).sum()):
        variance = float((spread["var"] * (spread["size"] - 1)).sum()) / degrees
        results.add("glp", HELD_OUT, "", "loss_seed_sd", np.sqrt(variance), n=degrees)


def _broken(priors: pd.DataFrame) -> list[str]:
    """Trainings that lost some noise levels: their loss there is far above that of another seed.

    Seeds of a cell differ by less than .012 in a tenth of the noise levels. In a training that has lost some, a few
    neighbouring timesteps have another time embedding than those around them, and the loss jumps between them.
    """
    told = []
    for _, own in priors.groupby(["size", "rows"], sort=False):
        for band in (name for name in own if str(name).startswith(BAND)):
            best = own[band].min()
            for cell, loss in zip(own.cell, own[band], strict=True):
                if loss - best > _LOST:
                    told.append(
                        f"{cell}: its loss at noise levels {str(band).removeprefix(BAND)} is {loss:.3f}, that of "
                        f"another seed {best:.3f}: this training lost some of them, and its numbers speak of no other"
                    )
    return told


def _add_fits(results: Results, name: str, own: pd.DataFrame) -> Fit | None:
    """Fit some cells with a floor and without; gives the fit with one."""
    if own.flops.nunique() < LEAST:
        results.failures.append(f"{name}: no fit, it has {own.flops.nunique()} amounts of compute and needs {LEAST}")
        return None
    laws = {"fitted": _law(name, own), "0": _law(name, own, 0.0)}
    for floor, law in laws.items():
        setting = Setting(cells=name, floor=floor)
        results.add("glp", HELD_OUT, setting, "exponent", **law.exponent._asdict())
        results.add("glp", HELD_OUT, setting, "coefficient", **law.coefficient._asdict())
        results.add("glp", HELD_OUT, setting, "decades", law.decades, n=len(own))
        if floor == "fitted" and not (doubt := _doubt(name, law)):
            results.add("glp", HELD_OUT, setting, "floor", **law.floor._asdict())
        elif floor == "fitted":
            results.failures.append(f"{name}: no irreducible loss is claimed, {doubt}")
        error = 100 * np.sqrt(np.mean((own.loss / law.losses(own.flops)[0] - 1) ** 2))
        results.add("glp", HELD_OUT, setting, "error_percent", error, n=len(own))
    return laws["fitted"]


def _doubt(name: str, law: Fit) -> str:
    """Why the floor of a fit is not told; empty if it is."""
    if law.decades < DECADES:
        return f"its cells span {law.decades:.1f} powers of ten of compute and that takes {DECADES:g}"
    if not np.isfinite(law.floor.ci_low):
        few = f"fewer than {_LEAST_SIZES} sizes tell" if name == FRONTIER else "one training tells"
        return f"{few} nothing of how sure it is"
    return ""


def _add_held_out(results: Results, priors: pd.DataFrame, groups: pd.DataFrame) -> None:
    """What fits to all but the largest cells say of them."""
    chain = groups[groups.frontier].sort_values("flops")
    last = chain.iloc[-1]
    tests = [(FRONTIER, "largest", groups[groups.flops < last.flops], last)]
    tests.append((FRONTIER, "size", groups[(groups["size"] != last["size"]) & (groups.flops < last.flops)], last))
    for size, own in groups.groupby("size", sort=False):
        tests.append((size, "largest", own.iloc[:-1], own.iloc[-1]))
    for name, held, kept, target in tests:
        if name == FRONTIER and len(kept):
            kept = kept[frontier(kept.flops, kept.loss)]  # noqa: PLW2901
        own = _of(priors, kept)
        if own.flops.nunique() < LEAST:
            continue
        law = _law(name, own)
        value, low, high = map(float, law.predict([target.flops])[:, 0])
        setting = Setting(cells=name, held=held)
        measured = priors[(priors["size"] == target["size"]) & (priors.rows == target.rows)].loss
        results.add("glp", HELD_OUT, setting, "loss_predicted", value, ci_low=low, ci_high=high, n=law.clusters)
        results.add("glp", HELD_OUT, setting, "loss_measured", measured.mean(), n=len(measured))
        if np.isfinite(low):
            results.add("glp", HELD_OUT, setting, "within", measured.between(low, high).mean(), n=len(measured))
        results.add("glp", HELD_OUT, setting, "decades_beyond", np.log10(target.flops / law.highest))


def _add_expected(results: Results, priors: pd.DataFrame, groups: pd.DataFrame, law: Fit, bound: float | None) -> None:
    """What hours of this machine buy, at the speed that the largest size of the frontier had."""
    largest = groups[groups.frontier].sort_values("flops").iloc[-1]["size"]
    own = priors[(priors["size"] == largest) & (priors.seconds > 0)]
    if own.empty:
        return
    speed = float((own.flops / own.seconds).median())
    for hours in HOURS:
        found = bought(law, speed, hours=hours, gaussian_loss=bound)
        setting = Setting(cells=FRONTIER, hours=hours)
        results.add("glp", HELD_OUT, setting, "loss_expected", **found.loss._asdict())
        results.add("glp", HELD_OUT, setting, "decades_beyond", found.beyond)
        if found.below is not None:
            results.add("glp", HELD_OUT, setting, "below_bound_percent", **found.below._asdict())


def _add_utilities(results: Results, table: pd.DataFrame, shown: list[Utility]) -> None:
    for row in table.itertuples():
        ends = {"ci_low": row.ci_low, "ci_high": row.ci_high, "n": int(row.n)}
        results.add(row.kind, row.utility, Setting(cell=row.cell), "utility", row.value, **ends)
    for utility in shown:
        for kind, columns in _AGAINST.items():
            own = table[(table.utility == utility.name) & (table.kind == kind)].dropna(subset=list(columns))
            if len(own) < _LEAST_CELLS:
                continue
            # Seeds of a size may lie off together, and budgets of a trunk share their beginning.
            clusters = own["size"] if kind == "glp" else own.trunk.where(own.trunk != "", own.cell)
            for column in columns:
                found = rank_correlation(own[column], own.value, clusters)
                results.add(kind, utility.name, Setting(against=column), "spearman", **found._asdict())
            if kind == "glp":
                found = rank_correlation(own.loss, own.value, clusters, given=own.flops)
                setting = Setting(against="loss", given="flops")
                results.add(kind, utility.name, setting, "spearman", **found._asdict())


def _curve(law: Fit) -> dict[str, list[float]]:
    flops = np.geomspace(law.lowest, law.highest * 10**_BEYOND, 60)
    value, low, high = law.curve(flops)
    _, new_low, new_high = law.predict(flops)
    columns = {"flops": flops, "loss": value, "low": low, "high": high, "new_low": new_low, "new_high": new_high}
    return {name: column.tolist() for name, column in columns.items()}
