"""How reports show density: losses by noise level beside the exact Gaussian bound, and the typicality check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from glp_lens.display.comparisons import Verdict, differences, facing, judge, opening, sentences, shown, value_of
from glp_lens.display.elements import (
    Cell,
    Section,
    Table,
    find_row,
    metric_lines,
    rows_of,
    table_of,
    value_cell,
    value_cells,
)
from glp_lens.display.labels import DASH, GREY, Palette, Style, count, display, family, interval, number
from glp_lens.display.overview import Column
from glp_lens.display.plots import GRID, INK, Plot, in_legend, render
from glp_lens.evals.results import Results, Setting, structured_frame

TITLE = "Density"
CONDITIONS = {
    "predict": Style("predict", GREY, "X"),
    "isotropic": Style("isotropic", GREY, "P"),
    "diagonal": Style("diagonal", GREY, "p"),
    "mixture": Style("mixture of 16 Gaussians", GREY, "*"),
    "neighbours": Style("nearest neighbours", GREY, "H"),
}
_ERRORS = ("bits_probe_error", "bits_step_change")
ALL = Setting(sigma="all")
"""The setting of losses over all noise levels."""


def section(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, _focus: str) -> Section:
    """The section of all runs."""
    overall = frame[frame.setting == ALL]
    loss = overall[overall.metric == "flow_loss"].sort_values("value")
    scored = frame[frame.metric == "score_auroc"]
    models = [*loss.model, *(m for m in scored.model if m not in set(loss.model))]
    main = table_of(
        "Held-out flow-matching loss a dimension, and the typicality check: AUROC of telling real "
        "activations from ones shuffled within each dimension (0.5 is chance).",
        [
            ("Model", [Cell(display(m)) for m in models]),
            ("Loss", value_cells(rows_of(overall, models, metric="flow_loss"), highest=False)),
            ("Exact bound", [value_cell(r) for r in rows_of(overall, models, metric="flow_loss_bound")]),
            ("Below the bound, %", [value_cell(r, 1) for r in rows_of(overall, models, metric="below_bound_percent")]),
            (
                "Below the Gaussian, %",
                [value_cell(r, 1) for r in rows_of(overall, models, metric="below_gaussian_percent")],
            ),
            ("Typicality AUROC", value_cells(rows_of(scored, models), highest=True)),
        ],
    )
    tables, figures = [main], []
    losses, bounds = _by_noise_level(frame)
    levels = losses.drop_duplicates("low").sort_values("low")
    if len(levels):
        ends = zip(levels.low, levels.high, strict=True)
        columns = [("Noise level σ", [Cell(f"{low:.1f}{DASH}{high:.1f}") for low, high in ends])]
        for model in loss.model:
            own = losses[losses.model == model]
            columns.append((display(model), [value_cell(find_row(own, low=low)) for low in levels.low]))
        columns.append(("Exact bound", [Cell(number(bounds.get(sigma))) for sigma in levels.sigma]))
        tables.append(table_of("Loss by noise level", columns, folded=True))
        figures.append(curves(frame, palette))
    bits = _bits(frame)
    data = runs[0].data
    notes = [
        f"{count(data.get('rows'))} held-out activations of {count(data.get('documents'))} documents; "
        "every model was scored on the same activations, noise and noise levels.",
        "The bound, (π/2) mean √λ over the eigenvalues of the standardised training covariance, is the "
        "least loss that any Gaussian can reach. “Below the Gaussian” is paired with the Gaussian's own "
        "loss on these rows, which also pays for the step from training to held-out text.",
        "Predicting 0 costs about 2, and knowing only means and variances π/2 = 1.571.",
    ]
    if bits is not None:
        tables.insert(1, bits)
        notes.append(
            "Bits per dimension are minus the log-density in units of the rows' standard deviations. A GLP's comes "
            "from the probability-flow ODE: the last column has its standard error by random probes and what half the "
            "steps would change. Stored bfloat16 numbers lie on a lattice, where a density can grow without bound: "
            "that of the nearest neighbours does, where a row has copies in training. “Dequantised” rows are spread "
            "evenly over the cells of the lattice, and “bits a number” is what a model would need to write one stored "
            "number of 16 bits."
        )
    return Section(
        "density",
        "Density: how well is the distribution known?",
        "A GLP is trained to undo noise. Its loss on held-out activations, noise level by noise level, "
        "says how much of their distribution it has learnt. The fair yardstick is the best that any "
        "Gaussian, which knows all means and covariances but nothing else, could do: that is known "
        "exactly.",
        figures,
        tables,
        notes=notes,
    )


def _bits(frame: pd.DataFrame) -> Table | None:
    """Bits per dimension of stored and of dequantised rows, the fewest first."""
    measured = frame[frame.metric == "bits_per_dim"]
    if measured.empty:
        return None
    ways = {"stored": Setting(rows="stored"), "dequantised": Setting(rows="dequantised")}
    models = list(dict.fromkeys(measured.sort_values("value").model))
    columns = [("Model", [Cell(display(m, CONDITIONS)) for m in models])]
    for way, setting in ways.items():
        rows = rows_of(measured[measured.setting == setting], models)
        if any(row is not None for row in rows):
            columns.append((f"Bits a dimension, {way}", value_cells(rows, highest=False)))
    numbers = rows_of(frame, models, metric="bits_per_number")
    if any(row is not None for row in numbers):
        columns.append(("Bits a number", [value_cell(row, 2) for row in numbers]))
    errors = [[find_row(frame, model=m, setting=ways["stored"], metric=metric) for metric in _ERRORS] for m in models]
    if any(row is not None for pair in errors for row in pair):
        columns.append(
            ("Error by probes, by steps", [Cell(", ".join(number(r.value) for r in pair if r is not None) or DASH)
                                           for pair in errors])
        )  # fmt: skip
    return table_of("Bits per dimension of the same held-out activations; lower is better.", columns)


def _by_noise_level(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Losses by bin of noise levels, its ends `low` and `high` and middle `sigma`; the lowest bound by middle."""
    ends = [setting.range("sigma") for setting in frame.setting]
    binned = frame.assign(low=[low for low, _ in ends], high=[high for _, high in ends]).dropna(subset="low")
    binned = binned.assign(sigma=(binned.low + binned.high) / 2).sort_values("sigma")
    bounds = binned[binned.metric == "flow_loss_bound"].groupby("sigma").value.min()
    return binned[binned.metric == "flow_loss"], bounds


def curves(frame: pd.DataFrame, palette: Palette) -> Plot:
    """Flow-matching loss by noise level, and the same relative to the exact bound for Gaussians.

    Args:
        frame: rows `flow_loss` and `flow_loss_bound` with settings `sigma=low-high`.
        palette: colours of the labels.
    """
    losses, bound = _by_noise_level(frame)
    losses = losses[losses.model != "predict 0"]

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
            top.plot(line.index, line.value, label=in_legend(name), **options)
            if bottom is not None and not faint:
                shared = line.index.intersection(bound.index)
                percent, low, high = (
                    100 * (line[column][shared] / bound[shared] - 1) for column in ("value", "ci_low", "ci_high")
                )
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


def columns(_runs: Sequence[Results], frame: pd.DataFrame, _focus: str) -> list[Column]:
    """The held-out loss over all noise levels."""
    loss = frame[(frame.metric == "flow_loss") & (frame.setting == ALL)]
    loss = loss[~loss.model.map(family).isin(["predict", "isotropic"])]
    if loss.empty:
        return []
    cells = {row.model: value_cell(row) for _, row in loss.iterrows()}
    units = f"{count(loss.n.max())} documents"
    return [Column("density", "Density", "held-out loss a dimension; lower is better", cells, units, "density")]


def verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Whether the model in focus knows more than a Gaussian, and at which noise levels it does not."""
    made = []
    pairs = facing(differences(frame, "flow_loss"), focus)
    for d in (d for d in pairs if d.setting == ALL):
        outcome = judge(d, higher_is_better=False)
        losses = [
            value_of(frame, model=label, task=d.task, setting=ALL, metric="flow_loss") for label in (d.first, d.second)
        ]
        start = opening(outcome, display(d.first), display(d.second), "in held-out flow-matching loss")
        sentence = (
            f"{start}: {number(losses[0])} against {number(losses[1])} a dimension, difference {shown(d)} over {d.n} "
            "documents; lower is better."
        )
        below = find_row(frame, model=d.first, metric="below_bound_percent")
        notes = []
        if family(d.second) == "gaussian" and below is not None:
            side = "below" if below.value >= 0 else "above"
            ends = (below.ci_low, below.ci_high)
            if below.ci_low * below.ci_high > 0:
                ends = tuple(sorted(map(abs, ends)))
            notes.append(
                f"That is {number(abs(below.value), 1)}% {interval(*ends, 1)} {side} the exact bound for Gaussians"
                + ("" if below.value > 0 else ": it has learnt nothing beyond means and covariances")
            )
        notes += [
            f"In bits per dimension of {o.setting.get('rows')} rows the difference is {shown(o)}"
            for o in facing(differences(frame, "bits_per_dim"), focus)
            if (o.first, o.second, o.setting) == (d.first, d.second, Setting(rows="dequantised"))
        ]
        bins = [o for o in pairs if (o.first, o.second) == (d.first, d.second) and o.setting != ALL]
        worse = [o.setting.range("sigma") for o in bins if judge(o, higher_is_better=False) == "behind"]
        if worse and outcome != "behind":
            levels = ", ".join(f"{low:.1f}–{high:.1f}" for low, high in worse)
            notes.append(f"It loses at noise levels σ {levels}")
        made.append(Verdict("density", outcome, d.first, d.second, sentence, sentences(notes), visible=d.visible))
    return made


def text_table(results: Results) -> str:
    """The flow-matching loss over all noise levels and the bits per dimension, a line a model each."""
    frame = structured_frame(results.metrics)
    loss = frame[(frame.metric == "flow_loss") & (frame.setting == ALL)]
    return metric_lines(pd.concat([loss, frame[frame.metric == "bits_per_dim"]]))
