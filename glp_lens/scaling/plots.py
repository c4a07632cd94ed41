"""Pictures of a scaling run: loss against compute, and what utility has to do with both."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from glp_lens.display.labels import Palette, display
from glp_lens.display.plots import GRID, INK, Plot, in_legend, render

if TYPE_CHECKING:
    from glp_lens.scaling.analysis import Analysis

_COLUMNS = 3
_TITLE = 42
"""Characters of a panel's title that fit above it."""
_DASHES = (0, (4, 2))
_PALETTE = Palette(["glp"])
_MARKERS = "os^Dv<>Pp*hX"
"""Of sizes, so that the depth of the colour is not the only difference."""


def overview(found: Analysis) -> Plot:
    """Loss against compute with the Gaussian bound and the fit; below it each utility against loss."""
    rows = math.ceil(len(found.shown) / _COLUMNS)

    def draw(figure: Any) -> None:
        if rows:
            upper, lower = figure.subfigures(2, 1, height_ratios=[4.6, 2.9 * rows])
            _utilities(lower, found, "loss")
        else:
            upper = figure
        _losses(upper, found)

    caption = (
        "Above: held-out flow-matching loss of every training against its compute. Points of one size are joined; the "
        f"line is the fit to the frontier{' with its 95% interval' if _has_interval(found) else ''}, dashed beyond "
        "the cells, and the horizontal line the least loss of any Gaussian."
    )
    if rows:
        caption += (
            " Below: what each prior is good for, against its loss, which falls to the right, with 95% intervals. "
            "Bands span the baselines of each kind, from the worst to the best; a line is the best."
        )
    return render("scaling", caption, (9.6, 4.6 + 2.9 * rows), draw)


def by_compute(found: Analysis) -> Plot:
    """Each utility against compute, with the SAEs at theirs."""
    rows = math.ceil(len(found.shown) / _COLUMNS)
    caption = (
        "The same utilities against the compute of the training. SAEs stand at their own compute, and so what two "
        "kinds reach with as much can be read off a vertical line; baselines that cost next to nothing are bands."
    )
    size = (9.6, 2.9 * rows + 0.4)
    return render("scaling_compute", caption, size, lambda figure: _utilities(figure, found, "flops"))


def _losses(figure: Any, found: Analysis) -> None:
    axes = figure.subplots()
    axes.grid(**GRID)
    color = _PALETTE.color("glp")
    for name, depth, marker in _sizes(found):
        own = found.groups[found.groups["size"] == name]
        cells = found.cells[found.cells["size"] == name]
        axes.plot(own.flops, own.loss, color=color, alpha=depth, linewidth=1.2)
        label = f"{name}, {own.parameters.iloc[0] / 1e6:.3g}M parameters"
        axes.plot(cells.flops, cells.loss, marker, color=color, alpha=depth, markersize=5, label=in_legend(label))
    curve = found.results.extras["curves"].get("frontier")
    if curve is not None:
        flops, loss, low, high = (np.array(curve[name]) for name in ("flops", "loss", "low", "high"))
        inside = flops <= found.laws["frontier"].highest
        near = flops <= 10 * found.laws["frontier"].highest  # as far as a picture should promise
        axes.fill_between(flops[near], low[near], high[near], color=INK, alpha=0.14, linewidth=0)
        label = "fit to the frontier" + (", 95% interval" if _has_interval(found) else "")
        axes.plot(flops[inside], loss[inside], color=INK, linewidth=1.4, label=label)
        axes.plot(flops[near & ~inside], loss[near & ~inside], color=INK, linewidth=1.4, linestyle=_DASHES)
    if found.gaussian_loss is not None:
        axes.axhline(
            found.gaussian_loss, color=_PALETTE.color("gaussian"), linestyle=_DASHES, label="exact Gaussian bound"
        )
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs of the training")
    axes.set_ylabel("held-out loss a dimension")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)


def _has_interval(found: Analysis) -> bool:
    """Whether the fit to the frontier has one, for which a frontier of several sizes is needed."""
    curve = found.results.extras["curves"].get("frontier")
    return curve is not None and bool(np.isfinite(np.array([curve["low"], curve["high"]], dtype=float)).any())


def _sizes(found: Analysis) -> list[tuple[str, float, str]]:
    """Each size, from the smallest, with the depth of its colour and its marker."""
    names = list(found.groups["size"].unique())
    depths = np.linspace(0.35, 1, len(names)) if len(names) > 1 else [1.0]
    return [
        (name, float(depth), _MARKERS[i % len(_MARKERS)])
        for i, (name, depth) in enumerate(zip(names, depths, strict=True))
    ]


def _utilities(figure: Any, found: Analysis, against: str) -> None:
    """A panel for each utility, against `loss` or `flops`."""
    rows = math.ceil(len(found.shown) / _COLUMNS)
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, sharex=True)
    for axes in grid.ravel()[len(found.shown) :]:
        axes.set_visible(False)
    for i, (axes, utility) in enumerate(zip(grid.ravel(), found.shown, strict=False)):
        axes.grid(**GRID)
        own = found.utilities[found.utilities.utility == utility.name]
        for kind in [kind for kind in own.kind.unique() if kind != "glp"]:
            _baseline(axes, own[own.kind == kind], kind, utility.higher, against)
        for name, depth, marker in _sizes(found):
            if against == "flops":  # the only picture of the two without a panel that names them
                axes.plot([], [], marker, color=_PALETTE.color("glp"), alpha=depth, markersize=4, label=in_legend(name))
            _points(axes, own[own["size"] == name], against, _PALETTE.color("glp"), marker, depth)
        title = utility.title + ("" if utility.higher else " (less is better)")
        axes.set_title(textwrap.fill(title, _TITLE), fontsize=9, fontweight="normal")
        axes.tick_params(labelsize=9, labelbottom=i + _COLUMNS >= len(found.shown))
        if against == "flops":
            axes.set_xscale("log")
    if against == "loss":
        grid[0, 0].invert_xaxis()
    figure.supxlabel(
        "held-out loss, falling to the right" if against == "loss" else "FLOPs of the training", fontsize=10
    )
    handles = {
        label: handle for axes in grid.ravel() for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=6, fontsize=9)


def _baseline(axes: Any, own: pd.DataFrame, kind: str, higher: bool, against: str) -> None:
    """A kind of baseline: points at their compute if it depends on the cell, else a band."""
    color = _PALETTE.color(kind)
    if against == "flops" and own.flops.nunique() > 1 and own.flops.min() > 0:
        axes.plot([], [], _PALETTE.marker(kind), color=color, markersize=4, label=display(kind))
        _points(axes, own, against, color, _PALETTE.marker(kind), 0.8)
        return
    ends = own.value if len(own) > 1 else own[["ci_low", "ci_high"]].iloc[0].dropna()
    if len(ends):
        axes.axhspan(ends.min(), ends.max(), color=color, alpha=0.13, linewidth=0)
    axes.axhline(own.value.max() if higher else own.value.min(), color=color, linewidth=1.3, label=display(kind))


def _points(axes: Any, own: pd.DataFrame, against: str, color: str, marker: str, depth: float) -> None:
    own = own.dropna(subset=[against])
    if own.empty:
        return
    bars = np.maximum(np.stack([own.value - own.ci_low, own.ci_high - own.value]), 0)
    axes.errorbar(
        own[against], own.value, np.nan_to_num(bars), fmt="none", ecolor=color, alpha=0.25 * depth, linewidth=1
    )
    axes.plot(own[against], own.value, marker, color=color, alpha=depth, markersize=4)
