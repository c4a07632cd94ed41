"""Plots of a store and of a training: the norms of activations, and the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.display.labels import Palette
from glp_lens.display.plots import GRID, INK, render
from glp_lens.evals.results import Setting
from glp_lens.files import write_atomic

_TRAINED = Palette(["glp"]).color("glp")


def norm_histogram(norms: np.ndarray, path: str | Path, *, title: str = "", limit: float | None = None) -> None:
    """Write a PNG of how the norms of activations are spread, with their median.

    The axis is logarithmic if the norms and the limit span a decade. Rows of norm 0 have no place on it; the axis
    says how many there are.

    Args:
        norms: `(n,)`, at least one, in the units of the activations.
        path: the picture; its folder is made if need be.
        limit: the norm above which rows were left out as massive activations.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    norms = norms.astype(np.float64)
    positive = norms[norms > 0]
    logarithmic = len(positive) > 0 and max(positive.max(), limit or 0) >= 10 * positive.min()
    counts, edges = np.histogram(np.log10(positive) if logarithmic else norms, bins=80)
    zeros = f"; {len(norms) - len(positive):,} rows of norm 0 not shown" if len(positive) < len(norms) else ""
    median = float(np.median(norms))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="y", **GRID)
        axes.stairs(counts, 10**edges if logarithmic else edges, fill=True, color=INK, alpha=0.4)
        if median > 0:
            axes.axvline(median, color=INK, label=f"median {median:,.4g}, largest {norms.max():,.4g}")
        if limit:
            axes.axvline(limit, color=INK, linestyle=(0, (4, 2)), label=f"massive: left out above {limit:,.4g}")
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(
            "Euclidean norm of a row, in units of the activations" + (f" (log scale{zeros})" if logarithmic else "")
        )
        axes.set_ylabel("rows in a bin")
        axes.set_title(title)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)

    write_atomic(Path(path), render("norms", "", (7.6, 3.8), draw).png)


def loss_curve(history: pd.DataFrame, path: str | Path, *, title: str = "") -> None:
    """Write a PNG of a training's curve: the loss over the rows seen, and what it came to at each noise level.

    Args:
        history: columns `rows` and `loss`; `validation_loss` and `validation_loss:sigma=low-high` are drawn if there.
    """
    columns = history.columns.astype(str)
    validated = "validation_loss" in columns and bool(history["validation_loss"].notna().any())
    parted = ((name, *name.partition(":")[::2]) for name in columns)
    bins = {name: Setting.parse(bin).range("sigma") for name, metric, bin in parted if metric == "validation_loss"}
    sigmas = {name: (low + high) / 2 for name, (low, high) in bins.items() if low < high}
    parts = history[list(sigmas)].dropna()
    shown = history[["loss", "validation_loss"] if validated else ["loss"]].to_numpy()

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2, width_ratios=[3, 2]) if len(parts) else [figure.subplots()]
        axes = panels[0]
        axes.grid(**GRID)
        marker = "o" if len(history) == 1 else ""
        axes.plot(history["rows"], history["loss"], color=INK, alpha=0.4, marker=marker, label="training")
        if validated:
            held = history.dropna(subset="validation_loss")
            axes.plot(held["rows"], held["validation_loss"], color=_TRAINED, marker=marker, label="validation")
        # What the first steps lose would flatten all that comes after.
        top = np.nanquantile(shown, 0.95)
        low = np.nanmin(shown)
        if np.isfinite([low, top]).all() and top > low:
            axes.set_ylim(low - 0.08 * (top - low), top + 0.15 * (top - low))
        axes.xaxis.set_major_formatter(_count)
        axes.set_xlabel("rows seen")
        axes.set_ylabel("flow-matching loss a dimension")
        axes.set_title(title)
        handles = axes.get_legend_handles_labels()
        if len(parts):
            panel = panels[1]
            panel.grid(**GRID)
            for row, alpha, label in ((0, 0.3, "first"), (-1, 1.0, "last")):
                panel.plot(
                    list(sigmas.values()),
                    parts.iloc[row],
                    color=_TRAINED,
                    alpha=alpha,
                    marker="o",
                    markersize=4,
                    label=label,
                )
            panel.set(xlim=(0, 1), ylim=(0, None))
            panel.set_xlabel("noise level σ (0 is data, 1 is noise)")
            panel.set_title("validation by noise level")
            panel.legend()
        figure.legend(*handles, loc="outside upper left", ncols=2)

    write_atomic(Path(path), render("loss", "", (9.6 if len(parts) else 6.4, 3.9), draw).png)


def _count(value: float, _: object = None) -> str:
    """A number of rows in few characters: 50k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
