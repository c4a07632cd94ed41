"""Plots of detection: ROC curves with bands, and what thresholds let through against what they were set for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import betabinom

from glp_lens.display.labels import Palette, display
from glp_lens.display.plots import GRID, INK, Plot, in_legend, render
from glp_lens.types import Json

_COLUMNS = 3


def roc(curves: Mapping[str, Json], shown: Sequence[str], palette: Palette, titles: Mapping[str, Any]) -> Plot:
    """ROC curves of some detectors, a panel a task; the axis of false positives is a root, to show its small end.

    Args:
        curves: by task and detector, `fpr`, `tpr`, and the ends `low` and `high` of the band.
        shown: detectors, in order.
        palette: their colours.
        titles: styles of the suite's own labels.
    """
    rows = math.ceil(len(curves) / _COLUMNS)

    def draw(figure: Any) -> None:
        panels = figure.subplots(rows, min(_COLUMNS, len(curves)), sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (task, own) in zip(panels, curves.items(), strict=False):
            axes.set_title(task, fontsize=10)
            axes.grid(**GRID)
            axes.set_xscale("function", functions=(np.sqrt, np.square))
            axes.set_xticks([0.01, 0.1, 0.3, 0.6, 1.0], ["1%", "10%", "30%", "60%", "100%"])
            axes.set_yticks([0, 0.5, 1], ["0", "50%", "100%"])
            chance = np.linspace(0, 1, 50)
            axes.plot(chance, chance, color=INK, linewidth=0.8, linestyle=(0, (4, 2)), alpha=0.6)
            for label in shown:
                if label in own:
                    curve = own[label]
                    axes.fill_between(curve["fpr"], curve["low"], curve["high"], color=palette.color(label), alpha=0.13,
                                      linewidth=0)  # fmt: skip
                    axes.plot(curve["fpr"], curve["tpr"], color=palette.color(label),
                              label=in_legend(display(label, titles)), linewidth=1.4)  # fmt: skip
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4, fontsize=9)
        figure.supxlabel("false-positive rate", fontsize=10)
        figure.supylabel("true-positive rate", fontsize=10)

    caption = (
        "Share of odd texts found against share of normal texts flagged, by the mean score of a text's tokens. Shaded: "
        "95% bands over texts. The dashed line is chance; a curve below it scores odd texts as more normal."
    )
    return render("detect_roc", caption, (9.2, 1.4 + 2.6 * rows), draw)


def calibration(frame: pd.DataFrame, texts: Sequence[int], palette: Palette, titles: Mapping[str, Any]) -> Plot:
    """Realised false-positive rates of all detectors and tasks against the rates that thresholds were set for.

    Args:
        frame: rows `false_positive_rate` by `rate=R`.
        texts: numbers of calibration texts of the tasks, which are those of tested texts too.
        palette: colours of detectors.
        titles: styles of the suite's own labels.
    """
    rates = frame.assign(rate=[setting.number("rate") for setting in frame.setting])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(**GRID)
        levels = np.sort(rates.rate.unique())
        low, high = zip(*(_expected(rate, texts) for rate in levels), strict=True)
        axes.fill_between(
            levels, low, high, color=INK, alpha=0.1, linewidth=0, label="95% of tasks, if texts are alike"
        )
        axes.plot(levels, levels, color=INK, linestyle=(0, (4, 2)), linewidth=1.2, label="as chosen")
        for place, (label, own) in enumerate(rates.groupby("model", sort=False)):
            shift = 1 + 0.012 * (place - rates.model.nunique() / 2)
            axes.plot(own.rate * shift, own.value, linestyle="", marker=palette.marker(str(label)), markersize=4,
                      color=palette.color(str(label)), alpha=0.55,
                      label=in_legend(display(str(label), titles)))  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(levels, [f"{rate:.0%}" for rate in levels])
        axes.minorticks_off()
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_yticks([0, 0.01, 0.05, 0.2, 0.5], ["0", "1%", "5%", "20%", "50%"])
        axes.set_ylim(-0.002, 0.6)
        axes.set_xlabel("false-positive rate that the threshold was set for")
        axes.set_ylabel("false-positive rate on other texts")
        figure.legend(loc="outside right center", fontsize=8.5)

    caption = (
        "What thresholds do on normal texts that did not set them, a point a task. The guarantee is for the mean over "
        "draws of calibration texts: single tasks scatter as the grey band shows."
    )
    return render("detect_calibration", caption, (8.8, 4.4), draw)


def _expected(rate: float, texts: Sequence[int]) -> tuple[float, float]:
    """The middle 95% of realised rates of a conformal threshold, in a mixture over the tasks' numbers of texts.

    Of m new texts the flagged ones are beta-binomial with `a` = floor(rate (n + 1)) and `n + 1 - a` (Vovk 2012).
    """
    low, high = [], []
    for n in texts:
        above = math.floor(rate * (n + 1) + 1e-9)
        ends = betabinom(n, above, n + 1 - above).ppf([0.025, 0.975]) / n if above else (0.0, 0.0)
        low.append(float(ends[0]))
        high.append(float(ends[1]))
    return float(np.mean(low)), float(np.mean(high))
