"""How reports show fidelity: reconstruction error beside what it costs the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import pandas as pd

from glp_lens.display.comparisons import (
    Difference,
    Verdict,
    difference_cells,
    differences,
    facing,
    judge,
    opening,
    shown,
)
from glp_lens.display.elements import (
    Cell,
    Section,
    Table,
    find_row,
    metric_lines,
    rows_of,
    table_of,
    value_cell,
)
from glp_lens.display.labels import DASH, GREY, THIN, Palette, Style, count, display, family, interval, number, signed
from glp_lens.display.overview import Column
from glp_lens.display.plots import GRID, INK, Plot, errors, in_legend, render
from glp_lens.evals.results import Results, structured_frame

TITLE = "Fidelity"
CONDITIONS = {
    "clean": Style("clean", GREY, "*"),
    "mean": Style("mean", GREY, "X"),
    "zero": Style("zero", GREY, "P"),
    "noise": Style("noise only", "#6e6e6e", "v"),
}
_MATTER = "in keeping the language model intact"


def section(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, _focus: str) -> Section:
    """The section of all runs."""
    models = list(frame[frame.metric == "delta_nll"].model)
    measured = {
        metric: rows_of(frame, models, metric=metric)
        for metric in ("network_calls", "fvu", "fvu_standardised", "delta_nll", "kl", "top1", "loss_recovered")
    }
    has_scaled = any(r is not None for r in measured["fvu_standardised"])
    columns = {
        "Model": [Cell(display(m)) for m in models],
        "Network calls": [Cell(DASH if r is None else count(r.value)) for r in measured["network_calls"]],
        "FVU": [value_cell(r) for r in measured["fvu"]],
        **({"FVU, standardised": [value_cell(r) for r in measured["fvu_standardised"]]} if has_scaled else {}),
        "Delta LM loss (nats)": [value_cell(r, sign=True) for r in measured["delta_nll"]],
        "KL (nats)": [value_cell(r) for r in measured["kl"]],
        "Same top token": [value_cell(r) for r in measured["top1"]],
        "Loss recovered": [value_cell(r) for r in measured["loss_recovered"]],
    }
    caption = "Reconstruction error and its price, on the same rows. Brackets: 95% intervals over documents."
    tables = [table_of(caption, columns.items())]
    body = []
    for d in differences(frame, "delta_nll_matched"):
        pair, *gap = difference_cells(d, display)
        body.append([pair, Cell(number(d.setting.number("fvu"))), *gap])
    if body:
        tables.append(
            Table(
                "At equal distortion: the first model read off between its settings at the second one's FVU. "
                "Negative favours the first.",
                ["Pair", "At FVU", "Difference of delta LM loss", "95% interval"],
                body,
            )
        )
    curves = {name: labels for r in runs for name, labels in r.extras.get("curves", {}).items()}
    data, config = runs[0].data, runs[0].config
    clean = find_row(frame, model="clean", metric="nll")
    notes = [
        f"{count(data.get('tokens'))} predicted tokens in {count(config.get('documents'))} held-out "
        f"documents; the untouched model's loss is {number(clean.value if clean is not None else None)} "
        "nats a token.",
        f"{count(data.get('massive_rows_unchanged', 0))} activations with a massive norm passed unchanged "
        "in all conditions, as did BOS.",
        "Loss recovered is 1 for the untouched model and 0 for mean ablation. KL is that of the next-token "
        "distribution from the untouched model's; the same top token, the share of predictions whose likeliest "
        "token stays.",
        "“Noise only” is what a GLP's reconstruction begins with, (1 − σ) z + σ ε in standardised dimensions, without "
        "any model: what costs as much at equal distortion has kept nothing that noise does not keep.",
        "Between two settings of a model, its loss is taken as a power of its FVU: the straight line of the "
        "plot. The farther apart the settings, the less that is to be trusted.",
    ]
    if has_scaled:
        notes.append(
            "Models are trained on different losses: GLP and standardised PCA on standardised dimensions, SAE and "
            "plain PCA (“PCA raw”) on raw squared error. So “equal distortion” depends on the space; the matched "
            "comparison uses raw FVU. “FVU, standardised” divides squared errors by each dimension's variance."
        )
    dtype = data.get("model", {}).get("dtype", "float32")
    if dtype != "float32":
        notes.append(f"The language model ran in {dtype}: differences of about 0.01 nats are within its rounding.")
    return Section(
        "fidelity",
        "Fidelity: what does the language model lose?",
        "Every activation of held-out text is replaced by a model's reconstruction of it, and the "
        "language model goes on from there. The rise of its loss says what the reconstruction left out "
        "that mattered. A GLP reconstructs by adding noise and removing it again: its noise level σ is a "
        "knob, and at little noise any model looks good. That is why the error (FVU) stands beside the "
        "loss.",
        [scatter(frame, curves, palette)],
        tables,
        notes=notes,
    )


def scatter(frame: pd.DataFrame, curves: Mapping[str, list[str]], palette: Palette) -> Plot:
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
                linewidth=1.2, linestyle="",
            )  # fmt: skip
            name = in_legend(display(" ".join(word for word in model.split() if "=" not in word), CONDITIONS))
            axes.plot([], [], color=palette.color(model), marker=palette.marker(model), linewidth=1.3, label=name)
            if model in first and "=" in model:  # all points would be too many to name
                axes.annotate(
                    display(model.removeprefix(family(model)).strip()), (x, y), xytext=(-8, 4),
                    textcoords="offset points", fontsize=9.5, ha="right", va="bottom", color=INK,
                )  # fmt: skip
        floor = max(min((abs(v) for v in loss.value if v), default=1e-3), 1e-3)
        axes.set_yscale("symlog", linthresh=floor, linscale=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        axes.set_xlabel("fraction of variance unexplained (FVU), log scale")
        axes.set_ylabel("delta LM loss, nats a token (log scale)")
        handles, names = axes.get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))
        figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=5)

    lines = "Lines join settings of one model. " if curves else ""
    caption = (
        "Left is a closer reconstruction, down is less harm to the language model. " + lines + "How closely to "
        "reconstruct is a choice, so compare models at equal FVU: of two points one above the other, the "
        "lower one wins."
    )
    return render("fidelity", caption, (7.6, 5.2), draw)


def columns(_runs: Sequence[Results], frame: pd.DataFrame, focus: str) -> list[Column]:
    """How much more each model costs the language model than the one in focus, at equal distortion.

    Where nothing was compared at equal distortion, each model's cost at its own.
    """
    read = _matched(frame, focus)
    if not read:
        rows = frame[(frame.metric == "delta_nll") & ~frame.model.map(family).isin(CONDITIONS)]
        cells = {row.model: value_cell(row, sign=True) for _, row in rows.iterrows()}
        measure, n = "rise of the LM's loss, nats a token, each at its own FVU; lower is better", rows.n.max()
    else:
        cells = {focus: Cell("0", "reference")}
        for d in reversed(read):  # of several settings, the widest or the main one
            label = family(d.second)
            if label not in cells or d.second == label:
                ends = interval(-d.high, -d.low, sign=True)
                at = f"at FVU{THIN}{number(d.setting.number('fvu'), 2)}"
                cells[label] = Cell(signed(-d.value), f"{ends} {at}".strip())
        order = {focus: None} | dict.fromkeys(family(d.second) for d in read)
        cells = {label: cells[label] for label in order}
        measure, n = f"LM loss (nats) above {display(focus)}'s, at equal FVU; lower is better", read[0].n
    if not cells:
        return []
    return [Column("fidelity", "Fidelity", measure, cells, f"{count(n)} documents", "fidelity")]


def _matched(frame: pd.DataFrame, focus: str) -> list[Difference]:
    """Differences to the model in focus at equal distortion, read off its own curve where it has one."""
    pairs = list(differences(frame, "delta_nll_matched"))
    read = facing([d for d in pairs if family(d.first) == focus], focus)
    covered = {family(d.second) for d in read}
    return read + [
        d for d in facing([d for d in pairs if family(d.second) == focus], focus) if family(d.second) not in covered
    ]


def verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Verdicts at equal distortion where the settings measured allow one, a sentence where they do not."""
    made = []
    for d in _matched(frame, focus):
        outcome = judge(d, higher_is_better=False)
        fvu = d.setting.number("fvu")
        sentence = (
            f"{opening(outcome, display(d.first), display(d.second), _MATTER)} at equal "
            f"distortion{f' (FVU {number(fvu)})' if isfinite(fvu) else ''}: delta LM loss differs by "
            f"{shown(d)} nats a token over {d.n} documents; lower is better."
        )
        made.append(Verdict("fidelity", outcome, d.first, d.second, sentence, visible=d.visible))
    settled = {family(v.second) for v in made} | {"raw"}  # raw reconstructs exactly: nothing to match
    for d in facing(differences(frame, "delta_nll"), focus):
        rival = family(d.second)
        if rival in settled:
            continue
        settled.add(rival)
        ranges = [f"{display(name)} {_fvu_range(frame, name)}" for name in (focus, rival)]
        sentence = (
            f"{opening('unclear', display(focus), display(rival), _MATTER)}: they were not "
            f"measured at an equal distortion (FVU: {', '.join(ranges)}), so their losses are not "
            "comparable."
        )
        made.append(Verdict("fidelity", "unclear", focus, rival, sentence))
    return made


def _fvu_range(frame: pd.DataFrame, name: str) -> str:
    values = frame[(frame.metric == "fvu") & (frame.model.map(family) == name)].value
    low, high = number(values.min()), number(values.max())
    return low if low == high else f"{low} to {high}"


def text_table(results: Results) -> str:
    """Distortion and change in language-model loss of each model, then the differences at equal distortion."""
    frame = structured_frame(results.metrics)
    matched = frame[frame.metric == "delta_nll_matched_diff"]
    matched = matched.assign(metric=matched.metric + ":" + matched.other)
    return metric_lines(pd.concat([frame[frame.metric.isin(["fvu", "delta_nll"])], matched]))
