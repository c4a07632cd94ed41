"""How reports show steering: concept against fluency, at chosen strengths and at all of them, with examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pandas as pd

from glp_lens.display import labels
from glp_lens.display.comparisons import (
    Verdict,
    difference_cells,
    differences,
    facing,
    judge,
    opening,
    shown,
    value_of,
)
from glp_lens.display.elements import (
    Cell,
    Example,
    Section,
    Table,
    find_row,
    metric_lines,
    rows_of,
    table_of,
    value_cell,
    value_cells,
)
from glp_lens.display.labels import DASH, GREY, Palette, Style, family, interval, number, signed
from glp_lens.display.plots import GRID, INK, Plot, render
from glp_lens.evals.results import Results, Setting, structured_frame
from glp_lens.evals.steering.settings import PLAIN, RANDOM, UNSTEERED
from glp_lens.types import Json

TITLE = "Steering"
CONDITIONS = {
    UNSTEERED: Style("not steered", GREY, "*"),
    PLAIN: Style("no repair", "#e69f00", "P"),
    RANDOM: Style("random direction", GREY, "X"),
}
display = partial(labels.display, own=CONDITIONS)
_SCORES = {"concept": "Concept (0–2)", "fluency": "Fluency (0–2)", "harmonic": "Harmonic mean"}
_SWEPT = {
    **{(metric, ""): title for metric, title in _SCORES.items()},
    ("concept_minus", RANDOM): "Concept over random",
    ("distinct_2", ""): "Distinct bigrams",
    ("nll_own", ""): "NLL, own model",
}
_CHECKS = {"judge_auroc": "AUROC", "judge_agreement": "agreement"}
_EXAMPLES = 3


def section(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, _focus: str) -> Section:
    """The section of all runs, a group of tables each."""
    tables: list[Table] = []
    for run in runs:
        own = structured_frame(run.metrics)
        tables += _tables(own, str(run.config.get("concept", "")), run.extras.get("chosen", {}))
    judges = frame[frame.metric.isin(_CHECKS)].drop_duplicates(["model", "task", "setting", "metric", "other"])
    if len(judges):
        body = [
            [
                Cell(f"{r.model.removeprefix('judge:')} {str(r.setting).replace('=', ' ')}".strip()),
                Cell(f"{_CHECKS[r.metric]}, {r.other.replace('_', ' ')}"),
                Cell(r.task),
                Cell(number(r.value)),
            ]
            for r in judges.itertuples()
        ]
        caption = (
            "Can the judges be trusted? AUROC on texts that they were not trained on (0.5 is chance), and "
            "how far two judges agree."
        )
        tables.append(Table(caption, ["Judge", "Check", "Concept", "Value"], body))
    notes = [
        "Concept is judged by a sentence-embedding classifier trained on other articles than the direction's, "
        "of the same source; fluency by an n-gram model, cut for texts that repeat themselves. No person and no "
        "large model judged.",
        "The n-gram model knows shuffled words and loops, not nonsense that is plausible word by word. Read the "
        "examples, and the language model's own loss under “all strengths”, beside it.",
        "Strength α is in units of the median activation norm. It is chosen on half of the prompts and "
        "scored on the other half, both ways.",
        "The random direction has the same norm: what it scores for the concept, any disturbance would.",
    ]
    for d in differences(frame, "harmonic"):
        if (d.first, d.second) == (PLAIN, RANDOM):
            notes.append(
                f"Control, {d.task}: steering without repair minus a random direction, harmonic mean "
                f"{signed(d.value)} {interval(d.low, d.high, sign=True)}."
            )
    return Section(
        "steering",
        "Steering: concept against fluency",
        "A direction for a topic is added to the activations while the language model writes. Pushed "
        "hard, the text falls apart, because activations leave the region the model knows. A repair puts "
        "each edited activation back among real ones; the question is whether the text then keeps the "
        "topic and stays fluent.",
        [frontier(frame, palette)] if len(frame[frame.metric == "concept"]) else [],
        tables,
        examples=[example for run in runs for example in _examples(run)],
        notes=notes,
    )


def _tables(frame: pd.DataFrame, concept: str, strengths: Json) -> list[Table]:
    """At chosen strengths, paired differences, and all strengths."""
    tables = [_at_chosen(frame, concept, strengths)]
    body, seen = [], set()
    for metric, what in (("harmonic", "harmonic mean"), ("concept_at_fluency", "concept at equal fluency")):
        for d in differences(frame, metric):
            if (metric, d.second, d.first) not in seen:
                seen.add((metric, d.first, d.second))
                pair, *gap = difference_cells(d, display)
                body.append([pair, Cell(what), *gap])
    header = ["Pair", "In", "Difference", "95% interval"]
    tables.append(Table(f"{concept}: paired differences over the same prompts", header, body, folded=True))

    swept = _with_strengths(frame)
    keys = swept.drop_duplicates(["model", "setting"])
    models, settings = list(keys.model), list(keys.setting)
    columns = {"Condition": [Cell(display(m)) for m in models], "α": [Cell(s.get("alpha")) for s in settings]}
    for (metric, other), title in _SWEPT.items():
        rows = [
            find_row(swept, model=m, setting=s, metric=metric, other=other)
            for m, s in zip(models, settings, strict=True)
        ]
        if any(r is not None for r in rows):
            columns[title] = [value_cell(r, sign=bool(other)) for r in rows]
    tables.append(table_of(f"{concept}: all strengths", columns.items(), folded=True))
    return tables


def _at_chosen(frame: pd.DataFrame, concept: str, strengths: Json) -> Table:
    chosen = frame[_at(frame, "chosen")]
    models = list(dict.fromkeys(chosen.model))
    still = frame[(frame.model == UNSTEERED) & (frame.setting == Setting(alpha=0))]
    level = frame[frame.metric == "concept_at_fluency"]
    used = [Cell(", ".join(f"{x:g}" for x in dict.fromkeys(strengths.get(m, []))) or DASH) for m in models]
    columns = {"Condition": [Cell(display(m)) for m in models], "α chosen": used}
    for metric, title in _SCORES.items():
        columns[title] = value_cells(rows_of(chosen, models, metric=metric), highest=True)
    columns["Concept at equal fluency"] = value_cells(rows_of(level, models), highest=True)
    if len(still):
        last = [value_cell(find_row(still, metric=metric)) for metric in _SCORES]
        for column, cell in zip(
            columns.values(), [Cell(display(UNSTEERED)), Cell(DASH), *last, Cell(DASH)], strict=True
        ):
            column.append(cell)
    caption = f"Steering towards {concept}, each condition at the strength chosen on the other half of the prompts."
    if len(level):
        share = level.setting.iloc[0].get("fluency>")
        caption += f" Last column: the most concept reached with a fluency of at least {share}."
    return table_of(caption, columns.items())


def _at(frame: pd.DataFrame, strength: str) -> pd.Series:
    """Which rows are at a strength."""
    return frame.setting.map(lambda setting: setting.get("alpha")) == strength


def _with_strengths(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows at a strength that is a number, with it as `strength`."""
    return frame.assign(strength=[setting.number("alpha") for setting in frame.setting]).dropna(subset="strength")


def _examples(run: Results) -> list[Example]:
    """The first prompts' continuations under every condition, by strength."""
    texts = pd.DataFrame(run.extras.get("generations") or run.extras.get("examples") or [])
    if texts.empty or not {"model", "alpha", "prompt", "text"} <= set(texts.columns):
        return []
    examples = []
    for prompt in list(dict.fromkeys(texts.prompt))[:_EXAMPLES]:
        own = texts[texts.prompt == prompt]
        steered = own[own.model != UNSTEERED]
        alphas = sorted(set(steered.alpha))
        rows = [
            (display(model), [_generation(find_row(steered, model=model, alpha=alpha)) for alpha in alphas])
            for model in dict.fromkeys(steered.model)
        ]
        still = find_row(own, model=UNSTEERED)
        examples.append(
            Example(
                str(run.config.get("concept", "")),
                prompt,
                "" if still is None else str(still.text).strip(),
                [f"α = {alpha:g}" for alpha in alphas],
                rows,
            )
        )
    return examples


def _generation(row: pd.Series | None) -> Cell:
    if row is None:
        return Cell(DASH)
    judged = [f"{name} {number(row[name], 1)}" for name in ("concept", "fluency") if name in row.index]
    return Cell(" ".join(str(row.text).split()), ", ".join(judged))


def frontier(frame: pd.DataFrame, palette: Palette) -> Plot:
    """Concept against fluency as the strength grows, one line a condition, one panel a concept.

    Args:
        frame: rows `concept` and `fluency` with settings `alpha=<strength>`.
        palette: colours of the labels.
    """
    rows = _with_strengths(frame[frame.metric.isin(["concept", "fluency"])])
    rows = rows[~rows.model.str.contains("+", regex=False)]
    starts, rows = rows[rows.model == UNSTEERED], rows[rows.model != UNSTEERED]
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
                    label=display(UNSTEERED),
                    zorder=4,
                )
            for model in dict.fromkeys(rows[rows.task == task].model):
                if not {"concept", "fluency"} <= set(wide.columns):
                    continue
                line = wide.loc[model].dropna().sort_index()
                if line.empty:
                    continue
                control = family(model) == RANDOM
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


def verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Verdicts against the other ways to steer, at chosen strengths, then against steering less."""
    chosen = frame[_at(frame, "chosen")]
    made: dict[tuple[str, str, str], Verdict] = {}
    for d in facing(differences(frame, "harmonic"), focus):
        if family(d.second) in (UNSTEERED, RANDOM) or (d.first, d.second, d.task) in made:
            continue  # controls check the measurement: beating them is no achievement
        outcome = judge(d, higher_is_better=True)
        means = [number(value_of(chosen, model=m, task=d.task, metric="harmonic")) for m in (d.first, d.second)]
        start = opening(outcome, display(d.first), display(d.second), f"in steering towards {d.task}")
        sentence = (
            f"{start}: harmonic mean of concept and fluency (0 to 2) {means[0]} against {means[1]}, difference "
            f"{shown(d)} over {d.n} prompts."
        )
        made[d.first, d.second, d.task] = Verdict("steering", outcome, d.first, d.second, sentence)
    at_fluency = []
    for d in facing(differences(frame, "concept_at_fluency"), focus):
        outcome = judge(d, higher_is_better=True)
        level = str(d.setting.get("fluency>")).replace("of", "of the")
        end = "more" if outcome == "ahead" else "less" if outcome == "behind" else "no more, as far as this shows,"
        sentence = (
            f"{opening(outcome, display(d.first), display(d.second), f'in {d.task} at equal fluency')}: keeping at "
            f"least {level} fluency, the most concept it reaches differs by {shown(d)} over {d.n} prompts. The repair "
            f"does {end} than a weaker push."
        )
        area = "steering at equal fluency"
        at_fluency.append(Verdict("steering", outcome, d.first, d.second, sentence, area=area))
    return [*made.values(), *at_fluency]


def text_table(results: Results) -> str:
    """The harmonic mean of concept and fluency at the chosen strength, a line a condition."""
    frame = structured_frame(results.metrics)
    return metric_lines(frame[(frame.metric == "harmonic") & _at(frame, "chosen")])
