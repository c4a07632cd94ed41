"""The plotting kit: a figure as SVG for a page and as PNG, and what all plots share."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from glp_lens.display.labels import MINUS, PAPER, superscript
from glp_lens.errors import or_warning

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
    "text.parse_math": False,  # names of models and tasks may hold any character
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
}
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
    """Draw into a new figure and give it back as text and as bytes, without global matplotlib state.

    All text is drawn as it is, without matplotlib's markup. A figure that cannot be drawn is warned about, and says so.
    """
    return or_warning(f"plot {name}", lambda: _render(name, caption, size, draw)) or _render(
        name, caption, (size[0], 1), lambda figure: figure.text(0.01, 0.5, "This plot could not be drawn.")
    )


def _render(name: str, caption: str, size: tuple[float, float], draw: Callable[[Any], None]) -> Plot:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        _write_powers(figure)
        text, picture = io.StringIO(), io.BytesIO()
        figure.savefig(picture, format="png", dpi=160, facecolor="white")
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Plot(name, caption, _inline(text.getvalue(), name), picture.getvalue(), wide=size[0] > 8)


def _write_powers(figure: Any) -> None:
    """Label logarithmic axes 10⁻³, where matplotlib's own labels are markup, which is not read here."""
    from matplotlib.ticker import LogFormatterSciNotation

    class Powers(LogFormatterSciNotation):
        def __init__(self, usual: LogFormatterSciNotation) -> None:
            vars(self).update(vars(usual))

        def __call__(self, x: float, pos: Any = None) -> str:
            text = super().__call__(x, pos).replace(r"\mathdefault", "").replace(r"\times", "×")
            text = re.sub(r"\^\{(.*?)\}", lambda power: superscript(power[1]), text)
            return text.translate(dict.fromkeys(map(ord, "${}"))).replace("-", MINUS)

    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        for usual, give in (
            (axis.get_major_formatter(), axis.set_major_formatter),
            (axis.get_minor_formatter(), axis.set_minor_formatter),
        ):
            if isinstance(usual, LogFormatterSciNotation):
                give(Powers(usual))


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: no prologue, its ids its own, ink and paper in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" ', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor").replace(PAPER, "var(--page)")


def in_legend(text: str) -> str:
    """A text as a legend takes it: matplotlib leaves out those that begin with an underscore."""
    return f"\u2060{text}" if text.startswith("_") else text


def errors(row: Any) -> list[list[float]] | None:
    """Asymmetric error bars of a metric row, or None without an interval."""
    if not (np.isfinite(row.ci_low) and np.isfinite(row.ci_high)):
        return None
    return [[max(row.value - row.ci_low, 0)], [max(row.ci_high - row.value, 0)]]
