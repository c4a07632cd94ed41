"""The steering suite: whether repairing a steered activation keeps the concept and restores fluency."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import corpus, directions, lm, provenance
from glp_lens.arguments import checked
from glp_lens.directions import Direction
from glp_lens.errors import InputError, counted
from glp_lens.evals.cache import Records, ResultCache
from glp_lens.evals.entries import Entry, usable
from glp_lens.evals.results import Results, Setting
from glp_lens.evals.steering import concepts, experiments
from glp_lens.evals.steering.analysis import analyse
from glp_lens.evals.steering.concepts import Concept
from glp_lens.evals.steering.experiments import Task
from glp_lens.evals.steering.fluency import FluencyJudge, human_continuations, make_judge
from glp_lens.evals.steering.generate import BATCH_ROWS, Generation, Method, Wanted, generate
from glp_lens.evals.steering.hosted import HostedJudge
from glp_lens.evals.steering.judges import ADMISSION_WORDS, SentenceEmbedder, fit_judges
from glp_lens.evals.steering.personas import PERSONAS, QUESTIONS
from glp_lens.evals.steering.second_model import SecondModel
from glp_lens.evals.steering.settings import (
    ALL,
    CLIP_QUANTILE,
    CLIPPED,
    CONTROLS,
    COVARIANCE,
    GRID,
    ISOTROPIC,
    NORM,
    PLAIN,
    PROMPTS,
    SHRINK,
    SHRINK_FACTOR,
    SHUFFLED,
    UNSTEERED,
    SteeringSettings,
)
from glp_lens.interface import Projector
from glp_lens.types import Json

_SEARCH_PROMPTS = 12
SEARCHED = tuple(0.1 * 2 ** (k / 2) for k in range(13))
"""Strengths that the search tries: 0.1 to 6.4 units, each 1.41 times the one before."""
_SCORED = 2048
"""Texts that are scored at once, before their scores are kept."""
_HUMAN_TEXTS = 400
"""Texts, the last ones, that the hosted judge is checked on."""


@dataclass(frozen=True, eq=False)
class SteeringData:
    """What steering is measured on.

    Attributes:
        model: a HookedTransformer or TransformerBridge.
        hook: the hook point to steer at, the one the entries were trained on.
        rows: activations there `(n, d_in)`, a few thousand from the training store (`store.sample(8192, seed=0)`).
            Their spread is the unit of strengths, and the random controls are drawn from them.
        tasks: your own concepts and directions instead of those of the settings.
        prompts: your own prompts, at least two, instead of the packaged ones.
        fluency_texts: texts for the fluency judge, the packaged corpus by default; the last ones validate it.
        embedder: the sentence model of the concept judge, loaded by default.
        heldout_texts: documents by which the experiment 'features' chooses latents, by default the packaged held-out
            ones.
        others: opens the same language model in other number formats, by their names (`settings.dtypes`).
    """

    model: lm.Model
    hook: str
    rows: Tensor
    tasks: Sequence[Task] | None = None
    prompts: Sequence[str] | None = None
    fluency_texts: Sequence[str] | None = None
    embedder: SentenceEmbedder | None = None
    heldout_texts: Sequence[str] | None = None
    others: Mapping[str, Callable[[], lm.Model]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be steered."""
        if self.rows.ndim != 2 or len(self.rows) < 2 or not torch.isfinite(self.rows).all():
            raise InputError(
                f"rows must be finite activations (n, d_in), two at least, got shape {tuple(self.rows.shape)}: pass "
                "store.sample(8192, seed=0)"
            )
        if self.prompts is not None and (len(self.prompts) < 2 or not all(text.strip() for text in self.prompts)):
            raise InputError("steering needs at least two prompts that are not empty: they are split in halves")

    @property
    def centre(self) -> Tensor:
        """Mean of the activations, `(d_in,)` float32."""
        return self.rows.double().mean(0).float()

    def unit(self, kind: str) -> float:
        """Length of what a strength of 1 adds: a median `centred` norm of the activations, or a median `norm`."""
        rows = self.rows.double()
        return float((rows - rows.mean(0) if kind == "centred" else rows).norm(dim=1).median())


@checked
def run(
    entries: Sequence[Entry],
    data: SteeringData,
    settings: SteeringSettings | None = None,
    *,
    folder: Any = None,
    allow_mismatch: bool = False,
) -> Results:
    """Steer generations towards concepts, plain and repaired by each entry, and score concept and fluency.

    Methods are `unsteered`, `plain`, one for each entry under its label, and the controls of the settings: `shrink`
    (plain at 0.8 of each strength, the null that a repair must beat), `norm-preserving`, `clipped`, and three kinds of
    random directions of equal length. Concept and fluency run from 0 to 2 (see `judges` and `fluency`); `harmonic`
    is their harmonic mean in each text. Numbers are made of the scores by `analysis.analyse`, which says what they are.

    `tables["generations"]` holds every text with its scores, `extras` chosen strengths, verdicts and a few examples.

    Args:
        entries: models with the `Projector` capability; others are noted in `failures`. Options are those of
            `hooks.steer` and of the model's `project`, for example `{"sigma": 0.6, "repair": "difference"}`.
        data: the language model, where to steer, and your own concepts and texts, if any.
        settings: by default `SteeringSettings()`.
        folder: where directions, generations and scores are kept, each under a hash of all its inputs, so that a later
            or interrupted run continues, text by text; nothing is kept without it.
        allow_mismatch: use models trained at another hook point, or on another language model or weight
            processing; each is noted in `failures`.

    Raises:
        InputError: labels that repeat, an entry trained elsewhere, or a concept that cannot be judged.
    """
    began = time.monotonic()
    settings, model, hook = settings or SteeringSettings(), data.model, data.hook
    if missing := [name for name in settings.dtypes if name not in data.others and name != _dtype(model)]:
        raise InputError(
            f"the language model cannot be opened again as {', '.join(missing)}: pass others= that open it"
        )
    notes = provenance.check_edit(model, hook, allow_mismatch=allow_mismatch)
    here = provenance.here(model, hook)
    able, accepted = usable(
        entries,
        Projector,
        lambda _: here,
        reserved=(UNSTEERED, PLAIN, *CONTROLS),
        left_out="{label} cannot project activations: left out of steering",
        allow_mismatch=allow_mismatch,
    )
    embedder = data.embedder or SentenceEmbedder.load()
    cache = ResultCache(folder, lambda: here)
    judging = ResultCache(folder, lambda: [here, embedder.identity, settings.seed])
    # What cannot judge is refused before the work.
    if settings.fluency_judge == "lm" or settings.second_model:
        SecondModel.open(settings.second_model, steered=model, dtype=settings.second_dtype)
    hosted = HostedJudge(settings, None if folder is None else Path(folder) / "hosted") if settings.hosted_url else None
    made = _tasks(entries, data, settings, judging if settings.experiment == "features" else cache, embedder)
    names = [task.concept.name for task in made]
    if len({*names, ALL}) <= len(names):
        raise InputError(f"concepts must have different names, none of them {ALL!r}, got {', '.join(names)}")
    tasks, judges, refused = _judged(made, settings, embedder, judging)
    sets = {task.concept.name: _prompts(model, task, data, settings) for task in tasks}
    texts = _Texts(data, settings, cache, allow_mismatch)
    unsteered = Method(UNSTEERED, (0.0,))
    still = {
        p: text for each in sets.values() for p, text in zip(each.texts, texts.still(unsteered, each), strict=True)
    }
    fluency = make_judge(
        list(still), list(still.values()), embedder=embedder, kind=settings.fluency_judge,
        model=settings.second_model, dtype=settings.second_dtype, steered=model, texts=data.fluency_texts,
        tokens=settings.fluency_tokens, seed=settings.seed, cache=judging,
    )  # fmt: skip
    unit = data.unit(settings.strength_unit)
    halving, strengths = None, settings.strengths
    if not strengths:
        halving = texts.halving(tasks, sets, unit, fluency)
        if not SEARCHED[0] < halving < SEARCHED[-1]:
            refused.append(
                f"fluency does not halve between the strengths {SEARCHED[0]:g} and {SEARCHED[-1]:g} that the search "
                f"tries: those used follow from {halving:g}; choose them by --strengths"
            )
        strengths = tuple(float(f"{share * halving:.2g}") for share in GRID)
    results = Results(
        "steering",
        config={
            **settings.to_json(), "concepts": [task.concept.name for task in tasks], "hook": hook,
            "strengths": list(strengths), "unit": unit, "fluency_halves_at": halving,
            "prompts": {name: list(each.texts) for name, each in sets.items()},
            "entries": {e.label: str(e.setting) for e in entries},
        },
        data={
            "model": here["model"],
            "directions": {task.concept.name: task.direction.provenance for task in tasks},
            "models": {e.label: e.model.provenance for e in entries},
            "fluency_judge": fluency.identity(),
        },
        failures=notes + accepted + refused,
    )  # fmt: skip
    if hosted is not None:
        _check_hosted(hosted, tasks, still, data, settings, results)
    methods = {
        task.concept.name: [unsteered, *_methods(able, task, data, unit, strengths, settings, cache)] for task in tasks
    }
    results.failures += _remarks(fluency, settings, methods)
    frame = texts.generate(tasks, sets, methods)
    frame = _scored(frame, judges, fluency, judging)
    if hosted is not None:
        frame = _hosted(frame, hosted, tasks, results)
    for label, own in frame.groupby("method", sort=False):
        if short := int(own.distinct_2.isna().sum()):
            results.failures.append(f"{label}: fluency 0 for {counted(short, 'text')} under two tokens long")
    _add_judges(judges, fluency, frame, results)
    metrics, extras = analyse(frame, seed=settings.seed)
    results.metrics += metrics
    results.extras |= extras
    results.tables["generations"] = frame
    results.seconds = time.monotonic() - began
    return results


# -- concepts, prompts and methods -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prompts:
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


def _tasks(
    entries: Sequence[Entry],
    data: SteeringData,
    settings: SteeringSettings,
    cache: ResultCache,
    embedder: SentenceEmbedder,
) -> list[Task]:
    """Concepts and directions, which are kept one by one."""
    if data.tasks is not None:
        return list(data.tasks)
    kind = settings.experiment
    sae: Any = next((entry.model for entry in entries if entry.model.kind == "sae"), None)
    own: dict[str, Json] = {
        "features": {"n_features": settings.features, "texts": data.heldout_texts},
        "persona": {"prompts": experiments.MOST_QUESTIONS},
    }
    options = own.get(kind, {"texts_per_side": settings.texts_per_side})

    def make(names: Sequence[str] | None) -> list[Json]:
        made = experiments.tasks(
            kind, data.model, data.hook, names=names, sae=sae, embed=embedder, seed=settings.seed, **options
        )
        return [task.to_json() for task in made]

    def inputs(names: Sequence[str] | None) -> list[Any]:
        used: Any = sae.fingerprint() if kind == "features" and sae is not None else None
        if kind == "persona":
            used = [vars(PERSONAS[name]) for name in names or ()], QUESTIONS, lm.tokenizer_of(data.model).chat_template
        return [kind, names, data.hook, settings.seed, options, used]

    names = _names(settings)
    tasks: list[Task] = []
    for each in [None] if names is None else [[name] for name in names]:
        tasks += cache.get(
            f"task-{each[0] if each else kind}",
            partial(inputs, each),
            partial(make, each),
            lambda values: [Task.from_json(value) for value in values],
        )
    return tasks


def _names(settings: SteeringSettings) -> Sequence[str] | None:
    """The concepts of an experiment that has names for them."""
    if settings.experiment == "features":
        return None
    every: dict[str, tuple[str, ...]] = {
        "topics": concepts.TOPICS, "sentiment": concepts.SENTIMENT, "persona": tuple(PERSONAS),
    }  # fmt: skip
    if not settings.concepts:
        return ("sports",) if settings.experiment == "topics" else every[settings.experiment]
    return every[settings.experiment] if settings.concepts == ("all",) else settings.concepts


class _ConceptJudges:
    """The two judges of one concept, which are fitted when first asked, and their AUROCs, which are kept.

    Raises:
        InputError: the concept cannot be judged.
    """

    def __init__(self, concept: Concept, embedder: SentenceEmbedder, seed: int, cache: ResultCache) -> None:
        self.concept = concept
        self._fit = functools.cache(lambda: fit_judges(concept, embedder, seed=seed))

        def read(value: Any) -> dict[str, tuple[float, int]]:
            return {str(name): (float(auroc), int(n)) for name, (auroc, n) in value.items()}

        self.checks = cache.get(
            f"judges-{concept.name}",
            lambda: [list(concept.judge_texts), list(concept.judge_labels), seed],
            lambda: {judge.name: [judge.auroc, judge.n] for judge in self._fit()},
            read,
        )

    def scores(self, texts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Columns of scores, one a judge."""
        first, second = self._fit()
        return {"score_concept": first.score(texts), "score_concept_tfidf": second.score(texts)}


def _judged(
    tasks: Sequence[Task], settings: SteeringSettings, embedder: SentenceEmbedder, cache: ResultCache
) -> tuple[list[Task], dict[str, _ConceptJudges], list[str]]:
    """Tasks with their judges, and notes on those that cannot be judged, where all were asked for and not these."""
    judges: dict[str, _ConceptJudges] = {}
    notes: list[str] = []
    named = settings.experiment == "topics" if not settings.concepts else settings.concepts != ("all",)
    for task in tasks:
        try:
            judges[task.concept.name] = _ConceptJudges(task.concept, embedder, settings.seed, cache)
        except InputError as error:
            if named:
                raise
            notes.append(str(error))
    if not judges:
        raise InputError("no concept can be judged: " + "; ".join(notes))
    return [task for task in tasks if task.concept.name in judges], judges, notes


def _prompts(model: lm.Model, task: Task, data: SteeringData, settings: SteeringSettings) -> _Prompts:
    texts = task.prompts or data.prompts or PROMPTS[: settings.prompts]
    if task.prompts is not None:
        texts = texts[: settings.prompts]
    return _Prompts(tuple(texts), tuple(map(tuple, lm.to_ids(model, texts, max_length=1024))))


def _methods(
    entries: Sequence[Entry],
    task: Task,
    data: SteeringData,
    unit: float,
    strengths: tuple[float, ...],
    settings: SteeringSettings,
    cache: ResultCache,
) -> list[Method]:
    """All ways of steering towards a concept, but for none at all."""
    towards = unit * task.direction.vector
    centre = data.centre
    longest = float(torch.quantile((data.rows - centre).norm(dim=1), CLIP_QUANTILE))
    isotropic = directions.random_isotropic(len(towards), data.hook, seed=settings.seed)
    covariance = directions.random_covariance(data.rows, hook=data.hook, seed=settings.seed)
    controls: dict[str, Callable[[], Method]] = {
        SHRINK: lambda: Method(SHRINK, strengths, towards, factor=SHRINK_FACTOR),
        NORM: lambda: Method(NORM, strengths, towards, options={"renormalize": "before", "centre": centre}),
        CLIPPED: lambda: Method(CLIPPED, strengths, towards, options={"renormalize": longest, "centre": centre}),
        ISOTROPIC: lambda: Method(ISOTROPIC, strengths, unit * isotropic.vector),
        COVARIANCE: lambda: Method(COVARIANCE, strengths, unit * covariance.vector),
        SHUFFLED: lambda: Method(SHUFFLED, strengths, unit * _shuffled(task, data, settings, cache)),
    }
    methods = [Method(PLAIN, strengths, towards)]
    methods += [Method(entry.label, strengths, towards, entry) for entry in entries]
    methods += [make() for name, make in controls.items() if name in settings.controls]
    if settings.guidance:
        methods += [
            Method(f"{entry.label} {what}", settings.guidance, None, entry, guide=guide, identity=identity)
            for entry in entries
            if entry.model.kind == "glp" and entry.options.get("repair", "project") == "project"
            for what, guide, identity in _guides(entry.model, task, data, settings, cache)
        ]
    return methods


def _sides(task: Task, settings: SteeringSettings) -> tuple[list[str], list[str]]:
    """Texts of the direction, as many of each side as the settings say."""
    n = settings.texts_per_side
    return list(task.concept.positive[:n]), list(task.concept.negative[:n])


def _remarks(
    fluency: FluencyJudge, settings: SteeringSettings, methods: Mapping[str, Sequence[Method]]
) -> Iterator[str]:
    """What the run does otherwise than it was asked to."""
    if fluency.note:
        yield fluency.note
    if settings.guidance and not any(method.guide for own in methods.values() for method in own):
        yield "no model here can be guided: guidance needs a GLP with the repair 'paper' or 'project'"


def _shuffled(task: Task, data: SteeringData, settings: SteeringSettings, cache: ResultCache) -> Tensor:
    """The direction of the same texts under shuffled labels; of a concept without texts, a random one."""
    if task.shuffled is not None:
        return task.shuffled.vector
    sides, d = _sides(task, settings), data.rows.shape[1]
    if not all(sides):
        return directions.random_covariance(data.rows, hook=data.hook, seed=settings.seed + 1).vector
    return cache.get(
        f"random-labels-{task.concept.name}",
        lambda: [*sides, settings.seed, data.hook],
        lambda: _listed(directions.random_labels(data.model, *sides, data.hook, seed=settings.seed, held_out=0)),
        lambda values: Direction.of(torch.tensor(values).reshape(d), data.hook, name=SHUFFLED, method="mean").vector,
    )


def _guides(
    prior: Any, task: Task, data: SteeringData, settings: SteeringSettings, cache: ResultCache
) -> Iterator[tuple[str, Callable[[float], Json], Any]]:
    """Ways to lead a GLP's projection towards a concept at a scale, with what each depends on.

    By the gradient of the log-probability of a logistic probe of the direction's texts; and of priors that know the
    concept as a class (`settings.classes`), by that condition with classifier-free guidance.
    """
    concept, centre, sides = task.concept, data.centre, _sides(task, settings)
    weights = cache.get(
        f"probe-{concept.name}",
        lambda: [*sides, settings.seed, data.hook],
        lambda: _listed(
            directions.from_texts(
                data.model, *sides, data.hook, method="probe", name=concept.name, seed=settings.seed, held_out=0
            )
        ),
        lambda values: torch.tensor(values, dtype=torch.float32).reshape(len(centre)),
    )

    def score(x: Tensor) -> Tensor:
        """Log-probability of the class, taken as even for the mean activation."""
        logits: Tensor = (x - centre.to(x)) @ weights.to(x)
        return torch.nn.functional.logsigmoid(logits)

    yield "classifier", lambda scale: {"classifier": score, "classifier_scale": scale}, [weights, centre]
    classes = dict(pair.split("=", 1) for pair in settings.classes)
    if concept.name in classes and prior.class_vectors:
        value = float(classes[concept.name])
        if value not in prior.class_vectors:
            known = ", ".join(f"{each:g}" for each in sorted(prior.class_vectors))
            raise InputError(f"the prior knows the classes {known}, got {concept.name}={value:g} in --classes")
        vector = prior.class_vectors[value]
        yield "condition", lambda scale: {"condition": vector, "guidance": scale}, [value]


def _listed(direction: Direction) -> list[float]:
    """The vector at its own length, as numbers."""
    values: list[float] = (direction.norm * direction.vector.double()).tolist()
    return values


# -- generation ------------------------------------------------------------------------------------------------


class _Texts:
    """Generates what is not kept yet."""

    def __init__(
        self, data: SteeringData, settings: SteeringSettings, cache: ResultCache, allow_mismatch: bool
    ) -> None:
        self.data, self.settings, self.cache, self.allow_mismatch = data, settings, cache, allow_mismatch
        self.main = _dtype(data.model)
        self._opened = {self.main: data.model}
        self._records: dict[Any, Records] = {}

    def still(self, method: Method, prompts: _Prompts) -> list[str]:
        """Unsteered continuations."""
        wanted = [(i, 0.0) for i in range(len(prompts.texts))]
        made = self._of("", method, prompts, wanted, self.settings.noise_seeds[0], self.main)
        return [lm.decode(self.data.model, made[pair].ids) for pair in wanted]

    def halving(self, tasks: Sequence[Task], sets: Mapping[str, _Prompts], unit: float, fluency: FluencyJudge) -> float:
        """The strength at which plain steering has half of the unsteered fluency, on average over all tasks.

        Between two strengths tried it is interpolated, fluency being taken as linear in the logarithm of strength.
        """
        values: list[NDArray[np.float64]] = []
        start: list[NDArray[np.float64]] = []
        for task in tasks:
            prompts = sets[task.concept.name]
            some = range(min(_SEARCH_PROMPTS, len(prompts.texts)))
            for strengths in ((0.0,), SEARCHED):
                label, push = (PLAIN, unit * task.direction.vector) if strengths[0] else (UNSTEERED, None)
                method = Method(label, strengths, push)
                wanted = [(i, alpha) for i in some for alpha in strengths]
                made = self._of(task.concept.name, method, prompts, wanted, self.settings.noise_seeds[0], self.main)
                texts = [lm.decode(self.data.model, made[pair].ids) for pair in wanted]
                scores = self._fluency(fluency, [prompts.texts[i] for i, _ in wanted], texts)
                (values if strengths[0] else start).append(scores.reshape(len(some), -1).mean(0))
        return halving_strength(SEARCHED, np.mean(values, axis=0), float(np.mean(start)))

    def _fluency(self, judge: FluencyJudge, prompts: list[str], texts: list[str]) -> NDArray[np.float64]:
        return self.cache.get(
            "search",
            lambda: [prompts, texts, judge.identity()],
            lambda: list(map(float, judge.measure(prompts, texts)["fluency"])),
            lambda values: np.asarray(values, dtype=np.float64).reshape(len(texts)),
        )

    def generate(
        self, tasks: Sequence[Task], sets: Mapping[str, _Prompts], methods: Mapping[str, Sequence[Method]]
    ) -> pd.DataFrame:
        """One row a text: first the whole comparison, then what is repeated with other seeds and number formats."""
        rows: list[Json] = []
        first, fewer = (self.settings.noise_seeds[0], self.main), self.settings.replicate_prompts
        plan = []
        for task, method, seed, dtype in self._plan(tasks, methods):
            n = len(sets[task.concept.name].texts)
            plan.append((task, method, seed, dtype, n if (seed, dtype) == first else min(n, fewer or n)))
        total = sum(n * len(method.strengths) for _, method, _, _, n in plan)
        with tqdm(total=total, desc="steering", unit="text", mininterval=2) as bar:
            for task, method, seed, dtype, n in plan:
                name, prompts = task.concept.name, sets[task.concept.name]
                wanted = [(i, alpha) for i in range(n) for alpha in method.strengths]
                bar.set_postfix_str(f"{name}: {method.label}", refresh=False)
                made = self._of(name, method, prompts, wanted, seed, dtype, bar)
                rows += [
                    {
                        "experiment": self.settings.experiment, "concept": name, "method": method.label,
                        "setting": str(method.setting), "stochastic": method.stochastic, "strength": alpha,
                        "prompt": prompts.texts[i], "prompt_index": i,
                        "text": lm.decode(self.data.model, made[i, alpha].ids),
                        "noise_seed": seed, "lm_dtype": dtype, "nll_own": made[i, alpha].nll_own,
                    }
                    for i, alpha in wanted
                ]  # fmt: skip
        return pd.DataFrame(rows)

    def _plan(
        self, tasks: Sequence[Task], methods: Mapping[str, Sequence[Method]]
    ) -> Iterator[tuple[Task, Method, int, str]]:
        """Which texts, in order.

        First the whole comparison in the language model's own number format with the first seed; then other seeds of
        what draws noise; then the first seed in other number formats, without random directions.
        """
        first, *seeds = self.settings.noise_seeds
        others = [dtype for dtype in self.settings.dtypes if dtype != self.main]
        left_out = {ISOTROPIC, COVARIANCE, SHUFFLED}
        for seed, dtype in [(first, self.main), *((s, self.main) for s in seeds), *((first, d) for d in others)]:
            for task in tasks:
                for method in methods[task.concept.name]:
                    if (method.stochastic or seed == first) and (dtype == self.main or method.label not in left_out):
                        yield task, method, seed, dtype

    def _of(
        self,
        concept: str,
        method: Method,
        prompts: _Prompts,
        wanted: Sequence[Wanted],
        seed: int,
        dtype: str,
        bar: tqdm[Any] | None = None,
    ) -> dict[Wanted, Generation]:
        """The wanted texts, of which those that are not kept are generated."""
        own = method.label if method.direction is None and method.entry is None else f"{concept}-{method.label}"
        new_tokens, hook = self.settings.new_tokens, self.data.hook

        def inputs() -> list[Any]:
            return [method.inputs(), new_tokens, seed if method.stochastic else None, dtype, hook]

        key = (own, seed, dtype)
        if key not in self._records:
            self._records[key] = self.cache.records(f"texts-{own}", inputs)
        records = self._records[key]
        names = {pair: f"{pair[1]:g} {prompts.texts[pair[0]]}" for pair in wanted}
        made: dict[Wanted, Generation] = {}
        for pair, name in names.items():
            if (kept := _generation(records.values.get(name), new_tokens)) is not None:
                made[pair] = kept
        missing = [pair for pair in wanted if pair not in made]
        if bar is not None:
            bar.update(len(wanted) - len(missing))
        if not missing:
            return made
        for batch in generate(
            self._model(dtype), method, prompts.ids, missing, hook=hook, keys=prompts.texts, new_tokens=new_tokens,
            seed=seed, batch_rows=BATCH_ROWS, allow_mismatch=self.allow_mismatch,
        ):  # fmt: skip
            records.add({names[pair]: [value.ids, value.nll_own] for pair, value in batch.items()})
            made |= batch
            if bar is not None:
                bar.update(len(batch))
        return made

    def _model(self, dtype: str) -> lm.Model:
        """The language model in a number format; besides its own only one at a time is kept."""
        if dtype not in self._opened:
            self._opened = {self.main: self.data.model, dtype: self.data.others[dtype]()}
        return self._opened[dtype]


def halving_strength(strengths: Sequence[float], fluency: Sequence[float], unsteered: float) -> float:
    """The strength at which fluency first falls below half of the unsteered, between the strengths tried.

    It is interpolated in the logarithm of strength; outside of the strengths it is the last or the first one.
    """
    half, last = unsteered / 2, (0.0, unsteered)
    for strength, value in zip(strengths, fluency, strict=True):
        if value <= half:
            before, above = last
            if not before:
                return strength
            share = (above - half) / (above - value)
            return float(before * (strength / before) ** share)
        last = (strength, value)
    return strengths[-1]


def _generation(value: Any, new_tokens: int) -> Generation | None:
    """What was kept of a text, if it is one."""
    match value:
        case [list(ids), int() | float() as nll] if len(ids) == new_tokens and all(type(i) is int for i in ids):
            return Generation(ids, float(nll))
    return None


def _dtype(model: lm.Model) -> str:
    return str(next(iter(model.parameters())).dtype).removeprefix("torch.")


# -- scores ----------------------------------------------------------------------------------------------------


def _scored(
    frame: pd.DataFrame,
    judges: Mapping[str, _ConceptJudges],
    fluency: FluencyJudge,
    cache: ResultCache,
) -> pd.DataFrame:
    """The texts with their scores, which are kept by concept, prompt and text."""
    parts = []
    with tqdm(total=len(frame), desc="judging", unit="text", mininterval=2) as bar:
        for concept, own in frame.groupby("concept", sort=False):
            judge = judges[str(concept)]
            about = judge.concept
            kept = cache.records(
                f"scores-{concept}",
                lambda about=about: [fluency.identity(), list(about.judge_texts), list(about.judge_labels)],  # type: ignore[misc]
            )
            keys = [json.dumps(pair) for pair in zip(own.prompt, own.text, strict=True)]
            missing = [key for key in dict.fromkeys(keys) if not isinstance(kept.values.get(key), dict)]
            bar.update(len(keys) - len(missing))
            for start in range(0, len(missing), _SCORED):
                some = missing[start : start + _SCORED]
                prompts, texts = map(list, zip(*map(json.loads, some), strict=True))
                scores = judge.scores(texts) | fluency.measure(prompts, texts)
                scores["score_fluency"] = scores.pop("fluency")
                columns = {name: values.tolist() for name, values in scores.items()}
                rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
                kept.add(dict(zip(some, rows, strict=True)))
                bar.update(len(some))
            found = pd.DataFrame([kept.values[key] for key in keys], index=own.index).astype(np.float64)
            parts.append(pd.concat([own, found], axis=1))
    return pd.concat(parts, ignore_index=True)


def _check_hosted(
    judge: HostedJudge,
    tasks: Sequence[Task],
    still: Mapping[str, str],
    data: SteeringData,
    settings: SteeringSettings,
    results: Results,
) -> None:
    """Ask the hosted judge about labelled texts, which it has to get right.

    Raises:
        InputError: it does not, or it cannot be asked.
    """
    texts = data.fluency_texts or [document.text for document in corpus.packaged(settings.seed)]
    human = human_continuations(texts[-_HUMAN_TEXTS:], list(still), list(still.values()))
    for task in tasks:
        if not task.concept.about:
            results.failures.append(f"{task.concept.name} has no words for a hosted judge: not asked about the concept")
            continue
        for name, value in judge.check(task.concept, human, about=task.concept.about, seed=settings.seed).items():
            results.add("judge:hosted", task.concept.name, "", "judge_auroc", other=name, **value._asdict())


def _hosted(frame: pd.DataFrame, judge: HostedJudge, tasks: Sequence[Task], results: Results) -> pd.DataFrame:
    """The texts with the scores of a hosted judge too; answers without a rating are counted and left out."""
    parts = []
    for task in tasks:
        own = frame[frame.concept == task.concept.name]
        prompts, texts = list(own.prompt), list(own.text)
        scores = {"hosted_instruction": judge.instruction(texts, prompts), "hosted_fluency": judge.fluency(texts)}
        if task.concept.about:
            scores["hosted_concept"] = judge.concept(texts, task.concept.about)
        parts.append(own.assign(**scores))
    results.data["hosted_judge"] = judge.report()
    if judge.usage.unparsable:
        results.failures.append(f"{judge.usage.unparsable} answers of the hosted judge hold no rating: not scored")
    return pd.concat(parts, ignore_index=True)


def _add_judges(
    judges: Mapping[str, _ConceptJudges],
    fluency: FluencyJudge,
    frame: pd.DataFrame,
    results: Results,
) -> None:
    """How far to trust the judges: their AUROC on labelled texts, and how far two of them agree on the generations."""
    for name, value in fluency.checks.items():
        results.add(f"judge:{fluency.name}", "all", "", "judge_auroc", other=name, **value._asdict())
    for concept, own in judges.items():
        for name, (auroc, n) in own.checks.items():
            label, setting = f"judge:{name}", Setting(words=ADMISSION_WORDS)
            results.add(label, concept, setting, "judge_auroc", auroc, n=n, other="held_out")
    for concept, rows in frame.groupby("concept", sort=False):
        for label, second, a, b in (
            ("judge:tfidf", "minilm", rows.score_concept, rows.score_concept_tfidf),
            (f"judge:{fluency.name}", "nll_own", rows.score_fluency, -rows.nll_own),
        ):
            both = pd.DataFrame({"a": a, "b": b}).dropna()
            if both.nunique().min() > 1:
                for name in ("spearman", "pearson"):
                    agreement, setting = float(both.a.corr(both.b, method=name)), Setting({"with": second})
                    results.add(label, str(concept), setting, "judge_agreement", agreement, n=len(both), other=name)
