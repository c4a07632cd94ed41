"""What `features show` and `features top` print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from glp_lens.features import BANDS
from glp_lens.features.show import FeatureView
from glp_lens.features.top import over_text

_BARS = " ▁▂▃▄▅▆▇█"
_ABOVE, _BELOW = (214, 104, 0), (0, 104, 190)
"""Colours of the largest values above 0 and below."""
_SHOWN = 0.1
"""Share of the largest value that is worth a colour."""
_SIGNS = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def visible(token: str) -> str:
    """A token as it can stand in one line of a terminal: nothing in it controls the terminal."""
    return "".join(c if c.isprintable() else _SIGNS.get(c) or ascii(c)[1:-1] for c in token)


def show(views: Iterable[FeatureView], examples: int) -> None:
    """Print features, one below the other."""
    console = Console(highlight=False)
    for view in views:
        page = Table.grid(padding=(0, 2, 0, 0))
        page.add_column(style="bold", no_wrap=True)
        page.add_column(ratio=1)
        groups = {
            "Label": _label(view),
            "Values": _values(view),
            **{name: _examples(view, group, examples) for group, name in _groups(view)},
            "Writes": _writes(view),
            "Like it": _neighbours(view),
            "Prior": _table(view.rows("prior"), {"sigma": "sigma", "top_value": "top value", "stability": "stability",
                            "ablation": "ablation", "jacobian_norm": "Jacobian"}),
            "Tasks": _tasks(view),
            "Steered": _steered(view),
        }  # fmt: skip
        console.print(Text(view.name, style="bold"), Text(f"{view.model.kind} at {view.model.hook}", style="dim"))
        console.print()
        for name, group in groups.items():
            if group is not None:
                page.add_row(name, Padding(group, (0, 0, 1, 0)))
        console.print(page)


def show_top(frame: pd.DataFrame, k: int) -> None:
    """Print the features of a text: over all of it, then at each token."""
    console = Console(highlight=False)
    if frame.empty:
        console.print("no feature is above its usual value at any token")
        return
    whole = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title="Over the text", title_justify="left")
    for name, right in (("feature", False), ("sd above usual", True), ("value", True), ("usual", True),
                        ("share on", True), ("at", False), ("label", False)):  # fmt: skip
        whole.add_column(name, justify="right" if right else "left", no_wrap=name != "label")
    for row in over_text(frame, k).itertuples():
        whole.add_row(
            Text(visible(f"{row.model}/{row.name}")), f"{row.z:+.1f}", f"{row.value:.3g}", f"{row.usual:.3g}",
            f"{row.density:.2%}", Text(f"{row.position} {visible(row.token)}"), Text(visible(row.label)),
        )  # fmt: skip
    console.print(whole)
    console.print()
    tokens = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title="Token by token", title_justify="left")
    models = list(dict.fromkeys(frame["model"]))
    tokens.add_column("token", no_wrap=True)
    for label in models:
        tokens.add_column(Text(visible(label)), overflow="fold")
    for (position, token), rows in frame.groupby(["position", "token"], sort=True):
        cells = [
            Text("  ".join(f"{row.name} {row.z:+.1f}" for row in rows[rows["model"] == label].itertuples()))
            for label in models
        ]
        tokens.add_row(Text(f"{position} {visible(str(token))}"), *cells)
    console.print(tokens)


def _label(view: FeatureView) -> RenderableType | None:
    said = [Text(f"{visible(text)}  (by a language model)") for text in view.rows("explanations")["explanation"]]
    said += [Text(f"{visible(text)}  (automatic)") for text in view.rows("labels")["label"]]
    return Group(*said) if said else None


def _values(view: FeatureView) -> RenderableType:
    known = view.statistics
    marks = [name for name in ("dead", "dense") if known[name]]
    counts = np.asarray(known["histogram"], dtype=float)
    heights = np.ceil(np.log1p(counts) / max(np.log1p(counts).max(), 1e-9) * (len(_BARS) - 1)).astype(int)
    line = (
        f"on in {known['density']:.3%} of tokens, mean {known['mean']:.3g}, sd {known['std']:.3g}, "
        f"kurtosis {known['kurtosis']:.3g}{''.join(f', {mark}' for mark in marks)}"
    )
    bars = "".join(_BARS[height] for height in heights)
    return Group(Text(line), Text(f"{known['min']:.3g} {bars} {known['max']:.3g}  (log counts)"))


def _groups(view: FeatureView) -> list[tuple[str, str]]:
    """The groups of passages, and what they are called here: bands are parts of the largest value."""
    bands = {f"band {i}": f"{low:.0%}-{high:.0%}" for i, (low, high) in reversed(list(enumerate(BANDS)))}
    names = {"top": "Highest", "bottom": "Lowest", **bands}
    there = set(view.rows("examples")["group"])
    return [(group, name) for group, name in names.items() if group in there]


def _examples(view: FeatureView, group: str, most: int) -> RenderableType | None:
    rows = view.rows("examples")
    rows = rows[rows["group"] == group].sort_values("rank").head(most)
    if rows.empty:
        return None
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    largest = max(abs(float(view.statistics["max"])), abs(float(view.statistics["min"]))) or 1.0
    for row in rows.itertuples():
        table.add_row(f"{row.value:.3g}", _passage(row.tokens, row.values, int(row.peak), largest))
    return table


def _passage(tokens: Iterable[str], values: Iterable[float], peak: int, largest: float) -> Text:
    """A passage, each token coloured by its value, and the one it is shown for in guillemets."""
    text = Text()
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        share, colour = min(abs(value) / largest, 1.0), _ABOVE if value > 0 else _BELOW
        style = f"white on rgb({','.join(str(round(part * (0.35 + 0.65 * share))) for part in colour)})"
        word = f"«{visible(token)}»" if i == peak else visible(token)
        text.append(word, style=style if share > _SHOWN else "")
    return text


def _writes(view: FeatureView) -> RenderableType | None:
    rows = view.rows("writes")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for row in rows.itertuples():
        tokens = "  ".join(
            f"{visible(token)} {logit:+.2f}" for token, logit in zip(row.tokens, row.logits, strict=True)
        )
        table.add_row(row.way, "more" if row.side == "top" else "less", Text(tokens))
    return table if len(rows) else None


def _neighbours(view: FeatureView) -> RenderableType | None:
    rows = view.neighbours
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for by, own in rows.groupby("by", sort=False):
        names = (f"{visible(row.name)} {row.value:+.2f}" for row in own.itertuples())
        table.add_row(f"by {by}", Text("  ".join(names)))
    return table if len(rows) else None


def _tasks(view: FeatureView) -> RenderableType | None:
    rows = view.rows("tasks")
    if rows.empty:
        return None
    shown = rows.assign(interval=[f"[{row.ci_low:.3f}, {row.ci_high:.3f}]" for row in rows.itertuples()])
    return _table(shown, {"task": "task", "auc": "AUC", "interval": "95% interval"})


def _steered(view: FeatureView) -> RenderableType | None:
    rows = view.rows("steered")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    for row in rows.sort_values(["way", "prompt", "strength"]).itertuples():
        table.add_row(row.way, f"{row.strength:g}", Text(visible(f"{row.prompt} ... {' '.join(row.text.split())}")))
    return table if len(rows) else None


def _table(rows: pd.DataFrame, columns: dict[str, str]) -> RenderableType | None:
    """Some columns of rows, under other names."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns.values():
        table.add_column(name, justify="right")
    for row in rows[[*columns]].itertuples(index=False):
        table.add_row(*(_cell(value) for value in row))
    return table if len(rows) else None


def _cell(value: Any) -> Text:
    return Text(visible(value) if isinstance(value, str) else f"{value:.3g}")
