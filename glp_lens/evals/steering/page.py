"""How reports show steering: methods compared over concepts, at chosen strengths and at all of them, with examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.display.comparisons import (
    Difference,
    Outcome,
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
    Part,
    Section,
    Table,
    find_row,
    metric_lines,
    table_of,
    value_cell,
    value_cells,
)
from glp_lens.display.labels import DASH, Palette, count, family, interval, number, p_value, signed
from glp_lens.display.overview import Column
from glp_lens.evals.results import Results, Setting, structured_frame
from glp_lens.evals.steering.plots import CONDITIONS, curves, display
from glp_lens.evals.steering.settings import ALL, CONTROLS, PLAIN, RANDOM, SAE, SHRINK, UNSTEERED
from glp_lens.types import Json

__all__ = ["CONDITIONS", "TITLE", "columns", "display", "section", "text_table", "verdicts"]

TITLE = "Steering"
_SCORES = {"concept": "Concept (0–2)", "fluency": "Fluency (0–2)", "harmonic": "Harmonic mean"}
_WHOLE = {
    ("concept_at_fluency", "80%"): "Concept at 80% fluency",
    ("concept_at_fluency", "90%"): "Concept at 90% fluency",
    ("pareto_area", ""): "Area under Pareto front",
    ("concept_per_nat", "nll"): "Concept per nat",
}
"""Numbers of whole sweeps, by metric and what they are at."""
_COMPARED = {("harmonic", "chosen"): "Harmonic mean", ("concept_at_fluency", "80%"): "Concept at equal fluency"}
_SWEPT = {
    **{(metric, ""): title for metric, title in _SCORES.items()},
    ("concept_minus", RANDOM): "Concept over random",
    ("distinct_2", ""): "Distinct bigrams",
    ("nll_own", ""): "NLL, own model",
}
_CHECKS = {"judge_auroc": "AUROC", "judge_agreement": "agreement"}
_OUTCOMES: dict[float, Outcome] = {1.0: "ahead", -1.0: "behind", 0.0: "unclear"}
_WORDS = {"ahead": "ahead", "behind": "behind", "unclear": "not told apart"}
_EXAMPLES = 3
_MOST_COLUMNS = 3
"""Concepts in the table that a page begins with, where there is no mean over them."""


class _Numbers:
    """Metric rows of the main run or of replicates, found by what they say.

    `at` is the strength (`0.4`, `chosen`), the level of fluency (`80%`), `nll`, or nothing.
    """

    def __init__(self, frame: pd.DataFrame, *, replicates: bool = False) -> None:
        self._rows: dict[tuple[str, ...], Any] = {}
        self.runs: list[tuple[str, str]] = []
        for row in frame.itertuples():
            run = _run(row.setting)
            if (run is not None) != replicates:
                continue
            if run is not None and run not in self.runs:
                self.runs.append(run)
            self._rows.setdefault((*(run or ()), row.model, row.task, row.metric, row.other, _at(row.setting)), row)

    def get(self, model: str, task: str, metric: str, at: str = "", other: str = "", run: Iterable[str] = ()) -> Any:
        """The row, or None."""
        return self._rows.get((*run, model, task, metric, other, at))


def _run(setting: Setting) -> tuple[str, str] | None:
    """Noise seed and number format of a replicate; None in the main run."""
    seed = setting.get("noise_seed")
    return None if seed is None else (seed, setting.get("lm_dtype") or "")


def _at(setting: Setting) -> str:
    if alpha := setting.get("alpha"):
        return alpha
    if level := setting.get("fluency>"):
        return level.split()[0]
    return "nll" if setting.get("nll<") else ""


def _main(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[np.array([_run(setting) is None for setting in frame.setting], dtype=bool)]


def section(runs: Sequence[Results], frame: pd.DataFrame, palette: Palette, focus: str) -> Section:
    """The section of all runs, a group of tables each, before the plots."""
    tables: list[Table] = []
    for run in runs:
        tables += _tables(structured_frame(run.metrics), run, focus)
    tables += _judges(frame)
    tables.sort(key=lambda table: table.folded)
    main = _main(frame)
    notes = [
        "Concept is judged by a sentence-embedding classifier trained on other articles than the direction's, "
        "of the same source; fluency by another model than the steered one, cut for texts that repeat themselves. "
        "The table of judges says how well. No person judged.",
        "No judge of this kind sees all nonsense. Read the texts, and the language model's own loss under “all "
        "strengths”, beside it.",
        "Strength α is in units of the activations' typical length. It is chosen on half of the prompts and "
        "scored on the other half, both ways.",
        "A random direction of the same norm shows what any disturbance would score for the concept.",
    ]
    for d in differences(main, "harmonic"):
        if {family(d.first), family(d.second)} == {PLAIN, RANDOM}:
            gap = facing([d], PLAIN)[0]
            notes.append(
                f"Control, {_task(d.task)}: steering without repair minus {display(gap.second)}, harmonic mean "
                f"{shown(gap)}."
            )
    plots = curves(main, palette, focus)
    return Section(
        "steering",
        "Steering: concept against fluency",
        "A direction for a topic is added to the activations while the language model writes. Pushed "
        "hard, the text falls apart, because activations leave the region the model knows. A repair puts "
        "each edited activation back among real ones; the question is whether the text then keeps the "
        "topic and stays fluent.",
        plots[:1],
        tables,
        parts=[Part("Concept against fluency, concept by concept", plots=plots[1:])] if plots[1:] else [],
        examples=[example for run in runs for example in _examples(run)],
        notes=notes,
    )


def _task(task: str) -> str:
    return "mean over concepts" if task == ALL else task


def _tables(frame: pd.DataFrame, run: Results, focus: str) -> list[Table]:
    """Of one run: at chosen strengths, who is ahead, single concepts, pairs, all strengths, replicates."""
    own = frame[~frame.model.str.startswith("judge:")]
    main, numbers = _main(own), _Numbers(own)
    tasks = list(dict.fromkeys(main.task)) or [str(run.config.get("concept", ""))]
    leading = [ALL] if ALL in tasks else tasks
    concepts = [task for task in tasks if task != ALL] if ALL in tasks else []
    tables = [_at_chosen(main, numbers, task, run) for task in leading]
    references = [label for label in (PLAIN, SHRINK, SAE) if ((main.metric == "verdict") & (main.other == label)).any()]
    for task in leading:
        against = [_against(main, numbers, task, other, run) for other in references]
        tables += [table for table in against if table.rows]
    for (metric, at), title in _COMPARED.items() if concepts else ():
        tables.append(_by_concept(main, numbers, concepts, metric, at, title))
    tables += [_at_chosen(main, numbers, task, run, folded=True) for task in concepts]
    for task in leading:
        tables += [_pairs(main, task, focus if references else ""), _all_strengths(main, numbers, task)]
    tables += [table for task in leading if (table := _replicates(main, _Numbers(own, replicates=True), task)).rows]
    return tables


def _labels(frame: pd.DataFrame, task: str) -> list[str]:
    """Methods with a chosen strength, in order."""
    return list(dict.fromkeys(frame[(frame.task == task) & _chosen_rows(frame)].model))


def _chosen_rows(frame: pd.DataFrame) -> np.ndarray:
    """Which rows are at the chosen strength."""
    return np.array([_at(setting) == "chosen" for setting in frame.setting], dtype=bool)


def _units(numbers: _Numbers, task: str) -> str:
    """How many concepts and prompts are behind a task's numbers, where results say it."""
    rows = [numbers.get(UNSTEERED, task, "units", other=what) for what in ("concepts", "prompts")]
    said = [f"{count(row.value)} {row.other}" for row in rows if row is not None]
    return f" ({', '.join(said)})" if said else ""


def _chosen(run: Results, task: str) -> Json:
    """Chosen strengths by method; results of a single concept once had them without its name."""
    chosen = run.extras.get("chosen", {})
    if any(isinstance(value, dict) for value in chosen.values()):
        found: Json = chosen.get(task, {})
        return found
    return dict(chosen)


def _at_chosen(frame: pd.DataFrame, numbers: _Numbers, task: str, run: Results, *, folded: bool = False) -> Table:
    models = _labels(frame, task)
    columns: dict[str, list[Cell]] = {"Condition": [Cell(display(m)) for m in models]}
    if strengths := _chosen(run, task):
        columns["α chosen"] = [
            Cell(", ".join(f"{x:g}" for x in dict.fromkeys(strengths.get(m, []))) or DASH) for m in models
        ]
    for metric, title in _SCORES.items():
        columns[title] = value_cells([numbers.get(m, task, metric, "chosen") for m in models], highest=True)
    for (metric, at), title in _WHOLE.items():
        rows = [numbers.get(m, task, metric, at) for m in models]
        if any(row is not None for row in rows):
            columns[title] = value_cells(rows, highest=True)
    still = {title: numbers.get(UNSTEERED, task, metric, "0") for metric, title in _SCORES.items()}
    if any(row is not None for row in still.values()):
        for title, column in columns.items():
            column.append(Cell(display(UNSTEERED)) if title == "Condition" else value_cell(still.get(title)))
    if folded:  # the first table has explained the columns
        return table_of(f"{task}: each condition at its chosen strength", columns.items(), folded=True)
    caption = (
        f"Steering towards {'all concepts, means' if task == ALL else task}{_units(numbers, task)}, each condition at "
        "the strength chosen on the other half of the prompts."
    )
    if any(title in columns for title in _WHOLE.values()):
        caption += " Concept at 80% fluency: the most concept reached with at least 80% of the unsteered fluency."
    if "Concept per nat" in columns:
        caption += (
            " Area: the share of the square of concept and fluency that some strength reaches in both. Per nat: "
            "concept gained while the loss under the unsteered model rises by at most one nat a token."
        )
    return table_of(caption, columns.items())


def _against(frame: pd.DataFrame, numbers: _Numbers, task: str, other: str, run: Results) -> Table:
    """Who is ahead of one method, by how much, and how small a difference could have been seen."""
    reasons = {(v["task"], v["method"], v["other"]): str(v.get("reason", "")) for v in run.extras.get("verdicts", [])}
    judged = frame[(frame.metric == "verdict") & (frame.task == task) & (frame.other == other)]
    body = []
    for row in judged.itertuples():
        cells = [Cell(display(row.model))]
        for metric, at in _COMPARED:
            gap = _difference(numbers, row.model, other, task, metric, at)
            p = numbers.get(row.model, task, "p_holm", at, other)
            visible = numbers.get(row.model, task, "smallest_visible", at, other)
            told = f", p {p_value(p.value)}" if p is not None else ""
            ends = "" if gap is None else interval(gap.low, gap.high, sign=True)
            cells.append(Cell(DASH if gap is None else signed(gap.value), f"{ends}{told}"))
            cells.append(Cell(DASH if visible is None else number(visible.value)))
        reason = reasons.get((task, row.model, other), "")
        cells.append(Cell(_WORDS[_OUTCOMES[float(row.value)]], passages=(reason,) if reason else ()))
        body.append(cells)
    header = ["Method", "Harmonic mean", "Could see", "Concept at equal fluency", "Could see", "Verdict"]
    caption = f"Against {display(other)}, {_task(task)}{_units(numbers, task)}: paired differences and verdicts"
    folded = other != PLAIN
    if not folded:
        caption += (
            ". p is after Holm over the methods of this table. Ahead or behind is only what is so in both measures, in "
            "every run, with two noise seeds (of repairs with noise) and with the language model in float32 and "
            "bfloat16. Could see: the smallest true difference that 80% of such runs would find, for one comparison "
            "alone."
        )
    return Table(caption, header, body, folded=folded, prose=("Verdict",))


def _difference(numbers: _Numbers, first: str, second: str, task: str, metric: str, at: str) -> Difference | None:
    """A paired difference, whichever way round the results have it."""
    row, sign = numbers.get(first, task, f"{metric}_diff", at, second), 1
    if row is None:
        row, sign = numbers.get(second, task, f"{metric}_diff", at, first), -1
    if row is None:
        return None
    low, high = sorted([sign * row.ci_low, sign * row.ci_high])
    return Difference(first, second, task, row.setting, sign * row.value, low, high, int(row.n))


def _by_concept(
    frame: pd.DataFrame, numbers: _Numbers, concepts: Sequence[str], metric: str, at: str, title: str
) -> Table:
    """The difference to no repair, a row a method and a column a concept; bold where a verdict is given."""
    models = [label for label in _labels(frame, concepts[0]) if label != PLAIN]
    columns = {"Condition": [Cell(display(m)) for m in models]}
    for concept in concepts:
        cells = []
        for label in models:
            gap = _difference(numbers, label, PLAIN, concept, metric, at)
            told = numbers.get(label, concept, "verdict", other=PLAIN)
            cells.append(
                Cell(DASH)
                if gap is None
                else Cell(
                    signed(gap.value, 2), interval(gap.low, gap.high, 2, sign=True), told is not None and told.value
                )
            )
        columns[concept] = cells
    caption = (
        f"{title}, each concept: difference to {display(PLAIN)}. Bold where the verdict is ahead or behind, that is in "
        "both measures and in every run."
    )
    return table_of(caption, columns.items(), folded=metric == "harmonic")


def _pairs(frame: pd.DataFrame, task: str, focus: str) -> Table:
    """Paired differences over the same prompts: all, or those of one family with others."""
    body, seen = [], set()
    for metric, what in (("harmonic", "harmonic mean"), ("concept_at_fluency", "concept at equal fluency")):
        pairs: Iterable[Difference] = (d for d in differences(frame[frame.task == task], metric))
        pairs = (d for d in pairs if metric == "harmonic" or _at(d.setting) == "80%")
        for d in facing(pairs, focus) if focus else pairs:
            if (metric, d.second, d.first) not in seen:
                seen.add((metric, d.first, d.second))
                pair, *gap = difference_cells(d, display)
                body.append([pair, Cell(what), *gap])
    header = ["Pair", "In", "Difference", "95% interval"]
    return Table(f"{_task(task)}: paired differences over the same prompts", header, body, folded=True)


def _all_strengths(frame: pd.DataFrame, numbers: _Numbers, task: str) -> Table:
    swept = _with_strengths(frame[frame.task == task]).drop_duplicates(["model", "setting"])
    keys = [(row.model, _at(row.setting)) for row in swept.itertuples()]
    columns = {"Condition": [Cell(display(m)) for m, _ in keys], "α": [Cell(at) for _, at in keys]}
    for (metric, other), title in _SWEPT.items():
        controls = sorted({o for o in frame[frame.metric == metric].other if family(o) == other}) if other else [""]
        for control in controls:
            rows = [numbers.get(m, task, metric, at, control) for m, at in keys]
            if any(r is not None for r in rows):
                name = title if control in ("", other) else f"{title}, {control.removeprefix(other).strip()}"
                columns[name] = [value_cell(r, sign=bool(other)) for r in rows]
    return table_of(f"{_task(task)}: all strengths", columns.items(), folded=True)


def _replicates(frame: pd.DataFrame, numbers: _Numbers, task: str) -> Table:
    """Differences to no repair in runs with another noise seed or number format."""
    body = []
    for label in _labels(frame, task):
        for run in numbers.runs:
            gaps = [numbers.get(label, task, f"{metric}_diff", at, PLAIN, run) for metric, at in _COMPARED]
            if any(gap is not None for gap in gaps):
                body.append(
                    [Cell(display(label)), Cell(run[0]), Cell(run[1]), *(value_cell(g, sign=True) for g in gaps)]
                )
    header = ["Method", "Noise seed", "Language model in", *_COMPARED.values()]
    caption = f"{_task(task)}: replicates, difference to {display(PLAIN)}"
    return Table(caption, header, body, folded=True)


def _judges(frame: pd.DataFrame) -> list[Table]:
    """The judges' own errors, over all concepts."""
    checks = frame[frame.metric.isin(_CHECKS)].drop_duplicates(["model", "task", "setting", "metric", "other"])
    body = []
    for (model, setting, metric, other), rows in checks.groupby(
        ["model", checks.setting.map(str), "metric", "other"], sort=False
    ):
        values = [number(value) for value in (rows.value.min(), rows.value.max())]
        concepts = list(dict.fromkeys(rows.task))
        body.append(
            [
                Cell(f"{model.removeprefix('judge:')} {setting.replace('=', ' ')}".strip()),
                Cell(f"{_CHECKS[metric]}, {other.replace('_', ' ')}"),
                Cell(concepts[0] if len(concepts) == 1 else f"{len(concepts)} concepts"),
                Cell(" to ".join(dict.fromkeys(values))),
            ]
        )
    caption = (
        "Can the judges be trusted? AUROC on texts that they were not trained on (0.5 is chance), and "
        "how far two judges agree."
    )
    return [Table(caption, ["Judge", "Check", "Concept", "Value"], body)] if body else []


def _with_strengths(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows at a strength that is a number, with it as `strength`."""
    return frame.assign(strength=[setting.number("alpha") for setting in frame.setting]).dropna(subset="strength")


def _examples(run: Results) -> list[Example]:
    """The first prompts' continuations under every condition, by strength; of several concepts, one prompt each."""
    texts = pd.DataFrame(run.extras.get("generations") or run.extras.get("examples") or [])
    if texts.empty or not {"model", "alpha", "prompt", "text"} <= set(texts.columns):
        return []
    if "task" not in texts:
        texts["task"] = str(run.config.get("concept", ""))
    places = texts.drop_duplicates(["task", "prompt"])
    examples: list[Example] = []
    for task, prompt in zip(places.task, places.prompt, strict=True):
        if [e.concept for e in examples].count(task) >= (_EXAMPLES if texts.task.nunique() == 1 else 1):
            continue
        own = texts[(texts.task == task) & (texts.prompt == prompt)]
        steered = own[own.model != UNSTEERED]
        alphas = sorted(set(steered.alpha))
        rows = [
            (display(model), [_generation(find_row(steered, model=model, alpha=alpha)) for alpha in alphas])
            for model in dict.fromkeys(steered.model)
        ]
        still = find_row(own, model=UNSTEERED)
        unsteered = "" if still is None else str(still.text).strip()
        examples.append(Example(task, prompt, unsteered, [f"α = {alpha:g}" for alpha in alphas], rows))
    return examples


def _generation(row: pd.Series | None) -> Cell:
    if row is None:
        return Cell(DASH)
    judged = [f"{name} {number(row[name], 1)}" for name in ("concept", "fluency") if name in row.index]
    return Cell(" ".join(str(row.text).split()), ", ".join(judged))


def columns(_runs: Sequence[Results], frame: pd.DataFrame, _focus: str) -> list[Column]:
    """The harmonic mean of concept and fluency at chosen strengths: over all concepts, or of each without."""
    main = _main(frame[~frame.model.str.startswith("judge:")])
    numbers = _Numbers(main)
    chosen = main[(main.metric == "harmonic") & _chosen_rows(main)]
    tasks = [ALL] if (chosen.task == ALL).any() else list(dict.fromkeys(chosen.task))
    made = []
    for task in tasks[:_MOST_COLUMNS]:
        rows = chosen[chosen.task == task].drop_duplicates("model")
        rows = rows[[label == SHRINK or not (label in CONTROLS or family(label) == RANDOM) for label in rows.model]]
        units = _units(numbers, task).strip(" ()") or f"{count(rows.n.max())} prompts"
        title = TITLE if task == ALL else f"{TITLE}: {task}"
        measure = "concept and fluency, harmonic mean, 0 to 2; higher is better"
        cells = {row.model: value_cell(row, 2) for _, row in rows.iterrows()}
        made.append(Column("steering", title, measure, cells, units, "steering", task, digits=2))
    return made


def verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Verdicts against the other ways to steer.

    Where results have verdicts of their own, which need replicates, these are told, over all concepts if there are
    several. Of older results, by the intervals of one run: at chosen strengths, then against steering less.
    """
    frame = _main(frame)
    judged = frame[frame.metric == "verdict"]
    older = frame[~frame.task.isin(set(judged.task))]
    return [*_replicated(frame, judged, focus), *_chosen_verdicts(older, focus), *_fluency_verdicts(older, focus)]


def _replicated(frame: pd.DataFrame, judged: pd.DataFrame, focus: str) -> list[Verdict]:
    numbers = _Numbers(frame)
    tasks = set(judged.task)
    made: dict[tuple[str, str, str], Verdict] = {}
    for row in judged[judged.task == ALL].itertuples() if ALL in tasks else judged.itertuples():
        pair, sign = (row.model, row.other), 1
        if family(row.model) != focus and family(row.other) == focus:
            pair, sign = (row.other, row.model), -1
        first, second = pair
        if (family(first) == focus) == (family(second) == focus) or (first, second, row.task) in made:
            continue
        outcome = _OUTCOMES[sign * float(row.value)]
        gaps = [_difference(numbers, first, second, row.task, metric, at) for metric, at in _COMPARED]
        said = ", ".join(
            f"{what[0].lower()}{what[1:]} {shown(gap)}"
            for what, gap in zip(_COMPARED.values(), gaps, strict=True)
            if gap is not None
        )
        met = numbers.get(row.model, row.task, "conditions_met", other=row.other)
        where = f"over {_n_concepts(numbers, row.task)} concepts" if row.task == ALL else f"towards {row.task}"
        start = opening(outcome, display(first), display(second), f"in steering {where}")
        held = "" if met is None else f" {met.value:.0f} of {count(met.n)} conditions hold."
        detail = []
        if row.task == ALL:
            detail.append(_concepts(judged[(judged.model == row.model) & (judged.other == row.other)], sign))
        if outcome == "unclear":
            detail.append(_visible(numbers, row))
        sentence = f"{start}: {said}.{held}"
        text = " ".join(part for part in detail if part)
        seen = numbers.get(row.model, row.task, "smallest_visible", "chosen", row.other)
        visible = math.nan if seen is None else float(seen.value)
        made[first, second, row.task] = Verdict(
            "steering", outcome, first, second, sentence, text, task=row.task, visible=visible
        )
    return list(made.values())


def _n_concepts(numbers: _Numbers, task: str) -> str:
    row = numbers.get(UNSTEERED, task, "units", other="concepts")
    return "all" if row is None else count(row.value)


def _concepts(judged: pd.DataFrame, sign: int) -> str:
    """For which single concepts a verdict is given."""
    told: dict[str, list[str]] = {}
    for row in judged[judged.task != ALL].itertuples():
        told.setdefault(_WORDS[_OUTCOMES[sign * float(row.value)]], []).append(row.task)
    parts = [f"{word} in {', '.join(told[word])}" for word in _WORDS.values() if word in told]
    return f"By concept: {'; '.join(parts)}." if parts else ""


def _visible(numbers: _Numbers, row: Any) -> str:
    """How small a difference could have been seen."""
    rows = [numbers.get(row.model, row.task, "smallest_visible", at, row.other) for _, at in _COMPARED]
    values = [number(found.value, 2) for found in rows if found is not None]
    return f"Differences below {' and '.join(values)} could not have been seen." if values else ""


def _chosen_verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    chosen = frame[_chosen_rows(frame)]
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
        made[d.first, d.second, d.task] = Verdict(
            "steering", outcome, d.first, d.second, sentence, task=d.task, visible=d.visible
        )
    return list(made.values())


def _fluency_verdicts(frame: pd.DataFrame, focus: str) -> list[Verdict]:
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
    return at_fluency


def text_table(results: Results) -> str:
    """The harmonic mean at the chosen strength, a line a condition: over all concepts if there are several."""
    frame = _main(structured_frame(results.metrics))
    frame = frame[(frame.metric == "harmonic") & _chosen_rows(frame)]
    return metric_lines(frame[frame.task == ALL] if ALL in set(frame.task) else frame)
