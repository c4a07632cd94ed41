"""The plots of probing, from metric rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.display import labels
from glp_lens.display.labels import GREY, PAPER, Palette, Style, count, family, number
from glp_lens.display.plots import GRID, INK, Plot, errors, in_legend, render
from glp_lens.evals.results import Setting

CONDITIONS = {"dense": Style("dense probe", GREY, "|")}
display = partial(labels.display, own=CONDITIONS)
_PANEL = 40
"""Most tasks in one panel; more are split over two."""
_ROW, _TALL_ROW = 0.155, 0.23
"""Height of a task, in inches, among many, where it is just enough for its name, and among few."""
_CHANCE: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": (0, (2, 3)), "alpha": 0.5}
_DENSE: dict[str, Any] = {"color": INK, "linewidth": 1.3, "alpha": 0.55}
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


def means(frame: pd.DataFrame, views: Mapping[Setting, str], dense: float | None, palette: Palette) -> Plot:
    """Mean AUC of each model with its interval over families.

    Args:
        frame: `auc` rows of task `all`, of the models to show.
        views: settings to draw, at most two, with their names; models are sorted by the first.
        dense: mean AUC of the dense probe, if there is one.
        palette: colours of the labels.
    """
    first, *_ = views
    models = list(frame[frame.setting == first].sort_values("value").model)
    offsets = dict(zip(views, (0.0,) if len(views) == 1 else (0.13, -0.13), strict=True))

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(axis="x", **GRID)
        for setting, name in views.items():
            rows = frame[frame.setting == setting].set_index("model")
            main = setting == first
            for height, model in enumerate(models):
                if model not in rows.index:
                    continue
                row, color = rows.loc[model], palette.color(model)
                at = row.value, height + offsets[setting]
                axes.errorbar(*at, xerr=errors(row), fmt="none", ecolor=color, elinewidth=1.7 if main else 1)
                axes.plot(
                    *at, palette.marker(model), color=color, markerfacecolor=color if main else PAPER,
                    markersize=7 if main else 5,
                )  # fmt: skip
                if main:
                    axes.annotate(
                        number(row.value), at, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9
                    )
            axes.plot([], [], "o", color=INK, markerfacecolor=INK if main else PAPER, label=name)
        if dense is not None:
            axes.axvline(dense, **_DENSE)
            axes.plot([], [], **_DENSE, label="dense probe, all dimensions")
        axes.set_yticks(range(len(models)), [display(m) for m in models])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.5, len(models) - 0.35)
        axes.set_xlabel("mean test AUC of the best single feature")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)

    bars = " Bars are 95% intervals over task families." if frame.ci_low.notna().any() else ""
    caption = (
        "Mean over tasks of the test AUC; 0.5 is chance, 1 is perfect."
        f"{bars} Bars of two models may overlap although one wins: their paired differences, below, decide."
    )
    return render("probing_means", caption, (7.6, 1.35 + 0.42 * max(len(models), 2)), draw)


def heat_map(table: pd.DataFrame, families: Mapping[str, str]) -> Plot:
    """Test AUC, tasks down, models across; tasks grouped by family, the easiest first.

    Args:
        table: a column a model, a row a task, NaN where a task was skipped.
        families: of the tasks.
    """
    ease = table.mean(axis=1)
    group = pd.Series([families.get(task, task) for task in table.index], index=table.index)
    order = pd.DataFrame({"of_family": ease.groupby(group).transform("mean"), "family": group, "ease": ease})
    tasks = list(order.sort_values(["of_family", "family", "ease"], ascending=False).index)
    # Rows of the drawing: tasks, and None between families of which one has several tasks.
    sizes = group.value_counts()
    rows: list[str | None] = [tasks[0]]
    for above, task in pairwise(tasks):
        parted = group[above] != group[task] and max(sizes[group[above]], sizes[group[task]]) > 1
        rows += [None, task] if parted else [task]
    panels = _split(rows)
    models = list(table.columns)
    many = len(panels) > 1
    width = 8.4 if many or len(models) > 12 else 7.6
    height = 1.9 + (_ROW if many else _TALL_ROW) * max(_height(panel) for panel in panels)
    cell = (width / len(panels) - 1.8) / len(models)

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        mesh: Any = None
        for axes, shown in zip(grid, panels, strict=True):
            edges = np.concatenate([[0.0], np.cumsum([0.35 if task is None else 1.0 for task in shown])])
            blank = np.full(len(models), np.nan)
            values = np.array([blank if task is None else table.loc[task].to_numpy(float) for task in shown])
            mesh = axes.pcolormesh(
                np.arange(len(models) + 1), edges, np.ma.masked_invalid(values), cmap="viridis", vmin=0.5, vmax=1,
                edgecolor="none",
            )  # fmt: skip
            named = [(i, task) for i, task in enumerate(shown) if task is not None]
            axes.set_yticks([(edges[i] + edges[i + 1]) / 2 for i, _ in named], [_short(task) for _, task in named])
            axes.set_xticks(
                np.arange(len(models)) + 0.5,
                [display(m) for m in models],
                rotation=45,
                ha="left",
                rotation_mode="anchor",
            )
            axes.xaxis.tick_top()
            axes.tick_params(axis="y", length=0, labelsize=7.5 if many else 9.5, pad=2)
            axes.tick_params(axis="x", length=0, labelsize=8.5 if many else 9.5, pad=2)
            axes.spines[:].set_visible(False)
            axes.set_ylim(max(_height(p) for p in panels), 0)
            if cell >= 0.24:
                for i, _ in named:
                    height = (edges[i] + edges[i + 1]) / 2
                    for j, value in enumerate(values[i]):
                        if np.isfinite(value):
                            axes.text(
                                j + 0.5, height, _cents(value), ha="center", va="center_baseline", in_layout=False,
                                color="#ffffff" if value < 0.77 else "#000000", fontsize=7 if many else 9,
                            )  # fmt: skip
        bar = figure.colorbar(
            mesh,
            ax=grid,
            orientation="horizontal",
            location="bottom",
            extend="min",
            aspect=50,
            shrink=0.6,
            pad=0.15 / height,
        )
        bar.outline.set_visible(False)
        bar.solids.set(rasterized=False, edgecolor="face")  # a picture in the page would be an address
        bar.ax.tick_params(labelsize=8.5)
        bar.set_label("test AUC of the best single feature (0.5 is chance)", fontsize=8.5)

    parted = " Tasks of one family, which share prompts, stand together." if None in rows else ""
    caption = f"Every task by every model, the easiest families first.{parted} An empty cell was not measured."
    return render("probing_heat", caption, (width, height), draw)


def dot_plot(
    rows: pd.DataFrame, models: Sequence[str], focus: str, dense: Mapping[str, float], palette: Palette
) -> Plot:
    """Test AUC of each task, sorted by that of the model in focus, which has its intervals.

    Args:
        rows: `auc` rows of tasks in one setting.
        models: labels to draw, best first.
        focus: the one to sort by.
        dense: AUC of the dense probe by task.
        palette: colours of the labels.
    """
    own = rows[rows.model == focus].sort_values("value", ascending=False)
    panels = _split(list(own.task))
    styles = _styles(models, palette)
    others = rows[rows.model.isin(models) & (rows.model != focus) & rows.task.isin(set(own.task))]
    low = min(0.45, *own.ci_low.dropna(), *own.value, *others.value) - 0.01
    many = len(panels) > 1
    size = 3.6 if many else 5

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
        for axes, shown in zip(grid, panels, strict=True):
            heights = {task: i for i, task in enumerate(shown)}
            axes.axvline(0.5, **_CHANCE)
            axes.grid(axis="x", **GRID)
            # A faint line leads the eye from the name to its marks.
            axes.hlines(range(len(shown)), low, 1.01, color=INK, linewidth=0.5, alpha=0.1)
            ticks = {height: dense[task] for task, height in heights.items() if task in dense}
            axes.vlines(list(ticks.values()), [h - 0.36 for h in ticks], [h + 0.36 for h in ticks], **_DENSE)
            for model in models:
                part = others[(others.model == model) & others.task.isin(heights)]
                axes.plot(
                    part.value, [heights[t] for t in part.task], linestyle="", alpha=0.85,
                    **_marks(styles[model]) | {"markersize": size},
                )  # fmt: skip
            part = own[own.task.isin(heights)]
            at = [heights[task] for task in part.task]
            axes.hlines(at, part.ci_low, part.ci_high, color=palette.color(focus), linewidth=1.4, zorder=3)
            axes.plot(
                part.value, at, palette.marker(focus), color=palette.color(focus),
                markersize=size + 1, zorder=4,
            )  # fmt: skip
            axes.set_yticks(range(len(shown)), [_short(task) for task in shown])
            axes.tick_params(axis="y", length=0, labelsize=7.5 if many else 9.5, pad=2)
            axes.set_xticks(np.arange(np.ceil(low * 10), 11) / 10)
            axes.set_ylim(max(map(len, panels)) - 0.4, -0.6)
            axes.set_xlim(low, 1.01)
            axes.set_xlabel("test AUC" if many else "test AUC of the best single feature")
        key = grid[0]
        for model in models:
            line = "-" if model == focus else ""
            key.plot([], [], linestyle=line, label=in_legend(display(model)), **_marks(styles[model]))
        if dense:
            key.plot([], [], **_DENSE, label="dense probe, all dimensions")
        figure.legend(*key.get_legend_handles_labels(), loc="outside upper left", ncols=4)

    caption = (
        f"One row a task, sorted by {display(focus)}, whose bars are 95% intervals over test rows. Each mark is the "
        "one feature that a model chose on training data, scored once on test data."
    )
    if dense:
        caption += " The upright tick is a logistic regression on all dimensions, for reference."
    height = 1.35 + (_ROW if many else _TALL_ROW) * max(map(len, panels))
    return render("probing_tasks", caption, (8.4 if many else 7.6, height), draw)


def sweeps(
    noise: Mapping[str, pd.DataFrame],
    layers: Mapping[str, pd.DataFrame],
    joined: Mapping[str, float],
    peers: Mapping[str, float],
    focus: str,
    palette: Palette,
) -> Plot:
    """Mean AUC against the noise level and against the denoiser's block, whichever there is.

    Args:
        noise: for each GLP its metric rows, indexed by sigma.
        layers: for each GLP at each noise level its metric rows, indexed by block.
        joined: mean AUC of the features of several noise levels side by side, by label.
        peers: mean AUC of the other models.
        focus: the label whose blocks are drawn with their interval.
        palette: colours of the labels.
    """
    curves = {panel: rows for panel, rows in (("noise", noise), ("layers", layers)) if rows}

    def draw(figure: Any) -> None:
        grid = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
        for axes, (panel, lines) in zip(grid, curves.items(), strict=True):
            axes.grid(**GRID)
            for i, (name, rows) in enumerate(lines.items()):
                color, main = palette.color(name), panel == "noise" or name == focus
                if main and rows.ci_low.notna().any():
                    axes.fill_between(rows.index, rows.ci_low, rows.ci_high, color=color, alpha=0.13, linewidth=0)
                axes.plot(
                    rows.index, rows.value, palette.marker(name), linestyle=_LINES[i % 4 if panel == "noise" else 0],
                    color=color, label=in_legend(display(name)),
                    linewidth=2.2 if main else 1.3, markersize=6 if main else 4,
                    alpha=1 if main else 0.85 - 0.55 * i / len(lines), zorder=3 if main else 2,
                )  # fmt: skip
        axes = grid[0]
        if noise:
            for i, (name, value) in enumerate(joined.items()):
                axes.axhline(value, color=palette.color(name), linestyle=_LINES[1 + i % 3], linewidth=1.4,
                             label=in_legend(display(name)))  # fmt: skip
            axes.set_xlim(0, 1.4 * max(float(rows.index.max()) for rows in noise.values()))
            axes.set_xlabel("noise level σ (0 is data, 1 is noise)")
        for name, value in peers.items():
            axes.axhline(value, color=palette.color(name), linewidth=1, alpha=0.75)
        low, high = axes.get_ylim()
        for name, height in _spread(peers, 0.045 * (high - low)).items():
            axes.annotate(
                display(name), (1, height), xycoords=("axes fraction", "data"), xytext=(-2, 1.5), ha="right",
                textcoords="offset points", va="bottom", fontsize=8.5, color=palette.color(name),
            )  # fmt: skip
        if layers:
            blocks = sorted({int(b) for rows in layers.values() for b in rows.index})
            grid[-1].set_xticks(blocks[:: 1 + len(blocks) // 13])
            grid[-1].set_xlabel("block of the denoiser (0 is the first)")
        for axes in grid:
            # Above the panel, where it covers nothing.
            axes.legend(loc="lower left", bbox_to_anchor=(-0.03, 1), fontsize=8.5, borderaxespad=0.2, handlelength=2.4,
                        ncols=1 if axes is grid[0] and noise else 2)  # fmt: skip
        grid[0].set_ylabel("mean test AUC")

    told = ["Bands are 95% intervals over task families, thin level lines the other models."]
    if noise and joined:
        told.append("The broken level line chooses among the features of all its noise levels side by side.")
    if layers:
        told.append("Choosing among the neurons of one block only shows where in the denoiser concepts are read best.")
    return render("probing_sweeps", " ".join(told), (7.6 if len(curves) > 1 else 6, 4.6), draw)


def _spread(values: Mapping[str, float], gap: float) -> dict[str, float]:
    """Heights for labels: the values, from the lowest up, moved so far that each lies `gap` above the one before."""
    heights: dict[str, float] = {}
    below = -np.inf
    for name, value in sorted(values.items(), key=lambda item: item[1]):
        heights[name] = below = max(value, below + gap)
    return heights


def feature_counts(curves: Mapping[str, pd.DataFrame], common: int | None, focus: str, palette: Palette) -> Plot:
    """Mean AUC against the number of features a model may choose from.

    Args:
        curves: for each model its metric rows, indexed by the number of features.
        common: the number at which models are compared in pairs, if any.
        focus: the label drawn with its interval.
        palette: colours of the labels.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(**GRID)
        if common:
            axes.axvline(common, **_CHANCE)
        _curves(axes, curves, focus, palette)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: count(value))
        axes.set_xlabel("number of features to choose from (log scale)")
        axes.set_ylabel("mean test AUC of the chosen one")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)

    caption = (
        "A model with more features has more tries. Each curve is the AUC to expect of the feature chosen among so "
        "many of the model's, drawn at random; its last point has them all. Compare models one above the other. The "
        f"band is the 95% interval of {display(focus)} over task families."
    )
    if common:
        caption += f" The dotted line marks {count(common)} features, which all models have."
    return render("probing_features", caption, (7.6, 4.3), draw)


def sparse(
    name: str, ranking: str, curves: Mapping[str, pd.DataFrame], dense: float | None, focus: str, palette: Palette
) -> Plot:
    """Mean AUC of k-sparse probes against k; `dense`, all features, stands apart on the right.

    Args:
        name: of the plot.
        ranking: how the features are chosen, for the caption.
        curves: for each model its metric rows, indexed by k, infinite for all features.
        dense: mean AUC of the logistic regression on all raw dimensions, if there is one.
        focus: the label drawn with its interval.
        palette: colours of the labels.
    """
    ks = sorted({float(k) for rows in curves.values() for k in rows.index})
    finite = [k for k in ks if np.isfinite(k)]
    last = (max(finite) if finite else 1.0) * 4
    places = {k: k if np.isfinite(k) else last for k in ks}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(**GRID)
        axes.set_xscale("log")
        _curves(axes, {m: rows[np.isfinite(rows.index)] for m, rows in curves.items()}, focus, palette)
        if dense is not None:
            axes.axhline(dense, **_DENSE, label="dense probe, raw dimensions")
        for model, style in _styles(list(curves), palette).items():
            ends = curves[model][~np.isfinite(curves[model].index)]
            axes.plot([last] * len(ends), ends.value, linestyle="", **_marks(style))
        axes.set_xticks(list(places.values()), [f"{k:g}" if np.isfinite(k) else "all" for k in places])
        axes.minorticks_off()
        axes.set_xlabel("features in the probe, k (log scale)")
        axes.set_ylabel("mean test AUC")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)

    caption = (
        f"Logistic regression on the k features with the largest class-mean difference, {ranking}. The band is the 95% "
        f"interval of {display(focus)} over task families."
    )
    return render(name, caption, (7.6, 4.3), draw)


def _curves(axes: Any, curves: Mapping[str, pd.DataFrame], focus: str, palette: Palette) -> None:
    """One line a model; a band for the interval of the one in focus."""
    for model, style in _styles(list(curves), palette).items():
        rows = curves[model]
        if model == focus and rows.ci_low.notna().any():
            axes.fill_between(rows.index, rows.ci_low, rows.ci_high, color=style["color"], alpha=0.13, linewidth=0)
        axes.plot(rows.index, rows.value, label=in_legend(display(model)), **style | {"markersize": 5})


def _styles(models: Sequence[str], palette: Palette) -> dict[str, dict[str, Any]]:
    """Line and marker of each model; further models of one family are hollow and broken, as are controls."""
    seen: dict[str, int] = {}
    styles: dict[str, dict[str, Any]] = {}
    for model in models:
        name = family(model)
        nth = seen[name] = seen.get(name, -1) + 1
        styles[model] = {
            "color": palette.color(model),
            "marker": palette.marker(model),
            "markerfacecolor": PAPER if nth else palette.color(model),
            "linestyle": _LINES[1] if name == "random" else _LINES[nth % len(_LINES)],
        }
    return styles


def _marks(style: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in style.items() if key != "linestyle"}


def _split(rows: Sequence[Any]) -> list[list[Any]]:
    """Rows in one panel, or halved over two if there are many; no panel begins or ends with a gap."""
    rows = list(rows)
    if sum(row is not None for row in rows) <= _PANEL:
        return [rows]
    half = (len(rows) + 1) // 2
    gaps = [i for i, row in enumerate(rows) if row is None and abs(i - half) <= 4]
    if gaps:
        cut = min(gaps, key=lambda i: abs(i - half))
        return [rows[:cut], rows[cut + 1 :]]
    return [rows[:half], rows[half:]]


def _height(rows: Sequence[Any]) -> float:
    """Of a panel, in rows."""
    return sum(0.35 if row is None else 1.0 for row in rows)


def _short(task: str, limit: int = 29) -> str:
    """A task's name, its middle left out if it is long."""
    return task if len(task) <= limit else f"{task[: limit - 10]}…{task[-9:]}"


def _cents(value: float) -> str:
    """An AUC in three characters: `.87`, `1.0`."""
    text = f"{value:.2f}"
    return "1.0" if text == "1.00" else text.removeprefix("0")
