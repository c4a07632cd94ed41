"""All numbers of the suite from its generations: one row a text, with its scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.results import Metric, Setting
from glp_lens.evals.statistics import (
    Floats,
    GroupResampling,
    holm,
    intervals,
    p_values,
    resampling,
    smallest_visible,
)
from glp_lens.evals.steering.scores import concept_at_fluency, halves, harmonic_mean, pareto_area
from glp_lens.evals.steering.settings import ALL, CONTROLS_AT_RANDOM, PLAIN, SAE, SHRINK, UNSTEERED
from glp_lens.types import Json

REFERENCES = (PLAIN, SHRINK, SAE)
"""What methods are judged against, where it is among them."""
LEVELS = (0.8, 0.9)
"""Shares of the unsteered fluency at which concept is compared; verdicts use the first."""
NATS = 1.0
"""By how many nats a token the loss under the unsteered model may rise in `concept_per_nat`."""
NUMBER_FORMATS = ("float32", "bfloat16")
"""Of the language model: a verdict must hold in both."""
SEEDS = 2
"""Noise seeds that a verdict on a method with noise must hold for, at least."""
KEYS = ("concept", "method", "setting", "strength", "prompt", "prompt_index", "text", "noise_seed", "lm_dtype")
SCORES = {
    "score_concept": "concept", "score_fluency": "fluency", "score_concept_tfidf": "concept_tfidf",
    "nll_own": "nll_own", "distinct_2": "distinct_2", "distinct_characters": "distinct_characters",
    "nll_per_byte": "nll_per_byte", "nll_ngram": "nll_ngram", "slor": "slor",
    "hosted_concept": "hosted_concept", "hosted_instruction": "hosted_instruction", "hosted_fluency": "hosted_fluency",
}  # fmt: skip
"""Columns with scores, and the metrics that they become. The first four are needed, the others optional."""
CHOSEN = "chosen"


class _Run(NamedTuple):
    """What was generated with one noise seed and one number format of the language model."""

    noise_seed: int
    lm_dtype: str

    @property
    def setting(self) -> Setting:
        return Setting(noise_seed=self.noise_seed, lm_dtype=self.lm_dtype)


@dataclass(frozen=True, eq=False)
class _Sweep:
    """The texts of one method towards one concept: strengths, and scores `(n_prompts, n_strengths)` by metric."""

    strengths: tuple[float, ...]
    prompts: tuple[int, ...]
    scores: Mapping[str, Floats]

    def of(self, prompts: tuple[int, ...]) -> _Sweep:
        """The texts of some of its prompts; all, if it lacks one of them."""
        if prompts == self.prompts or not {*prompts} <= {*self.prompts}:
            return self
        rows = [self.prompts.index(prompt) for prompt in prompts]
        return _Sweep(self.strengths, prompts, {name: values[rows] for name, values in self.scores.items()})


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One method's statistics, each with draws in front: `(1 + resamples, ...)`.

    Attributes:
        by_strength: means at each strength `(1 + resamples, n_strengths)` by metric.
        chosen: means at the strength chosen on the other half of the prompts, by metric.
        curve: of the whole sweep, by metric and setting.
        alphas: the strengths chosen on the first half and on the second.
    """

    strengths: tuple[float, ...]
    by_strength: Mapping[str, Floats]
    chosen: Mapping[str, Floats]
    curve: Mapping[tuple[str, Setting], Floats]
    alphas: tuple[float, float] = (0.0, 0.0)


Drawn = dict[str, _Drawn]


@checked
def analyse(frame: pd.DataFrame, *, seed: int = 0, resamples: int = 2000) -> tuple[list[Metric], Json]:
    """Every metric of the suite, from generations of one experiment and their scores.

    The main run has the first noise seed and number format of the frame; others are replicates, of some
    methods perhaps. A method whose setting has no noise level (`u`, `sigma`) draws no noise: where it is missing in a
    replicate, its texts of the other seed stand in as what methods are compared with.

    Metrics of each concept (task), and of the mean over concepts (task `all`) where there are several; methods are
    labels as in the frame, options of repairs are in the setting:

    - at each strength (`alpha=0.4`): every score, `harmonic` (harmonic mean of concept and fluency in each text), and
      paired differences `concept_minus:B`, `harmonic_minus:B` to no steering and to each random direction;
    - at the strength chosen on the other half of the prompts (`alpha=chosen`): `concept`, `fluency`, `harmonic`, and
      `harmonic_diff:B`. The choice is made again in each resample, so that intervals hold what it adds;
    - `concept_at_fluency` with at least 80% and 90% of the unsteered fluency, and `concept_at_fluency_diff:B`;
    - `pareto_area` (`scores.pareto_area`), and `concept_per_nat`: the concept gained while the loss under the unsteered
      model rises by at most one nat a token. Loops are likely texts: read it beside fluency. Both with `_diff:B`;
    - against `plain`, `shrink` and `sae` at the chosen strength and at equal fluency: `p_holm:B`, adjusted over the
      methods but controls, and `smallest_visible:B` and `smallest_visible_holm:B`, the smallest true difference that
      would have been found in 80% of such runs by one comparison alone, and after the strictest step of Holm;
    - the same differences and p values in each replicate, with `noise_seed` and `lm_dtype` in the setting;
    - `verdict:B`: 1 ahead, -1 behind, 0 not told apart, and `conditions_met:B`, of `n` conditions. A method is ahead
      if it is, after Holm and by its 95% interval, at the chosen strength and at equal fluency in every run, with at
      least two noise seeds (if it draws noise) and with the language model in float32 and in bfloat16;
    - `units:prompts` and `units:concepts` of `unsteered`: how many are behind the numbers.

    Intervals of a concept are by bootstrap over prompts, those of `all` over concepts and prompts within them
    (`statistics.GroupResampling`); `n` is then the number of concepts. A difference is given once for each pair.

    Args:
        frame: rows as `texts.write_generations` documents them, of one experiment.
        seed: of the bootstrap, and of the halves of prompts.
        resamples: of the bootstrap.

    Returns:
        The metrics, and `chosen` (strengths by task and method, one for each half of the prompts), `verdicts` (task,
        method, other, verdict, reason), `main_run`, `replicates`, and `examples`: the texts of each concept's first
        prompt.

    Raises:
        InputError: columns or texts are missing or doubled, or there is more than one experiment.
    """
    sweeps = _Sweeps(frame)
    metrics, extras = _Analysis(sweeps, seed, resamples).done()
    return metrics, extras | {"examples": _examples(frame, sweeps.main)}


class _Sweeps:
    """The frame as arrays, found by run, concept and method."""

    def __init__(self, frame: pd.DataFrame) -> None:
        needed = [*KEYS, *list(SCORES)[:4]]
        if absent := [name for name in needed if name not in frame.columns]:
            raise InputError(f"the generations lack the columns {', '.join(absent)}: score them first")
        if "experiment" in frame.columns and frame["experiment"].nunique() > 1:
            names = ", ".join(map(str, frame["experiment"].unique()))
            raise InputError(f"generations of several experiments ({names}): analyse one at a time")
        if frame.empty:
            raise InputError("no generations: run the experiment first")
        dtypes = frame["lm_dtype"].astype(str).str.removeprefix("torch.")
        frame = frame.assign(lm_dtype=dtypes)
        self.main = _Run(int(frame["noise_seed"].iloc[0]), str(dtypes.iloc[0]))
        self.concepts = list(dict.fromkeys(frame["concept"].astype(str)))
        settings = frame.drop_duplicates(["method", "setting"])
        if settings["method"].duplicated().any():
            label = settings["method"][settings["method"].duplicated()].iloc[0]
            raise InputError(f"method {label!r} has several settings: give each its own label")
        self.settings = {
            str(label): Setting.parse(str(setting))
            for label, setting in zip(settings["method"], settings["setting"], strict=True)
        }
        self._stochastic: dict[str, bool] = {}
        if "stochastic" in frame.columns:
            self._stochastic = {
                str(label): bool(any_) for label, any_ in frame.groupby("method")["stochastic"].any().items()
            }
        self._cells = dict(self._read(frame))
        self._prompts = {(run, concept): own.prompts for (run, concept, _), own in self._cells.items()}
        self.runs = list(dict.fromkeys([self.main, *(run for run, _, _ in self._cells)]))
        for concept in self.concepts:
            for label in (UNSTEERED, PLAIN):
                if (self.main, concept, label) not in self._cells:
                    raise InputError(
                        f"no {label} texts of {concept} with noise seed {self.main.noise_seed} and "
                        f"{self.main.lm_dtype}: every comparison needs them"
                    )

    @staticmethod
    def _read(frame: pd.DataFrame) -> Iterator[tuple[tuple[_Run, str, str], _Sweep]]:
        names = {column: name for column, name in SCORES.items() if column in frame.columns}
        ordered = frame.sort_values(["prompt_index", "strength"], kind="stable")
        for (noise_seed, dtype, concept, label), own in ordered.groupby(
            ["noise_seed", "lm_dtype", "concept", "method"], sort=False, observed=True
        ):
            strengths, prompts = np.unique(own["strength"]), np.unique(own["prompt_index"])
            shape = len(prompts), len(strengths)
            doubled = own.duplicated(["prompt_index", "strength"]).any()
            if doubled or len(own) != shape[0] * shape[1]:
                raise InputError(
                    f"{label}, {concept}: {len(own)} texts{', some of them twice,' if doubled else ''} where "
                    f"{shape[0]} prompts at {shape[1]} strengths need {shape[0] * shape[1]}: finish the run"
                )
            scores = {
                name: own[column].to_numpy(dtype=np.float64, na_value=np.nan).reshape(shape)
                for column, name in names.items()
            }
            scores["harmonic"] = harmonic_mean(scores["concept"], scores["fluency"])
            key = _Run(int(noise_seed), str(dtype)), str(concept), str(label)
            yield key, _Sweep(tuple(map(float, strengths)), tuple(map(int, prompts)), scores)

    @property
    def methods(self) -> list[str]:
        """All labels but that of no steering."""
        return [label for label in self.settings if label != UNSTEERED]

    def draws_noise(self, label: str) -> bool:
        """Whether another noise seed gives other texts: by the column `stochastic`, else because noise has a level."""
        if label in self._stochastic:
            return self._stochastic[label]
        setting = self.settings[label]
        return setting.get("u") is not None or setting.get("sigma") is not None

    def has(self, run: _Run, concept: str, label: str) -> bool:
        """Whether the method ran there itself."""
        return (run, concept, label) in self._cells

    def find(self, run: _Run, concept: str, label: str) -> _Sweep | None:
        """The texts there, or those of the main noise seed if the method draws none, of the prompts of that run."""
        if (own := self._cells.get((run, concept, label))) is not None or self.draws_noise(label):
            return own
        stand_in = self._cells.get((run._replace(noise_seed=self.main.noise_seed), concept, label))
        return None if stand_in is None else stand_in.of(self._prompts[run, concept])


def _means(weights: Floats, values: Floats) -> Floats:
    """Weighted means over prompts `(rows of weights, columns)`; scores that are NaN are left out."""
    known = np.isfinite(values)
    if known.all():
        return weights @ values
    with np.errstate(divide="ignore", invalid="ignore"):
        return (weights @ np.where(known, values, 0)) / (weights @ known.astype(np.float64))


def _drawn(sweep: _Sweep, start: _Sweep, weights: Floats, parts: Sequence[Any]) -> _Drawn:
    """Every statistic of one method, on all prompts and on resamples of them."""
    columns = np.hstack(list(sweep.scores.values()))
    n = len(sweep.strengths)
    means = _means(weights, columns)
    by_strength = {name: means[:, i * n : (i + 1) * n] for i, name in enumerate(sweep.scores)}
    halves_of = [_means(weights[:, part], sweep.scores["harmonic"][part]) for part in parts]
    picks = [np.nan_to_num(half, nan=-np.inf).argmax(1) for half in halves_of]
    chosen = {name: _at_picks(weights, sweep.scores[name], parts, picks) for name in ("concept", "fluency", "harmonic")}

    def whole(name: str) -> Floats:
        return np.hstack([_means(weights, start.scores[name]), by_strength[name]])

    concept, fluency, nll = whole("concept"), whole("fluency"), whole("nll_own")
    gained = concept_at_fluency(concept, -nll, -(nll[:, 0] + NATS)) - concept[:, 0]
    curve = {
        ("concept_at_fluency", _fluent(x)): concept_at_fluency(concept, fluency, x * fluency[:, 0]) for x in LEVELS
    }
    curve["pareto_area", Setting()] = pareto_area(concept, fluency)
    curve["concept_per_nat", Setting({"nll<": f"unsteered+{NATS:g}"})] = gained / NATS
    alphas = [sweep.strengths[pick[0]] for pick in picks]
    return _Drawn(sweep.strengths, by_strength, chosen, curve, (alphas[0], alphas[1]))


def _at_picks(weights: Floats, values: Floats, parts: Sequence[Any], picks: Sequence[Any]) -> Floats:
    """Mean score when each half of the prompts takes the strength that the other half picked, `(draws,)`."""
    top, bottom = np.zeros(len(weights)), np.zeros(len(weights))
    rows = np.arange(len(weights))
    for part, pick in zip(parts, reversed(picks), strict=True):
        known = np.isfinite(values[part])
        top += (weights[:, part] @ np.where(known, values[part], 0))[rows, pick]
        bottom += (weights[:, part] @ known.astype(np.float64))[rows, pick]
    with np.errstate(divide="ignore", invalid="ignore"):
        return top / bottom


def _fluent(share: float) -> Setting:
    return Setting({"fluency>": f"{share:.0%} of unsteered"})  # in files, fluency>=80% of unsteered


@dataclass(frozen=True)
class _Measure:
    """What methods are compared by.

    Attributes:
        metric: its name; the difference is `<metric>_diff`.
        setting: beside the options of a method.
        where: in words, if verdicts use it.
        every: whether every pair is compared, or only those with a reference.
    """

    metric: str
    setting: Setting
    where: str = ""
    every: bool = False

    def of(self, drawn: _Drawn) -> Floats:
        """Its draws."""
        return drawn.chosen[self.metric] if self.setting.get("alpha") else drawn.curve[self.metric, self.setting]


MEASURES = (
    _Measure("harmonic", Setting(alpha=CHOSEN), "at the strength chosen elsewhere", every=True),
    _Measure("concept_at_fluency", _fluent(LEVELS[0]), "at equal fluency", every=True),
    _Measure("concept_at_fluency", _fluent(LEVELS[1])),
    _Measure("pareto_area", Setting()),
    _Measure("concept_per_nat", Setting({"nll<": f"unsteered+{NATS:g}"})),
)


class _Rows:
    """Metrics in the making: their intervals are computed for many at once."""

    def __init__(self) -> None:
        self.done: list[Metric] = []
        self._waiting: list[tuple[tuple[str, str, Setting, str, str], Floats]] = []

    def add(self, model: str, task: str, setting: Setting, metric: str, draws: Floats, other: str = "") -> None:
        """A statistic by its draws, whose interval `flush` computes."""
        self._waiting.append(((model, task, setting, metric, other), draws))

    def plain(
        self, model: str, task: str, setting: Setting, metric: str, value: float, n: int, other: str = ""
    ) -> None:
        """A number without an interval."""
        self.done.append(Metric("steering", model, task, setting, metric, float(value), n=n, other=other))

    def flush(self, n: int) -> None:
        """Finish what is waiting, all of it statistics of `n` units."""
        if self._waiting:
            names, draws = zip(*self._waiting, strict=True)
            found = intervals(np.stack(draws, 1), n).T.tolist()
            for (model, task, setting, metric, other), (value, low, high) in zip(names, found, strict=True):
                if np.isfinite(value):
                    self.done.append(Metric("steering", model, task, setting, metric, value, low, high, n, other))
        self._waiting = []


class _Outcome(NamedTuple):
    """Who is ahead in one measure and run: 1, -1, or 0 where nobody clearly is."""

    measure: _Measure
    run: _Run
    sign: int


class _Analysis:
    def __init__(self, sweeps: _Sweeps, seed: int, resamples: int) -> None:
        self._sweeps, self._seed, self._resamples = sweeps, seed, resamples
        self._rows = _Rows()
        self._outcomes: dict[tuple[str, str, str], list[_Outcome]] = {}

    def done(self) -> tuple[list[Metric], Json]:
        sweeps = self._sweeps
        chosen: Json = {}
        for run in sweeps.runs:
            tasks, units = self._tasks(run)
            for task, drawn in tasks.items():
                if run == sweeps.main:
                    self._strengths(task, drawn)
                    self._rows.plain(UNSTEERED, task, Setting(), "units", units[task][0], units[task][0], "prompts")
                    if task == ALL:
                        self._rows.plain(
                            UNSTEERED, task, Setting(), "units", units[task][1], units[task][1], "concepts"
                        )
                    else:
                        chosen[task] = {label: list(drawn[label].alphas) for label in drawn if label != UNSTEERED}
                n = units[task][1]
                self._compared(task, drawn, run, n)
                self._rows.flush(n)
        verdicts = [self._verdict(*key, found) for key, found in self._outcomes.items()]
        return self._rows.done, {
            "chosen": chosen,
            "verdicts": verdicts,
            "main_run": sweeps.main._asdict(),
            "replicates": [run._asdict() for run in sweeps.runs if run != sweeps.main],
        }

    def _tasks(self, run: _Run) -> tuple[dict[str, Drawn], dict[str, tuple[int, int]]]:
        """Statistics by task and method, and by task the numbers of prompts and of independent units."""
        tasks: dict[str, Drawn] = {}
        units: dict[str, tuple[int, int]] = {}
        seeds = {concept: i for i, concept in enumerate(sorted(self._sweeps.concepts))}  # whatever the order of rows
        for concept in self._sweeps.concepts:
            if not any(self._sweeps.has(run, concept, label) for label in self._sweeps.methods):
                continue
            start = self._sweeps.find(run, concept, UNSTEERED)
            if start is None:
                continue  # nothing to compare with: the verdicts say that this run is missing
            n = len(start.prompts)
            weights = resampling(n, resamples=self._resamples, seed=[self._seed, seeds[concept]])
            parts = halves(n, self._seed)
            found = {label: self._sweeps.find(run, concept, label) for label in self._sweeps.settings}
            tasks[concept] = {
                label: self._checked(label, concept, sweep, start, weights, parts)
                for label, sweep in found.items()
                if sweep is not None
            }
            units[concept] = n, n
        if len(tasks) > 1:
            groups = GroupResampling(len(tasks), resamples=self._resamples, seed=self._seed)
            every = [label for label in self._sweeps.settings if all(label in drawn for drawn in tasks.values())]
            pooled = {label: _pooled([tasks[concept][label] for concept in sorted(tasks)], groups) for label in every}
            units[ALL] = sum(n for n, _ in units.values()), len(tasks)
            tasks[ALL] = pooled
        return tasks, units

    @staticmethod
    def _checked(
        label: str, concept: str, sweep: _Sweep, start: _Sweep, weights: Floats, parts: Sequence[Any]
    ) -> _Drawn:
        if sweep.prompts != start.prompts:
            raise InputError(
                f"{label}, {concept}: {len(sweep.prompts)} prompts where {UNSTEERED} has {len(start.prompts)}, or "
                "others: differences are paired, so finish the run"
            )
        return _drawn(sweep, start, weights, parts)

    def _strengths(self, task: str, drawn: Drawn) -> None:
        """Means at each strength, and what changed against no steering and against random directions."""
        controls = [label for label in drawn if _is_control(label)]
        for label, own in drawn.items():
            for j, alpha in enumerate(own.strengths):
                setting = Setting(alpha=alpha) | self._sweeps.settings[label]
                for name, draws in own.by_strength.items():
                    self._rows.add(label, task, setting, name, draws[:, j])
                for other in [] if label == UNSTEERED else [UNSTEERED, *controls]:
                    at = 0.0 if other == UNSTEERED else alpha
                    if other == label or at not in drawn[other].strengths:
                        continue
                    k = drawn[other].strengths.index(at)
                    for name in ("concept", "harmonic"):
                        change = own.by_strength[name][:, j] - drawn[other].by_strength[name][:, k]
                        self._rows.add(label, task, setting, f"{name}_minus", change, other)

    def _compared(self, task: str, drawn: Drawn, run: _Run, n: int) -> None:
        """Scores at chosen strengths and of whole sweeps, and their paired differences."""
        suffix = Setting() if run == self._sweeps.main else run.setting
        for label, own in drawn.items():
            if label == UNSTEERED:
                continue
            options = self._sweeps.settings[label] | suffix
            for name, draws in own.chosen.items():
                self._rows.add(label, task, Setting(alpha=CHOSEN) | options, name, draws)
            for (name, setting), draws in own.curve.items():
                self._rows.add(label, task, setting | options, name, draws)
        # Those that others are compared with stand last, so that each pair is given once.
        last = [label for label in (*reversed(REFERENCES), UNSTEERED) if label in drawn]
        order = [label for label in drawn if label not in last] + last
        for measure in MEASURES:
            for a, b in combinations(order, 2):
                if not (b in REFERENCES or measure.every) or (b == UNSTEERED and not measure.setting.get("alpha")):
                    continue
                setting = measure.setting | self._sweeps.settings[a] | suffix
                gap = measure.of(drawn[a]) - measure.of(drawn[b])
                self._rows.add(a, task, setting, f"{measure.metric}_diff", gap, b)
            for reference in REFERENCES if measure.where else ():
                if reference in drawn:
                    self._against(task, drawn, measure, reference, run, n)

    def _against(self, task: str, drawn: Drawn, measure: _Measure, other: str, run: _Run, n: int) -> None:
        """The tests that verdicts rest on, of all methods against one."""
        labels = [label for label in drawn if label not in (UNSTEERED, other) and not _is_control(label)]
        if not labels:
            return
        base = measure.of(drawn[other])
        draws = np.stack([measure.of(drawn[label]) - base for label in labels], 1)
        _, low, high = intervals(draws, n)
        adjusted = holm(p_values(draws, n))
        alone = smallest_visible(draws, n)
        strict = smallest_visible(draws, n, comparisons=len(labels))
        for i, label in enumerate(labels):
            main = run == self._sweeps.main
            setting = measure.setting | self._sweeps.settings[label] | (Setting() if main else run.setting)
            self._rows.plain(label, task, setting, "p_holm", adjusted[i], n, other)
            if main:
                self._rows.plain(label, task, setting, "smallest_visible", alone[i], n, other)
                self._rows.plain(label, task, setting, "smallest_visible_holm", strict[i], n, other)
            if not self._ran(run, task, label):
                continue  # it drew no noise, so that another seed says nothing new
            sign = 0 if not adjusted[i] <= 0.05 else int(low[i] > 0) - int(high[i] < 0)
            self._outcomes.setdefault((task, label, other), []).append(_Outcome(measure, run, sign))

    def _ran(self, run: _Run, task: str, label: str) -> bool:
        """Whether the method has texts of its own there."""
        concepts = self._sweeps.concepts if task == ALL else [task]
        return any(self._sweeps.has(run, concept, label) for concept in concepts)

    def _verdict(self, task: str, label: str, other: str, found: list[_Outcome]) -> Json:
        """One verdict, as metrics and in words."""
        runs = {outcome.run for outcome in found}
        missing = [f"no run in {dtype}" for dtype in NUMBER_FORMATS if dtype not in {run.lm_dtype for run in runs}]
        if self._sweeps.draws_noise(label) and len({run.noise_seed for run in runs}) < SEEDS:
            missing.append("no second noise seed")
        signs = [outcome.sign for outcome in found]
        sign = 1 if signs.count(1) >= signs.count(-1) else -1
        met, conditions = signs.count(sign), len(found) + len(missing)
        value = sign if met == conditions else 0
        setting = self._sweeps.settings[label]
        self._rows.plain(label, task, setting, "verdict", value, conditions, other)
        self._rows.plain(label, task, setting, "conditions_met", met, conditions, other)
        words = {1: "ahead", -1: "behind", 0: "not told apart"}
        if value:
            reasons = []
        elif not met:
            reasons = ["no clear difference anywhere", *missing]
        elif 2 * met < len(found):
            where = [self._place(o) for o in found if o.sign == sign]
            reasons = [f"{words[sign]} only {', '.join(where)}", *missing]
        else:
            reasons = [*(f"{words[o.sign]} {self._place(o)}" for o in found if o.sign != sign), *missing]
        return {"task": task, "method": label, "other": other, "verdict": words[value], "reason": "; ".join(reasons)}

    def _place(self, outcome: _Outcome) -> str:
        if outcome.run == self._sweeps.main:
            return outcome.measure.where
        return f"{outcome.measure.where} (noise seed {outcome.run.noise_seed}, {outcome.run.lm_dtype})"


def _is_control(label: str) -> bool:
    return label in CONTROLS_AT_RANDOM


def _pooled(drawn: Sequence[_Drawn], groups: GroupResampling) -> _Drawn:
    """Means over concepts; those at single strengths only if all concepts have the same."""

    def mean(values: Iterable[Floats]) -> Floats:
        return groups.mean(np.stack(list(values)))

    first = drawn[0]
    alike = all(own.strengths == first.strengths for own in drawn)
    return _Drawn(
        first.strengths if alike else (),
        {name: mean(own.by_strength[name] for own in drawn) for name in first.by_strength if alike},
        {name: mean(own.chosen[name] for own in drawn) for name in first.chosen},
        {key: mean(own.curve[key] for own in drawn) for key in first.curve},
    )


def _examples(frame: pd.DataFrame, main: _Run) -> list[Json]:
    """The first prompt's texts of each concept, without those of random directions."""
    dtype = frame["lm_dtype"].astype(str).str.removeprefix("torch.")
    own = frame[(frame["noise_seed"] == main.noise_seed) & (dtype == main.lm_dtype)]
    own = own[~own["method"].map(_is_control)]
    own = own[own["prompt_index"] == own.groupby("concept", observed=True)["prompt_index"].transform("min")]
    return [
        {"task": row.concept, "model": row.method, "alpha": float(row.strength), "prompt": row.prompt, "text": row.text,
         "concept": round(float(row.score_concept), 3), "fluency": round(float(row.score_fluency), 3)}
        for row in own.itertuples()
    ]  # fmt: skip
