"""Names, colours and number formats that every part of the report shares."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from glp_lens.kinds import KINDS

MINUS = "\u2212"
THIN = "\u202f"
PAPER = "#fefefe"
"""The fill of hollow marks; in the page it becomes the background of the reader's theme."""

_NAMES = {name: kind.title for name, kind in KINDS.items()} | {
    "pca_raw": "PCA raw",
    "dense": "dense probe",
    "plain": "no repair",
    "random": "random direction",
    "sigma": "σ",
    "unsteered": "not steered",
}
_SUITE_NAMES = {"probing": {"random": KINDS["random"].title}}

# Okabe and Ito's colours, which stay apart under the common colour blindnesses, and one marker each.
_STYLES = {name: (kind.color, kind.marker) for name, kind in KINDS.items()} | {
    "pca_raw": ("#56b4e9", "p"),
    "plain": ("#e69f00", "P"),
    "dense": ("#8c8c8c", "|"),
    "mean": ("#8c8c8c", "X"),
    "predict": ("#8c8c8c", "X"),
    "isotropic": ("#8c8c8c", "P"),
    "clean": ("#8c8c8c", "*"),
    "unsteered": ("#8c8c8c", "*"),
}
_OTHERS = (("#994455", "h"), ("#a6611a", ">"), ("#1b7837", "d"))


def family(label: str) -> str:
    """The model behind a label with settings: `glp sigma=0.1` is of `glp`, `random+glp` of `random`."""
    words = re.split(r"[\s(:+]+", label.strip())
    return words[0].lower()


def display(label: str, suite: str = "") -> str:
    """A label as readers of a suite's results see it: `glp sigma=0.3` becomes `GLP σ = 0.3`."""
    names = _NAMES | _SUITE_NAMES.get(suite, {})
    words = []
    for word in label.replace("+", " + ").split():
        name, equals, value = word.partition("=")
        shown = names.get(name.lower(), name)
        words.append(f"{shown}{THIN}={THIN}{value}" if equals else shown)
    return " ".join(words)


class Palette:
    """Colour and marker of each label, the same in all plots of a report.

    Args:
        labels: all labels of the report; those of unknown models get the free colours in sorted order.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        unknown = sorted({family(label) for label in labels} - set(_STYLES))
        self._styles = {**_STYLES, **{name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(unknown)}}

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
        return "\u2013"
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


def p_value(value: float | None) -> str:
    """A p value with three decimals, or that it is smaller than they can show."""
    return "< 0.001" if value is not None and value < 0.001 else number(value)


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{round(value):,}".replace(",", THIN)


def flops(value: float | None) -> str:
    """Floating-point operations as a multiple of a power of ten."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value <= 0:
        return "0"
    power = math.floor(math.log10(value))
    digits = str(power).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10**power:.1f} × 10{digits}"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes and seconds from two minutes on."""
    if seconds is None or not math.isfinite(seconds):
        return "\u2013"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
