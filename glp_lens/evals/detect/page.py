"""How reports show detection: AUROC by detector and task, ROC curves, and whether thresholds hold."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from glp_lens.display.comparisons import Verdict, differences, judge, opening, sentences, shown, value_of
from glp_lens.display.elements import (
    Cell,
    ColouredText,
    Section,
    Table,
    find_row,
    metric_lines,
    rows_of,
    table_of,
    value_cell,
    value_cells,
)
from glp_lens.display.labels import MINUS, Palette, Style, count, display, family, number, p_value
from glp_lens.display.overview import Column
from glp_lens.display.plots import INK
from glp_lens.evals.detect.plots import calibration, roc
from glp_lens.evals.detect.settings import ALL, PROBE
from glp_lens.evals.results import Results, Setting, structured_frame

TITLE = "Detection"
CONDITIONS = {
    "norm": Style("norm", "#8c8c8c", "v"),
    "lm": Style("language model's", "#56b4e9", "P"),
    "diagonal": Style("diagonal Mahalanobis", "#b39ddb", "p"),
    "neighbours": Style("nearest neighbours", "#a6611a", "H"),
    "fitted": Style("fitted here:", "#1b7837", "d"),
    "mahalanobis": Style("Mahalanobis", "#1b7837", "d"),  # as in `fitted mahalanobis`
    "probe": Style("supervised probe", INK, "X"),
}
MEAN = Setting(pool="mean")
_WAYS = {
    "AUPRC": ("auprc", MEAN),
    "TPR at 1% FPR": ("tpr_at_1", MEAN),
    "AUROC, high quantile of tokens": ("auroc", Setting(pool="quantile")),
    "AUROC of single tokens": ("auroc", Setting(pool="token")),
}


def section(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, focus: str) -> Section:
    """The section of all runs."""
    area = frame[(frame.metric == "auroc") & (frame.setting == MEAN)]
    tasks = [task for task in dict.fromkeys(area.task) if task != ALL]
    labels = list(dict.fromkeys(area.model))
    order = sorted(
        (m for m in labels if m != PROBE), key=lambda m: -area[(area.model == m) & (area.task != ALL)].value.mean()
    )
    order += [PROBE] if PROBE in labels else []
    columns = [("Score", [Cell(display(m, CONDITIONS)) for m in order])]
    for task in [*tasks, ALL]:
        # The probe has seen both classes: it is no competitor.
        cells = value_cells(rows_of(area, [m for m in order if m != PROBE], task=task), highest=True)
        cells += [value_cell(find_row(area, model=PROBE, task=task))] if PROBE in labels else []
        if any(find_row(area, model=m, task=task) is not None for m in order):
            columns.append(("mean" if task == ALL else task, cells))
    data = runs[0].data
    baseline = next((r.extras["baseline"] for r in runs if "baseline" in r.extras), "gaussian")
    tables = [
        table_of(
            "AUROC of telling odd texts from normal ones of the same lengths (0.5 is chance; below it, odd texts look "
            "more normal). A text's score is the mean of its tokens'. The probe has seen both classes.",
            columns,
        )
    ]
    if tasks:
        tables.append(_against(frame, order, tasks, baseline))
    for task in tasks:
        rows = {name: (metric, setting) for name, (metric, setting) in _WAYS.items()}
        tables.append(
            table_of(
                f"{task}: other measures",
                [
                    ("Score", [Cell(display(m, CONDITIONS)) for m in order]),
                    *(
                        (name, [value_cell(find_row(frame, model=m, task=task, metric=metric, setting=setting))
                                for m in order])
                        for name, (metric, setting) in rows.items()
                    ),
                ],
                folded=True,
            )
        )  # fmt: skip
    plots = []
    curves = {task: curve for r in runs for task, curve in r.extras.get("curves", {}).items()}
    if curves:
        main = [m for m in order if " sigma=" not in m and not m.endswith("neighbours")]
        plots.append(roc(curves, main, palette, CONDITIONS))
    rates = frame[(frame.metric == "false_positive_rate") & ~frame.model.str.contains(" sigma=")]
    texts = [n for r in runs for n in r.extras.get("calibration_texts", {}).values()]
    if len(rates) and texts:
        plots.append(calibration(rates, texts, palette, CONDITIONS))
    notes = [
        f"{task}: {about['about']} {count(about['texts'])} texts of each class of {count(about['shortest'])} to "
        f"{count(about['longest'])} tokens (median {number(about['median_length'], 0)}), as many to set thresholds, "
        f"{count(about['fitted_to'])} others of each class to fit to."
        for task, about in data.get("tasks", {}).items()
    ]
    notes += [
        "Lengths are matched: of both classes, texts sorted by length meet each other and are cut on the right to "
        "the shorter one's tokens, so that both have exactly the same lengths. What length tells is not in here.",
        f"{display(baseline, CONDITIONS)} ranks texts as the Mahalanobis distance does. “Diagonal” is that of "
        "dimensions by themselves. “Fitted here” has seen normal texts of the task; all other scores know the training "
        "activations alone. Errors of a GLP at single noise levels are shown and not compared.",
        "TPR at 1% FPR takes the threshold from the tested texts themselves; of a hundred normal ones one is flagged.",
        f"Thresholds: with n calibration texts, the score of rank n + 1 {MINUS} floor(rate (n + 1)). A new normal text "
        "is flagged with a probability of at most the rate.",
    ]
    model = next((m for m in labels if family(m) == focus), None)
    return Section(
        "detect",
        "Detection: which activations are odd?",
        "A model that knows what activations look like can tell when they do not. Every score here is computed on each "
        "token of normal and of odd texts; simple distances stand beside the learnt models, because they have matched "
        "such models before.",
        plots,
        tables,
        texts=_coloured(runs, model or (order[0] if order else "")),
        notes=notes,
    )


def _against(frame: pd.DataFrame, labels: Sequence[str], tasks: Sequence[str], baseline: str) -> Table:
    """Differences to the Mahalanobis distance by task, and which of them can be told apart."""
    gaps = {(d.first, d.task): d for d in differences(frame, "auroc") if d.second == baseline}
    compared = [m for m in labels if (m, tasks[0]) in gaps and " sigma=" not in m and m != PROBE]
    columns = [("Score", [Cell(display(m, CONDITIONS)) for m in compared])]
    for task in tasks:
        cells = []
        for label in compared:
            gap = gaps.get((label, task))
            p = value_of(frame, model=label, task=task, metric="p_holm", setting=MEAN)
            cells.append(Cell(shown(gap), f"p {p_value(p)}") if gap is not None else Cell(""))
        columns.append((task, cells))
    return table_of(
        f"AUROC minus that of {display(baseline, CONDITIONS)} (Mahalanobis distance), on the same texts, and p after "
        "Holm over all of the table.",
        columns,
        folded=True,
    )


def _coloured(runs: Sequence[Results], model: str) -> list[ColouredText]:
    """A few texts, each token coloured by the share of normal tokens with a lower score."""
    made = []
    for task, examples in (pair for r in runs for pair in r.extras.get("examples", {}).items()):
        for each in examples:
            if model in each["shares"]:
                title = f"{task}, {each['part']} text, by {display(model, CONDITIONS)}"
                made.append(ColouredText(title, list(zip(each["tokens"], each["shares"][model], strict=True))))
    return made


def columns(_runs: Sequence[Results], frame: pd.DataFrame, _focus: str) -> list[Column]:
    """AUROC, the mean over tasks; without what has seen odd texts."""
    area = frame[(frame.metric == "auroc") & (frame.setting == MEAN)]
    area = area[(area.model != PROBE) & ~area.model.str.contains(" sigma=")]
    tasks = [task for task in dict.fromkeys(area.task) if task != ALL]
    rows = area[area.task == ALL] if (area.task == ALL).any() else area[area.task.isin(tasks[:1])]
    if rows.empty:
        return []
    texts = area[area.task.isin(tasks)].n
    sizes = " to ".join(dict.fromkeys(count(n) for n in (texts.min(), texts.max()))) if len(texts) else "?"
    units = f"{sizes} texts" if len(tasks) == 1 else f"{len(tasks)} tasks of {sizes} texts"
    measure = "AUROC of odd against normal texts" + ("" if len(tasks) == 1 else ", mean over tasks")
    cells = {row.model: value_cell(row) for _, row in rows.iterrows()}
    return [Column("detect", "Detection", f"{measure}; higher is better", cells, units, "detection")]


def verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Whether the model in focus, or its ratio to a reference, beats the Mahalanobis distance, by task."""
    made = []
    area = frame[(frame.metric == "auroc") & (frame.setting == MEAN)]
    for d in differences(frame, "auroc"):
        if family(d.first) != focus or " sigma=" in d.first or d.task == ALL:
            continue
        p = value_of(frame, model=d.first, task=d.task, metric="p_holm", setting=MEAN)
        outcome = judge(d, higher_is_better=True, p_adjusted=p)
        values = [value_of(area, model=label, task=d.task) for label in (d.first, d.second)]
        own = find_row(area, model=d.first, task=d.task)
        names = display(d.first, CONDITIONS), display(d.second, CONDITIONS)
        chance = own is not None and own.ci_low <= 0.5
        if chance and outcome == "ahead":  # a lead over what is worse than chance detects nothing
            outcome, start = "unclear", f"{names[0]} detects {d.task} no better than chance, {names[1]} worse"
        else:
            start = opening(outcome, *names, f"in detecting {d.task}")
        sentence = (
            f"{start}: AUROC {number(values[0])} against {number(values[1])}, difference {shown(d)} over {d.n} texts."
        )
        notes = [f"p after Holm over all scores and tasks {p_value(p)}"]
        if chance and outcome == "unclear":
            notes.append(f"{names[0]} itself is not above chance")
        others = area[(area.task == d.task) & (area.model != PROBE) & ~area.model.str.contains(" sigma=")]
        best = others.sort_values("value").iloc[-1]
        if best.model not in (d.first, d.second):
            notes.append(f"The best score there is {display(best.model, CONDITIONS)} with {number(best.value)}")
        made.append(
            Verdict(
                "detect",
                outcome,
                d.first,
                d.second,
                sentence,
                sentences(notes),
                area="detection",
                task=d.task,
                visible=d.visible,
            )
        )
    return made


def text_table(results: Results) -> str:
    """AUROC of the mean over tokens, a line a detector and task."""
    frame = structured_frame(results.metrics)
    chosen = frame[(frame.metric == "auroc") & (frame.setting == MEAN)]
    return metric_lines(chosen.assign(setting=chosen.task))
