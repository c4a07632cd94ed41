"""Names, colours and number formats that all pages share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from glp_lens.kinds import KINDS

MINUS = "\u2212"
THIN = "\u202f"
DASH = "\u2013"
PAPER = "#fefefe"
"""The fill of hollow marks; in the page it becomes the background of the reader's theme."""


class Style(NamedTuple):
    """How a model or a condition is shown: its title, and colour and matplotlib marker in plots."""

    title: str
    color: str
    marker: str


GREY = "#8c8c8c"
"""Of controls and references."""

# Okabe and Ito's colours, which stay apart under the common colour blindnesses, and one marker each.
_KINDS = {name: Style(kind.title, kind.color, kind.marker) for name, kind in KINDS.items()}
_STYLES = {**_KINDS, "pca_raw": Style("PCA raw", "#56b4e9", "p")}  # PCA of dimensions that are not standardised
_OPTIONS = {"sigma": "σ"}
_OTHERS = (("#b8576c", "h"), ("#a6611a", ">"), ("#1b7837", "d"))


def family(label: str) -> str:
    """The model behind a label with settings: `glp sigma=0.1` is of `glp`, `random+glp` of `random`."""
    words = re.split(r"[\s(:+]+", label.strip())
    return words[0].lower()


def display(label: str, own: Mapping[str, Style] | None = None) -> str:
    """A label as readers see it: `glp sigma=0.3` becomes `GLP σ = 0.3`.

    Args:
        own: a suite's conditions by label, which go before kinds of models of the same name.
    """
    titles = {name: style.title for name, style in {**_STYLES, **(own or {})}.items()}
    words = []
    for word in label.replace("+", " + ").split():
        name, equals, value = word.partition("=")
        words.append(f"{_OPTIONS.get(name, name)}{THIN}={THIN}{value}" if equals else titles.get(name.lower(), name))
    return " ".join(words)


class Palette:
    """Colour and marker of each label, the same in all plots of a report.

    Args:
        labels: all labels of the report; those of unknown models get the free colours in sorted order.
        conditions: the suites' own labels.
    """

    def __init__(self, labels: Iterable[str], conditions: Mapping[str, Style] | None = None) -> None:
        known = {name: (style.color, style.marker) for name, style in {**_STYLES, **(conditions or {})}.items()}
        unknown = sorted({family(label) for label in labels} - set(known))
        self._styles = {**known, **{name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(unknown)}}

    def color(self, label: str) -> str:
        """A hex colour."""
        return self._styles.get(family(label), _OTHERS[0])[0]

    def marker(self, label: str) -> str:
        """A matplotlib marker, so that colour is never the only difference."""
        return self._styles.get(family(label), _OTHERS[0])[1]

    def face(self, label: str) -> str:
        """Fill of the marker: hollow for a model at another setting than its main one, `glp sigma=0.2`."""
        return PAPER if "=" in label else self.color(label)


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed decimals and a real minus sign; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def signed(value: float | None, digits: int = 3) -> str:
    """Like `number`, with a plus sign on positive values."""
    text = number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and float(f"{value:.{digits}f}") > 0 else text


def interval(low: float, high: float, digits: int = 3, *, sign: bool = False) -> str:
    """`[low, high]`, or nothing if there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    write = signed if sign else number
    return f"[{write(low, digits)}, {write(high, digits)}]"


def with_interval(value: float, low: float, high: float, digits: int = 3) -> str:
    """`value [low, high]`, or the value alone if there is no interval."""
    return f"{number(value, digits)} {interval(low, high, digits)}".rstrip()


def p_value(value: float | None) -> str:
    """A p value with three decimals, or that it is smaller than they can show."""
    return "< 0.001" if value is not None and value < 0.001 else number(value)


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{round(value):,}".replace(",", THIN)


def rounded(value: float) -> str:
    """A large number in three digits: 950k, 16.2M, 1.5G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def flops(value: float | None) -> str:
    """Floating-point operations as a multiple of a power of ten."""
    if value is None or not math.isfinite(value):
        return DASH
    if value <= 0:
        return "0"
    power = math.floor(math.log10(value))
    return f"{value / 10**power:.1f} × 10{superscript(str(power))}"


def superscript(number: str) -> str:
    """A written number as a power."""
    return number.translate(str.maketrans(f"0123456789-{MINUS}", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻"))


def duration(seconds: float | None) -> str:
    """Seconds, or minutes and seconds from two minutes on."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
