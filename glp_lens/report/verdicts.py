"""From metric rows to sentences: who wins a comparison, by how much, and where nobody does.

All functions are pure. A winner is named only if the 95% interval of the paired difference leaves out 0 and,
in probing, if Holm's adjustment over all pairs agrees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd

from glp_lens.report.labels import count, display, family, interval, number, p_value, signed

Outcome = Literal["ahead", "behind", "unclear"]
PROBING_VIEWS = (
    "split=dedup;mode=paper",
    "split=official;mode=paper",
    "split=dedup;mode=all",
    "split=official;mode=all",
)
"""Settings of a probing run; the first one present is the one that verdicts speak of."""
CONTROLS = ("unsteered", "random")
"""Conditions of steering that check the measurement; beating them is no achievement."""


@dataclass(frozen=True)
class Verdict:
    """One comparison of the model in focus with another.

    Attributes:
        suite: where the numbers come from.
        outcome: `ahead`, `behind`, or `unclear` if the interval contains 0.
        first: label of the model in focus.
        second: label of what it is compared with.
        sentence: the verdict, with difference and interval.
        detail: what qualifies it; may be empty.
        area: what the headline calls the comparison's field, by default the suite.
    """

    suite: str
    outcome: Outcome
    first: str
    second: str
    sentence: str
    detail: str = ""
    area: str = ""


class Difference(NamedTuple):
    """A paired difference `first - second` with its interval."""

    first: str
    second: str
    task: str
    setting: str
    value: float
    low: float
    high: float
    n: int


def differences(frame: pd.DataFrame, metric: str) -> Iterator[Difference]:
    """All rows of `<metric>_diff:<other>`."""
    prefix = f"{metric}_diff:"
    for row in frame[frame.metric.str.startswith(prefix)].itertuples():
        yield Difference(
            row.model, row.metric.removeprefix(prefix), row.task, row.setting, row.value, row.ci_low,
            row.ci_high, int(row.n),
        )  # fmt: skip


def facing(pairs: Iterator[Difference] | list[Difference], focus: str) -> list[Difference]:
    """The differences between the model in focus and others, turned so that the focus comes first."""
    found = []
    for d in pairs:
        mine = [family(d.first) == focus, family(d.second) == focus]
        if mine == [True, False]:
            found.append(d)
        elif mine == [False, True]:
            found.append(d._replace(first=d.second, second=d.first, value=-d.value, low=-d.high, high=-d.low))
    return found


def judge(difference: Difference, *, higher_is_better: bool, p_adjusted: float = math.nan) -> Outcome:
    """Who wins, seen from the first; `unclear` also without an interval or with an adjusted p above .05."""
    low, high = difference.low, difference.high
    if not (math.isfinite(low) and math.isfinite(high)) or low <= 0 <= high or p_adjusted > 0.05:
        return "unclear"
    return "ahead" if (low > 0) == higher_is_better else "behind"


def opening(outcome: Outcome, first: str, second: str, matter: str, suite: str = "") -> str:
    """The words that a verdict begins with."""
    a, b = display(first, suite), display(second, suite)
    if outcome == "ahead":
        return f"{a} beats {b} {matter}"
    if outcome == "behind":
        return f"{a} loses to {b} {matter}"
    return f"No clear winner between {a} and {b} {matter}"


def probing(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """One verdict a model, on the strictest view, with the number of other views that agree.

    What happens at equal feature counts is said where it is another verdict.
    """
    frame = frame[frame.task == "all"]
    pairs = facing(differences(frame, "auc"), focus)
    view = next((v for v in PROBING_VIEWS if any(d.setting == v for d in pairs)), None)
    p_values = {
        (row.model, row.metric.removeprefix("p_holm:"), row.setting): row.value
        for row in frame[frame.metric.str.startswith("p_holm:")].itertuples()
    }

    def p_of(d: Difference) -> float:
        either = [(d.first, d.second, d.setting), (d.second, d.first, d.setting)]
        return next((p_values[key] for key in either if key in p_values), math.nan)

    def outcome_of(d: Difference) -> Outcome:
        return judge(d, higher_is_better=True, p_adjusted=p_of(d))

    verdicts = []
    for d in (d for d in pairs if d.setting == view):
        outcome, p = outcome_of(d), p_of(d)
        matter = "in reading concepts from one feature"
        means = [_value(frame, label, "all", d.setting, "auc") for label in (d.first, d.second)]
        sentence = (
            f"{opening(outcome, d.first, d.second, matter, 'probing')}: mean test AUC "
            f"{number(means[0])} against {number(means[1])}, {_difference(d)} over {d.n} task families."
        )
        notes = []
        if math.isfinite(p):
            shown = p_value(p)
            notes.append(f"Holm-adjusted p {shown}" if "<" in shown else f"Holm-adjusted p = {shown}")
        same = [o for o in pairs if (o.first, o.second) == (d.first, d.second) and o.setting != view]
        others = [o for o in same if o.setting in PROBING_VIEWS]
        if others:
            agree = sum(outcome_of(o) == outcome for o in others)
            notes.append(f"{agree} of {len(others)} other views (split, candidate features) give the same verdict")
        equal = next((o for o in same if o.setting.startswith(f"{d.setting.split(';')[0]};mode=equal")), None)
        if equal is not None and outcome_of(equal) != outcome:
            features = count(float(equal.setting.rpartition("=")[2]))
            turn = opening(
                outcome_of(equal), d.first, d.second, f"at equal feature counts ({features} each)", "probing"
            )
            notes.append(f"{turn}: {_difference(equal)}")
        verdicts.append(Verdict("probing", outcome, d.first, d.second, sentence, _detail(notes)))
    return verdicts


def steering(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Verdicts against the other ways to steer, at chosen strengths, then against steering less."""
    seen, verdicts = set(), []
    for d in facing(differences(frame, "harmonic"), focus):
        if family(d.second) in CONTROLS or (d.first, d.second, d.task) in seen:
            continue
        seen.add((d.first, d.second, d.task))
        outcome = judge(d, higher_is_better=True)
        means = [_chosen(frame, label, d.task) for label in (d.first, d.second)]
        sentence = (
            f"{opening(outcome, d.first, d.second, f'in steering towards {d.task}')}: harmonic mean of "
            f"concept and fluency (0 to 2) {number(means[0])} against {number(means[1])}, {_difference(d)} "
            f"over {d.n} prompts."
        )
        verdicts.append(Verdict("steering", outcome, d.first, d.second, sentence))
    for d in facing(differences(frame, "concept_at_fluency"), focus):
        outcome = judge(d, higher_is_better=True)
        level = d.setting.split(";", maxsplit=1)[0].replace("fluency>=", "at least ").replace("of", "of the")
        end = "more" if outcome == "ahead" else "less" if outcome == "behind" else "no more, as far as this shows,"
        sentence = (
            f"{opening(outcome, d.first, d.second, f'in {d.task} at equal fluency')}: keeping {level} "
            f"fluency, the most concept it reaches differs by {_difference(d, bare=True)} over {d.n} "
            f"prompts. The repair does {end} than a weaker push."
        )
        area = "steering at equal fluency"
        verdicts.append(Verdict("steering", outcome, d.first, d.second, sentence, area=area))
    return verdicts


def _chosen(frame: pd.DataFrame, label: str, task: str) -> float:
    """Harmonic mean at the strength chosen on the other half of the prompts."""
    rows = frame[(frame.model == label) & (frame.task == task) & (frame.metric == "harmonic")]
    rows = rows[rows.setting.str.startswith("alpha=chosen")]
    return float(rows.value.iloc[0]) if len(rows) else math.nan


def fidelity(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Verdicts at equal distortion where the settings measured allow one, a sentence where they do not."""
    pairs = list(differences(frame, "delta_nll_matched"))
    read = facing([d for d in pairs if family(d.first) == focus], focus)
    covered = {family(d.second) for d in read}
    read += [
        d for d in facing([d for d in pairs if family(d.second) == focus], focus) if family(d.second) not in covered
    ]
    verdicts = []
    for d in read:
        outcome = judge(d, higher_is_better=False)
        fvu = dict(part.split("=", 1) for part in d.setting.split(";") if "=" in part).get("fvu", "")
        sentence = (
            f"{opening(outcome, d.first, d.second, 'in keeping the language model intact')} at equal "
            f"distortion{f' (FVU {number(float(fvu))})' if fvu else ''}: delta LM loss differs by "
            f"{_difference(d, bare=True)} nats a token over {d.n} documents; lower is better."
        )
        verdicts.append(Verdict("fidelity", outcome, d.first, d.second, sentence))
    settled = {family(v.second) for v in verdicts} | {"raw"}  # raw reconstructs exactly: nothing to match
    for d in facing(differences(frame, "delta_nll"), focus):
        rival = family(d.second)
        if rival in settled:
            continue
        settled.add(rival)
        ranges = [f"{display(name)} {_fvu_range(frame, name)}" for name in (focus, rival)]
        sentence = (
            f"{opening('unclear', focus, rival, 'in keeping the language model intact')}: they were not "
            f"measured at an equal distortion (FVU: {', '.join(ranges)}), so their losses are not "
            "comparable."
        )
        verdicts.append(Verdict("fidelity", "unclear", focus, rival, sentence))
    return verdicts


def _fvu_range(frame: pd.DataFrame, name: str) -> str:
    values = frame[(frame.metric == "fvu") & (frame.model.map(family) == name)].value
    low, high = number(values.min()), number(values.max())
    return low if low == high else f"{low} to {high}"


def density(frame: pd.DataFrame, focus: str) -> list[Verdict]:
    """Whether the model in focus knows more than a Gaussian, and at which noise levels it does not."""
    verdicts = []
    pairs = facing(differences(frame, "flow_loss"), focus)
    for d in (d for d in pairs if d.setting == "sigma=all"):
        outcome = judge(d, higher_is_better=False)
        losses = [_value(frame, label, d.task, d.setting, "flow_loss") for label in (d.first, d.second)]
        sentence = (
            f"{opening(outcome, d.first, d.second, 'in held-out flow-matching loss')}: {number(losses[0])} "
            f"against {number(losses[1])} a dimension, {_difference(d)} over {d.n} documents; lower is "
            "better."
        )
        below = frame[(frame.model == d.first) & (frame.metric == "below_bound_percent")]
        notes = []
        if family(d.second) == "gaussian" and len(below):
            row = below.iloc[0]
            side = "below" if row.value >= 0 else "above"
            ends = sorted((abs(row.ci_low), abs(row.ci_high))) if row.ci_low * row.ci_high > 0 else None
            shown = interval(ends[0], ends[1], 1) if ends else interval(row.ci_low, row.ci_high, 1)
            notes.append(
                f"That is {number(abs(row.value), 1)}% {shown} {side} the exact bound for Gaussians"
                + ("" if row.value > 0 else ": it has learnt nothing beyond means and covariances")
            )
        bins = [o for o in pairs if (o.first, o.second) == (d.first, d.second) and o.setting != d.setting]
        worse = [o.setting for o in bins if judge(o, higher_is_better=False) == "behind"]
        if worse and outcome != "behind":
            levels = ", ".join(s.removeprefix("sigma=").replace("-", "–") for s in worse)
            notes.append(f"It loses at noise levels σ {levels}")
        verdicts.append(Verdict("density", outcome, d.first, d.second, sentence, _detail(notes)))
    return verdicts


SUITES = {"probing": probing, "steering": steering, "fidelity": fidelity, "density": density}


def verdicts(frame: pd.DataFrame, focus: str = "glp") -> list[Verdict]:
    """All verdicts that the metrics of any suites allow, in the order of `SUITES`."""
    return [v for suite, rule in SUITES.items() for v in rule(frame[frame.suite == suite], focus)]


def headline(found: list[Verdict], focus: str = "glp") -> str:
    """The whole result in a few sentences, losses named.

    Where a rival is compared with several settings of the focus, only the main one counts: the label that equals
    the focus, or else the first.
    """
    if not found:
        return f"There is nothing to compare {display(focus)} with."
    main: dict[tuple[str, str], str] = {}
    for v in found:
        key = (v.area or v.suite, v.second)
        main[key] = v.first if v.first == focus else main.get(key, v.first)
    found = [v for v in found if v.first == main[v.area or v.suite, v.second]]
    who = display(focus)
    parts = [
        (f"{who} wins in", "over", "ahead"),
        ("It loses in" if any(v.outcome == "ahead" for v in found) else f"{who} loses in", "to", "behind"),
        ("There is no clear winner in", "against", "unclear"),
    ]
    sentences = []
    for begin, word, outcome in parts:
        rivals: dict[str, list[str]] = {}
        for v in found:
            if v.outcome == outcome:
                rivals.setdefault(v.area or v.suite, []).append(display(v.second, v.suite))
        places = [f"{suite} {word} {_join(list(dict.fromkeys(names)))}" for suite, names in rivals.items()]
        if places:
            sentences.append(f"{begin} {'; in '.join(places)}.")
    return " ".join(sentences)


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _value(frame: pd.DataFrame, model: str, task: str, setting: str, metric: str) -> float:
    chosen = frame[
        (frame.model == model) & (frame.task == task) & (frame.setting == setting) & (frame.metric == metric)
    ]
    return float(chosen.value.iloc[0]) if len(chosen) else math.nan


def _difference(d: Difference, *, bare: bool = False) -> str:
    shown = f"{signed(d.value)} {interval(d.low, d.high, sign=True)}".strip()
    return shown if bare else f"difference {shown}"


def _detail(notes: list[str]) -> str:
    return ". ".join(notes) + "." if notes else ""
