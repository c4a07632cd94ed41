"""Pictures of samples beside real rows: principal components, norms, and single dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glp_lens.display.labels import GREY, Palette, Style, display
from glp_lens.display.plots import GRID, INK, Plot, in_legend, render

REFERENCE = "reference"
_PANELS = 8


def components(extras: Mapping[str, Any], palette: Palette, own: Mapping[str, Style]) -> Plot:
    """Real and sampled rows along the first two principal components of the real ones, a panel for each sampler.

    Args:
        extras: of the results, `components`.
        palette: colours of the labels.
        own: the suite's conditions by label.
    """
    found = extras["components"]
    points = {label: np.array(own) for label, own in found["points"].items()}
    real = points.pop(REFERENCE)
    labels = list(points)[:_PANELS]
    columns = min(4, len(labels))
    rows = math.ceil(len(labels) / columns)
    limits = np.quantile(real, [0.01, 0.99], axis=0)
    margin = 0.25 * (limits[1] - limits[0])

    def draw(figure: Any) -> None:
        panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)).ravel()
        for axes, label in zip(panels, labels, strict=False):
            # Half of each lies in front, so that neither hides the other.
            halves = ((real[::2], GREY, 1), (points[label][::2], palette.color(label), 2),
                      (real[1::2], GREY, 3), (points[label][1::2], palette.color(label), 2.5))  # fmt: skip
            for cloud, color, order in halves:
                axes.scatter(*cloud.T, s=7, color=color, alpha=0.45, linewidths=0, zorder=order)
            axes.set_title(display(label, own), fontsize=10)
            axes.set(xlim=(limits[0, 0] - margin[0], limits[1, 0] + margin[0]))
            axes.set(ylim=(limits[0, 1] - margin[1], limits[1, 1] + margin[1]))
            axes.grid(**GRID)
        for axes in panels[len(labels) :]:
            axes.set_visible(False)
        figure.supxlabel("first principal component", fontsize=10)
        figure.supylabel("second", fontsize=10)

    share = " and ".join(f"{100 * each:.0f}%" for each in found["share"])
    caption = (
        "Grey: held-out activations; colour: what each panel names. Principal components of the standardised held-out "
        f"rows, the first two with {share} of their variance. Two dimensions show gross failures only."
    )
    return render("generation_components", caption, (9.6, 2.5 * rows + 0.4), draw)


def norms(extras: Mapping[str, Any], palette: Palette, own: Mapping[str, Style], labels: Sequence[str]) -> Plot:
    """How the norms of real and of sampled rows are spread."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(**GRID)
        _stairs(axes, extras["norms"], palette, own, labels)
        axes.set_xlabel("Euclidean norm of a row, in units of the activations")
        axes.set_ylabel("share of rows")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)

    caption = "Norms of rows. Filled: held-out activations; lines: rows drawn from each model."
    return render("generation_norms", caption, (7.6, 4.0), draw)


def dimensions(extras: Mapping[str, Any], palette: Palette, own: Mapping[str, Style], labels: Sequence[str]) -> Plot:
    """The distributions of the dimensions in which real rows are farthest from normal."""
    found = extras["dimensions"]
    columns = min(3, len(found))

    def draw(figure: Any) -> None:
        grid = figure.subplots(math.ceil(len(found) / columns), columns, squeeze=False)
        for axes, one in zip(grid.ravel(), found, strict=False):
            axes.grid(**GRID)
            _stairs(axes, one, palette, own, labels)
            axes.set_title(f"dimension {one['dimension']}", fontsize=10)
            axes.set_yscale("log")
        for axes in grid.ravel()[len(found) :]:
            axes.set_visible(False)
        figure.supxlabel("value, in units of the activations", fontsize=10)
        figure.supylabel("share of rows (log scale)", fontsize=10)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4)

    caption = (
        "The dimensions in which held-out activations are farthest from normal, by excess kurtosis. Filled: held-out "
        "activations; lines: rows drawn from each model. A Gaussian has neither their tails nor their skew."
    )
    height = 2.2 * math.ceil(len(found) / columns) + 0.8
    return render("generation_dimensions", caption, (9.6, height), draw)


def _stairs(
    axes: Any, one: Mapping[str, Any], palette: Palette, own: Mapping[str, Style], labels: Sequence[str]
) -> None:
    shares = one["shares"]
    axes.stairs(shares[REFERENCE], one["edges"], fill=True, color=INK, alpha=0.22, label="held-out activations")
    for i, label in enumerate(label for label in labels if label in shares):
        style = ["-", (0, (4, 2)), (0, (1, 1))][i % 3]
        axes.stairs(
            shares[label], one["edges"], color=palette.color(label), linestyle=style, linewidth=1.4,
            label=in_legend(display(label, own)),
        )  # fmt: skip
