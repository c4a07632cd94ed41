"""The job of `glp-lens detect`: tasks from held-out texts and packaged datasets, and the models that score them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.errors import InputError, counted
from glp_lens.evals.detect.settings import DetectSettings
from glp_lens.pipeline.inputs import (
    ColumnSettings,
    LanguageModelSettings,
    SuiteJob,
    heldout_texts,
    hook_point,
    load_models,
    open_training_store,
)
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from torch import Tensor

    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.detect import DetectTask
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.suites import Inputs
    from glp_lens.types import Json

_CODE, _PROSE = ("158_code_C", "159_code_Python", "160_code_HTML"), ("161_agnews_0", "162_agnews_1", "163_agnews_2")
_STEERING = "92_glue_sst2"
"""The dataset whose classes give the direction of `steered`: praise in film reviews."""
_CHARACTERS = 2000
"""Of each text of a dataset: far more than the context holds."""


@dataclass(frozen=True, kw_only=True)
class DetectJob(DetectSettings, LanguageModelSettings, ColumnSettings, SuiteJob):
    """Settings of `detect`; of the texts the held-out twentieth is used."""

    essentials = ("models", "tasks", "store", "ref", "texts", "detect_texts", "model", "device", "out")

    tasks: tuple[str, ...] = option((), panel="Data")
    """What is odd: 'shuffled', 'code' and 'steered'; names or patterns of sae-probes' 113 tasks ('glp-lens tasks' lists
    them), of which class 0 is normal and class 1 is odd; 'family:NAME' for one family of them against all others,
    'family:*' for each. By default seven."""
    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that the models were trained on, for neighbours and the strength of steering."""
    ref: str | None = option(None, panel="Data")
    """Folder or Hub id of the prior that the GLPs were finetuned from: adds the log-ratio of their errors to its. The
    other way round, with one that was finetuned on odd texts here and the first in --models, these score high."""
    steered_strength: float = option(0.5, min=0, panel="Detection")
    """Strength of 'steered', in median distances of the training activations from their mean."""
    context: int = option(64, min=2, max=8192, panel="Language model", memory=True)
    """Most tokens of a text, BOS included."""
    out: Path = option(Path("results/detect"), panel="Run")
    """Folder for the output."""


def in_comparison(folder: Path) -> Json:
    """The models, the store and a few tasks of a comparison."""
    return {
        "models": ("glp", "sae", "pca", "gaussian"),
        "store": folder / "acts" / "train",
        "tasks": ("shuffled", "steered", "96_spam_is"),
    }


def check(settings: Settings) -> Json:
    """Nothing is refused late, and no file is among the settings."""
    return {}


def measure(job: DetectJob, trained: Mapping[str, ActivationModel], inputs: Inputs) -> Results:
    """How well scores tell odd texts from normal ones of equal lengths, with thresholds.

    Normal texts that are not tested set thresholds for chosen rates of false alarms.
    """
    from glp_lens import provenance
    from glp_lens.evals import detect as suite
    from glp_lens.evals.detect.tasks import DEFAULT_TASKS

    store, trained, notes = open_training_store(job.store, trained, allow_mismatch=job.allow_mismatch)
    names = task_names(job.tasks or DEFAULT_TASKS)
    reference = open_reference(job.ref, job.device)
    model = inputs.language_model(job, job.device)
    point = hook_point(model, job.hook, trained)
    data = suite.DetectData(
        model,
        point,
        open_tasks(names, job, inputs, model, point, job.steered_strength * store.median_centred_norm),
        training=store.sample(job.reference_rows, job.seed),
        reference=None if reference is None else provenance.bound(reference, point),
        context=job.context,
    )
    results = suite.run(
        entries(trained, job.denoise_sigmas, job.detect_ode_steps),
        data,
        DetectSettings.of(job),
        folder=job.out / "cache",
        allow_mismatch=job.allow_mismatch,
    )
    results.failures += notes
    return results


def entries(trained: Mapping[str, ActivationModel], sigmas: Sequence[float], ode_steps: int = 0) -> list[Entry]:
    """A GLP by denoising error and, with `ode_steps`, log-density; PCA and SAE by reconstruction error."""
    from glp_lens.evals.detect.detectors import ODE_PROBES
    from glp_lens.evals.entries import Entry

    compared = []
    for label, model in trained.items():
        if model.kind == "glp":
            compared.append(Entry(label, model, {"sigma": sigmas}))
            if ode_steps:
                ode = {"method": "ode", "steps": ode_steps, "probes": ODE_PROBES}
                compared.append(Entry(f"{label} density", model, ode, main=False))
        elif model.kind == "pca":
            compared.append(Entry(label, model, {"method": "reconstruction"}))
        else:
            compared.append(Entry(label, model))
    return compared


def open_reference(ref: str | None, device: str) -> ActivationModel | None:
    """The prior that others were finetuned from; None if none is named.

    Raises:
        InputError: it cannot be loaded, or has no denoising error.
    """
    if ref is None:
        return None
    from glp_lens.interface import VelocityField

    ((_, model),) = load_models([ref], device).items()
    if not isinstance(model, VelocityField):
        raise InputError(
            f"--ref must be a prior with a denoising error, a GLP or a Gaussian, got a model of kind {model.kind}"
        )
    return model


def task_names(patterns: Sequence[str]) -> list[str]:
    """The tasks that names and patterns stand for, each once.

    Raises:
        InputError: one that stands for none.
    """
    from glp_lens.evals.detect import tasks as kinds
    from glp_lens.evals.probing import tasks as datasets

    found: dict[str, None] = {}
    for pattern in patterns:
        if pattern in (kinds.SHUFFLED, kinds.STEERED, kinds.CODE):
            found[pattern] = None
        elif pattern.startswith(kinds.FAMILY):
            wanted, own = pattern.removeprefix(kinds.FAMILY), datasets.families()
            if not (chosen := matching(own, wanted)):
                raise InputError(f"no family of tasks {wanted!r}: expected one of {', '.join(own)}")
            found |= dict.fromkeys(kinds.FAMILY + family for family in chosen)
        else:
            found |= dict.fromkeys(datasets.names(pattern))
    return list(found)


def open_tasks(
    names: Sequence[str], job: DetectJob, inputs: Inputs, model: lm.Model, hook: str, strength: float
) -> list[DetectTask]:
    """The tasks of these names, as `task_names` gives them.

    Normal and odd texts to test come from held-out texts or the official test rows of the datasets, which no model saw
    that was trained on the packaged corpus; what is fitted to a task sees other held-out texts or the train rows.

    Args:
        strength: of the push of `steered`, in activation units.
    """
    from glp_lens.evals.detect import tasks as kinds
    from glp_lens.evals.probing import tasks as datasets

    made: dict[str, DetectTask] = {}
    for name in names:
        if name == kinds.SHUFFLED:
            plain = _of_heldout(name, "Odd texts have their words in random order.", job, inputs)
            made[name] = kinds.shuffled(plain, job.seed)
        elif name == kinds.STEERED:
            about = (
                f"Activations of odd texts were pushed along a direction of praise, strength {job.steered_strength:g}."
            )
            plain = _of_heldout(name, about, job, inputs)
            made[name] = replace(plain, push=strength * _praise(model, hook, job.seed))
        elif name == kinds.CODE:
            made[name] = _sides(name, _PROSE, _CODE, "News articles are normal, program code is odd.", job)
        elif name.startswith(kinds.FAMILY):
            family = name.removeprefix(kinds.FAMILY)
            odd = datasets.families()[family]
            others = [known for known in datasets.all_names() if known not in odd]
            about = f"Texts of the {counted(len(odd), 'dataset')} of one family are odd, those of all others normal."
            made[name] = _sides(name, others, odd, about, job, any_class=True)
        else:
            about = f"Class 0 of a dataset is normal, class 1 is odd. {datasets.note(name)}".strip()
            made[name] = _sides(name, [name], [name], about, job)
    return list(made.values())


def _of_heldout(name: str, about: str, job: DetectJob, inputs: Inputs) -> DetectTask:
    """Held-out texts in the parts of a task, the odd ones not yet made odd."""
    from glp_lens.evals.detect.tasks import of_texts

    wanted = 3 * job.detect_texts + 2 * job.detect_fit
    texts = [d.text for d in heldout_texts(job, inputs.texts, wanted, seed=job.seed, context=job.context)]
    return of_texts(name, texts, about, seed=job.seed, tested=job.detect_texts, fitted=job.detect_fit)


def _sides(
    name: str, normal: Sequence[str], odd: Sequence[str], about: str, job: DetectJob, *, any_class: bool = False
) -> DetectTask:
    """A task from datasets: class 0 of one dataset against its class 1, or texts of some against those of others."""
    from glp_lens.evals.detect.tasks import DetectTask

    one = normal == odd
    tested, fitted = 2 * job.detect_texts, 2 * job.detect_fit  # twice what is needed: short texts fall out
    known = {each: _rows(each, max(2 * tested, fitted)) for each in dict.fromkeys([*normal, *odd])}
    taken: set[str] = set()

    def texts(names: Sequence[str], label: int, part: str, most: int) -> tuple[str, ...]:
        labels = (0, 1) if any_class else (label,)
        share = -(-most // (len(names) * len(labels)))
        found = [
            text for each in names for label in labels for text in known[each][part, label][:share] if text not in taken
        ]
        taken.update(found)  # datasets share texts
        return tuple(found)

    class_of_normal = 0 if one else 1
    return DetectTask(
        name,
        texts(normal, class_of_normal, "test", 2 * tested),
        texts(odd, 1, "test", tested),
        texts(normal, class_of_normal, "train", fitted),
        texts(odd, 1, "train", fitted),
        about,
    )


@cache
def _rows(name: str, most: int) -> dict[tuple[str, int], list[str]]:
    """The beginnings of a dataset's texts, each text once, by part (`train`, `test`) and class; so many of each."""
    from glp_lens.evals.probing import tasks as datasets

    task = datasets.load(name)
    split = task.splits["dedup"]
    return {
        (part, label): [task.texts[i].strip()[:_CHARACTERS] for i in index if task.labels[i] == label][:most]
        for part, index in (("train", split.train), ("test", split.test))
        for label in (0, 1)
    }


def _praise(model: lm.Model, hook: str, seed: int) -> Tensor:
    """The unit direction from bad to good film reviews, from the dataset's train rows."""
    from glp_lens import directions

    rows = _rows(_STEERING, 128)
    sides = rows["train", 1], rows["train", 0]
    made = directions.from_texts(model, *sides, hook, name="praise", read="mean", held_out=0, seed=seed)
    return made.vector
