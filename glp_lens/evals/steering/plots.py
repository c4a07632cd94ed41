"""Plots of steering: concept against fluency as the strength grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.display import labels
from glp_lens.display.labels import GREY, Palette, Style, family
from glp_lens.display.plots import GRID, INK, Plot, in_legend, render
from glp_lens.evals.steering.settings import ALL, PLAIN, RANDOM, SAE, SHRINK, UNSTEERED

CONDITIONS = {
    UNSTEERED: Style("not steered", GREY, "*"),
    PLAIN: Style("no repair", "#e69f00", "P"),
    SHRINK: Style("less strength", "#b58900", "v"),
    RANDOM: Style("random direction", GREY, "X"),
}
display = partial(labels.display, own=CONDITIONS)
_ONE_PANEL = 8
_LINES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
_READING = (
    "Up is more of the concept, right is more fluent: the upper right corner is best. Each line starts at the star; "
    "along it the strength grows. A repair is worth having only where its line lies above and to the right of “no "
    "repair”: otherwise, steering less does as well."
)


def curves(frame: pd.DataFrame, palette: Palette, focus: str) -> list[Plot]:
    """The plots that concepts and methods call for: all in one panel, or a panel a method and a panel a concept.

    Args:
        frame: rows `concept` and `fluency` of the main run, with settings `alpha=<strength>`.
        palette: colours of the labels.
        focus: the family of methods that panels of single concepts show, beside no repair and the SAE.
    """
    rows = frame[frame.metric.isin(["concept", "fluency"])]
    rows = rows.assign(strength=[setting.number("alpha") for setting in rows.setting]).dropna(subset="strength")
    tasks = list(dict.fromkeys(rows.task))
    if not tasks:
        return []
    sweeps = {task: _sweeps(rows[rows.task == task]) for task in tasks}
    methods = [label for label in dict.fromkeys(rows.model) if label != UNSTEERED]
    main = ALL if ALL in tasks else tasks[0]
    if len(methods) <= _ONE_PANEL and ALL not in tasks:
        caption = f"{_READING} The number marks the strongest; shades are 95% intervals."
        shown = {task: (task, methods) for task in tasks}
        return [_panels("steering_frontier", caption, shown, sweeps, palette, marked=True)]
    shown = {display(label): (main, list(dict.fromkeys([PLAIN, label]))) for label in methods if label != PLAIN}
    where = "mean over concepts" if main == ALL else main
    caption = f"Every method beside no repair, {where}. {_READING} Shades are 95% intervals."
    plots = [_panels("steering_frontier", caption, shown, sweeps, palette)]
    if concepts := [task for task in tasks if task != ALL]:
        own = [label for label in methods if family(label) == focus][:3]
        few = [label for label in (PLAIN, *own, SAE) if label in methods]
        caption = f"The same by concept, for {', '.join(map(display, few))}. Shades are 95% intervals over prompts."
        plots += [_panels("steering_by_concept", caption, {c: (c, few) for c in concepts}, sweeps, palette)]
    return plots


def _sweeps(rows: pd.DataFrame) -> Mapping[str, pd.DataFrame]:
    """Of each method of one task: a row a strength, with both scores and their ends."""
    found = {}
    columns = ["value", "ci_low", "ci_high"]
    for label, own in rows.groupby("model", sort=False):
        scores = {
            m: part.drop_duplicates("strength").set_index("strength")[columns] for m, part in own.groupby("metric")
        }
        if len(scores) == 2:
            found[str(label)] = pd.concat(scores, axis=1, join="inner").swaplevel(axis=1).sort_index()
    return found


def _panels(
    name: str,
    caption: str,
    shown: Mapping[str, tuple[str, Sequence[str]]],
    sweeps: Mapping[str, Mapping[str, pd.DataFrame]],
    palette: Palette,
    *,
    marked: bool = False,
) -> Plot:
    """One panel for each title, with some methods of one task."""
    columns = min(len(shown), 4)
    lines = math.ceil(len(shown) / columns)
    size = (7.6, 4.9) if len(shown) == 1 else (max(2.7 * columns, 7.6), 2.5 * lines + 0.7)

    def draw(figure: Any) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharex=len(shown) > 1, sharey=True)
        panels = list(grid.flat)
        for axes in panels[len(shown) :]:
            axes.set_axis_off()
        for axes, (title, (task, methods)) in zip(panels, shown.items(), strict=False):
            axes.grid(**GRID)
            start = sweeps[task].get(UNSTEERED)
            origin = None if start is None or start.empty else start.iloc[0]
            styles: dict[str, int] = {}
            for label in methods:
                if label in sweeps[task] and len(sweeps[task][label]):
                    style = styles[family(label)] = styles.get(family(label), -1) + 1
                    _line(axes, label, sweeps[task][label], origin, palette, style, marked=marked)
            if origin is not None:
                at = origin["value", "fluency"], origin["value", "concept"]
                axes.plot(*at, marker="*", color=INK, markersize=11, linestyle="", label=display(UNSTEERED), zorder=4)
            axes.set_title(title)
        for axes in grid[-1]:
            axes.set_xlabel("fluency, 0 to 2")
        for axes in grid[:, 0]:
            axes.set_ylabel("concept, 0 to 2")
        if marked:
            low, high = panels[0].get_xlim()
            panels[0].set_xlim(low - 0.08 * (high - low), high)  # room for the labels
        found = [axes.get_legend_handles_labels() for axes in panels]
        handles = {text: handle for handles, texts in found for handle, text in zip(handles, texts, strict=True)}
        if len(handles) <= _ONE_PANEL + 1:  # otherwise the panels' titles say which is which
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)

    return render(name, caption, size, draw)


def _line(
    axes: Any, label: str, sweep: pd.DataFrame, origin: pd.Series | None, palette: Palette, style: int, *, marked: bool
) -> None:
    """One method: its line through the strengths, the way from no steering dotted, and its intervals shaded."""
    color = palette.color(label)
    fluency, concept = sweep["value", "fluency"], sweep["value", "concept"]
    if origin is not None:
        first = [origin["value", "fluency"], fluency.iloc[0]], [origin["value", "concept"], concept.iloc[0]]
        axes.plot(*first, color=color, linewidth=1, alpha=0.5, linestyle=":")
    axes.plot(
        fluency, concept, color=color, marker=palette.marker(label), markerfacecolor=palette.face(label),
        linestyle=(0, (4, 2)) if family(label) == RANDOM else _LINES[style % len(_LINES)], alpha=0.9,
        label=in_legend(display(label)),
    )  # fmt: skip
    for area in _bands(sweep):
        axes.fill(*area.T, color=color, alpha=0.13, linewidth=0)
    if marked:
        axes.annotate(
            f"α\u202f=\u202f{sweep.index[-1]:g}", (fluency.iloc[-1], concept.iloc[-1]), fontsize=9, xytext=(-5, 5),
            textcoords="offset points", ha="right", color=color,
        )  # fmt: skip


def _bands(sweep: pd.DataFrame) -> list[np.ndarray]:
    """Outlines `(n, 2)` of the band that both scores' intervals make from each strength to the next."""
    from scipy.spatial import ConvexHull

    angle = np.linspace(0, 2 * np.pi, 33)[:-1]
    ellipses = []
    for _, row in sweep.iterrows():
        x, y = ((row["ci_low", m] + row["ci_high", m]) / 2 for m in ("fluency", "concept"))
        a, b = ((row["ci_high", m] - row["ci_low", m]) / 2 for m in ("fluency", "concept"))
        ellipses.append(np.stack([x + a * np.cos(angle), y + b * np.sin(angle)], 1))
    if not np.isfinite(ellipses).all() or any(np.ptp(ellipse, axis=0).min() == 0 for ellipse in ellipses):
        return []
    if len(ellipses) == 1:
        return ellipses
    pairs = (np.concatenate([a, b]) for a, b in pairwise(ellipses))
    return [points[ConvexHull(points).vertices] for points in pairs]
