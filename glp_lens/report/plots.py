"""The report's plots, from metric rows as SVG and PNG; and the norms of a store."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.report.labels import PAPER, Palette, display, family

# Everything that is not a model's colour is drawn in this ink. In the page it becomes `currentColor`, so that
# axes and labels follow the reader's light or dark theme.
INK = "#1b1f24"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
}
_TRAINED = Palette(["glp"]).color("glp")
GRID = {"color": INK, "alpha": 0.13, "linewidth": 0.8}


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    Attributes:
        name: file name without ending, unique in a report.
        caption: what it shows and how to read it.
        svg: the drawing, for the page.
        png: the same, for `plots/`.
        wide: whether it needs the page's full width.
    """

    name: str
    caption: str
    svg: str
    png: bytes
    wide: bool = False


def render(name: str, caption: str, size: tuple[float, float], draw: Callable[[Any], None]) -> Plot:
    """Draw into a new figure and give it back as text and as bytes, without global matplotlib state."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        text, picture = io.StringIO(), io.BytesIO()
        figure.savefig(picture, format="png", dpi=160, facecolor="white")
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, caption, _inline(text.getvalue(), name), picture.getvalue(), wide=size[0] > 8)


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: no prologue, its ids its own, ink and paper in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" ', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor").replace(PAPER, "var(--page)")


def errors(row: Any) -> list[list[float]] | None:
    """Asymmetric error bars of a metric row, or None without an interval."""
    if not (np.isfinite(row.ci_low) and np.isfinite(row.ci_high)):
        return None
    return [[max(row.value - row.ci_low, 0)], [max(row.ci_high - row.value, 0)]]


def steering_frontier(frame: pd.DataFrame, palette: Palette) -> Plot:
    """Concept against fluency as the strength grows, one line a condition, one panel a concept.

    Args:
        frame: rows `concept` and `fluency` with settings `alpha=<strength>`.
        palette: colours of the labels.
    """
    rows = frame[frame.metric.isin(["concept", "fluency"]) & ~frame.model.str.contains("+", regex=False)].copy()
    rows["strength"] = pd.to_numeric(rows.setting.str.extract(r"alpha=(\d[\d.]*)")[0])
    rows = rows.dropna(subset="strength")
    starts = rows[rows.model == "unsteered"]
    rows = rows[rows.model != "unsteered"]
    tasks = list(dict.fromkeys(rows.task))

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for axes, task in zip(panels, tasks, strict=True):
            axes.grid(**GRID)
            wide = rows[rows.task == task].pivot_table(
                index=["model", "strength"], columns="metric", values="value", dropna=False
            )
            still = starts[starts.task == task].set_index("metric").value
            origin = [float(still[m]) for m in ("fluency", "concept") if m in still.index]
            if len(origin) == 2:
                axes.plot(
                    *origin,
                    marker="*",
                    color=INK,
                    markersize=11,
                    linestyle="",
                    label="not steered",
                    zorder=4,
                )
            for model in dict.fromkeys(rows[rows.task == task].model):
                if not {"concept", "fluency"} <= set(wide.columns):
                    continue
                line = wide.loc[model].dropna().sort_index()
                if line.empty:
                    continue
                control = family(model) == "random"
                if len(origin) == 2:
                    first = [origin[0], line.fluency.iloc[0]], [origin[1], line.concept.iloc[0]]
                    axes.plot(*first, color=palette.color(model), linewidth=1, alpha=0.5, linestyle=":")
                axes.plot(
                    line.fluency, line.concept, color=palette.color(model), marker=palette.marker(model),
                    markerfacecolor=palette.face(model), linestyle=(0, (4, 2)) if control else "-", alpha=0.9,
                    label=display(model),
                )  # fmt: skip
                axes.annotate(
                    f"α\u202f=\u202f{line.index[-1]:g}", (line.fluency.iloc[-1], line.concept.iloc[-1]),
                    fontsize=9, xytext=(-5, 5), textcoords="offset points", ha="right",
                    color=palette.color(model),
                )  # fmt: skip
            axes.set_title(task)
            axes.set_xlabel("fluency, 0 to 2")
            low, high = axes.get_xlim()
            axes.set_xlim(low - 0.08 * (high - low), high)  # room for the labels
        panels[0].set_ylabel("concept, 0 to 2")
        handles = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4)

    caption = (
        "Up is more of the concept, right is more fluent: the upper right corner is best. Each line starts "
        "at the star; along it the strength grows, and the number marks the strongest. A repair is worth "
        "having only where its line lies above and to the right of “no repair”: otherwise, steering less "
        "does as well."
    )
    return render("steering_frontier", caption, (7.6 if len(tasks) == 1 else 4.2 * len(tasks), 4.9), draw)


def fidelity_scatter(frame: pd.DataFrame, curves: dict[str, list[str]], palette: Palette) -> Plot:
    """Delta LM loss against FVU, with the settings of one model joined.

    Args:
        frame: rows `delta_nll` and `fvu`.
        curves: labels of one model at several settings, by name.
        palette: colours of the labels.
    """
    loss = frame[frame.metric == "delta_nll"].set_index("model")
    fvu = frame[frame.metric == "fvu"].set_index("model")
    shown = [m for m in loss.index if m in fvu.index and fvu.value[m] > 1e-6]
    first = next(iter(curves.values()), shown[:1])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.grid(**GRID)
        for name, labels in curves.items():
            line = sorted((fvu.value[m], loss.value[m]) for m in labels if m in shown)
            axes.plot(*zip(*line, strict=True), color=palette.color(name), linewidth=1.3, alpha=0.7)
        for model in shown:
            x, y = fvu.value[model], loss.value[model]
            axes.errorbar(
                x, y, yerr=errors(loss.loc[model]), color=palette.color(model), marker=palette.marker(model),
                linewidth=1.2,
            )  # fmt: skip
            # Labels of the first curve and of single points stand below, those of other curves above the line.
            left = x > 0.5 or (model not in first and any(model in labels for labels in curves.values()))
            axes.annotate(
                display(model), (x, y), xytext=(-8, 4) if left else (8, -4), textcoords="offset points",
                fontsize=9.5, ha="right" if left else "left", va="bottom" if left else "top", color=INK,
            )  # fmt: skip
        floor = max(min((abs(v) for v in loss.value if v), default=1e-3), 1e-3)
        axes.set_yscale("symlog", linthresh=floor, linscale=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        axes.set_xlabel("fraction of variance unexplained (FVU), log scale")
        axes.set_ylabel("delta LM loss, nats a token (log scale)")

    lines = "Lines join settings of one model. " if curves else ""
    caption = (
        "Left is a closer reconstruction, down is less harm to the language model. " + lines + "How closely to "
        "reconstruct is a choice, so compare models at equal FVU: of two points one above the other, the "
        "lower one wins."
    )
    return render("fidelity", caption, (7.6, 4.8), draw)


def density_curves(frame: pd.DataFrame, palette: Palette) -> Plot:
    """Flow-matching loss by noise level, and the same relative to the exact bound for Gaussians.

    Args:
        frame: rows `flow_loss` and `flow_loss_bound` with settings `sigma=low-high`.
        palette: colours of the labels.
    """
    rows = frame[frame.metric.isin(["flow_loss", "flow_loss_bound"])].copy()
    ends = rows.setting.str.extract(r"sigma=([\d.]+)-([\d.]+)").astype(float)
    rows["sigma"] = ends.mean(axis=1, skipna=False)
    rows = rows.dropna(subset="sigma").sort_values("sigma")
    bound = rows[rows.metric == "flow_loss_bound"].groupby("sigma").value.min()
    losses = rows[(rows.metric == "flow_loss") & ~rows.model.isin(["predict 0"])]

    def draw(figure: Any) -> None:
        if len(bound):
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        else:
            top, bottom = figure.subplots(), None
        for axes in (top, bottom):
            if axes is not None:
                axes.grid(**GRID)
        for model in dict.fromkeys(losses.model):
            line = losses[losses.model == model].set_index("sigma")
            faint = family(model) == "isotropic"
            options: dict[str, Any] = {
                "color": palette.color(model),
                "marker": palette.marker(model),
                "linewidth": 1 if faint else 1.8,
                "markersize": 4 if faint else 6,
            }
            name = "isotropic Gaussian (knows no covariance)" if faint else f"{display(model)}, measured"
            top.plot(line.index, line.value, label=name, **options)
            if bottom is not None and not faint:
                shared = line.index.intersection(bound.index)
                percent = 100 * (line.value[shared] / bound[shared] - 1)
                low = 100 * (line.ci_low[shared] / bound[shared] - 1)
                high = 100 * (line.ci_high[shared] / bound[shared] - 1)
                bottom.fill_between(shared, low, high, color=palette.color(model), alpha=0.18, linewidth=0)
                bottom.plot(shared, percent, **options)
        if bottom is not None:
            top.plot(bound.index, bound, color=INK, linestyle=(0, (4, 2)), label="exact bound for Gaussians")
            bottom.axhline(0, color=INK, linestyle=(0, (4, 2)), linewidth=1.4)
            bottom.set_ylabel("% from the bound")
        top.set_ylabel("loss a dimension")
        (bottom if bottom is not None else top).set_xlabel("noise level σ (0 is data, 1 is noise)")
        figure.legend(*top.get_legend_handles_labels(), loc="outside upper left", ncols=2)

    caption = (
        "Held-out flow-matching loss by noise level; lower is better. The dashed line is the least that "
        "any Gaussian can reach. Below it, a model knows structure beyond means and covariances; above "
        "it, it has not even learnt those at that noise level. Shaded: 95% intervals over documents."
    )
    return render("density", caption, (7.6, 5.8), draw)


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

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render("norms", "", (7.6, 3.8), draw).png)


def loss_curve(history: pd.DataFrame, path: str | Path, *, title: str = "") -> None:
    """Write a PNG of a training's curve: the loss over the rows seen, and what it came to at each noise level.

    Args:
        history: columns `rows` and `loss`; `validation_loss` and `validation_loss:sigma=low-high` are drawn if there.
    """
    columns = history.columns.astype(str)
    validated = "validation_loss" in columns and bool(history["validation_loss"].notna().any())
    ends = pd.Series(columns).str.extract(r"^validation_loss:sigma=([\d.]+)-([\d.]+)$").dropna().astype(float)
    sigmas, parts = ends.mean(axis=1).to_numpy(), history[columns[ends.index]]
    parts = parts.dropna()
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
                panel.plot(sigmas, parts.iloc[row], color=_TRAINED, alpha=alpha, marker="o", markersize=4, label=label)
            panel.set(xlim=(0, 1), ylim=(0, None))
            panel.set_xlabel("noise level σ (0 is data, 1 is noise)")
            panel.set_title("validation by noise level")
            panel.legend()
        figure.legend(*handles, loc="outside upper left", ncols=2)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(render("loss", "", (9.6 if len(parts) else 6.4, 3.9), draw).png)


def _count(value: float, _: object = None) -> str:
    """A number of rows in few characters: 50k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
