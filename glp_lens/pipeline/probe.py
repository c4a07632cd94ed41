"""Probing: how well single features, and few of them, of trained models separate two classes of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.errors import InputError
from glp_lens.evals.probing.settings import ProbingSettings, TaskSettings
from glp_lens.pipeline.inputs import (
    ContextSettings,
    LanguageModelSettings,
    ModelsSettings,
    ResultSettings,
    at_hook,
    hook_point,
    load_models,
    open_language_model,
)
from glp_lens.pipeline.results import finish
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.probing import Task, TaskActivations
    from glp_lens.evals.results import Results


@dataclass(frozen=True, kw_only=True)
class ProbeJob(TaskSettings, ProbingSettings, ModelsSettings, LanguageModelSettings, ContextSettings, ResultSettings):
    """Settings of `probe`."""

    store: Path | None = option(None, panel="Tasks")
    """Folder of an activation store with labels, whose rows are probed instead of texts."""
    label: str | None = option(None, panel="Tasks")
    """Label column of that store."""
    cache: Path | None = option(None, panel="Tasks")
    """Folder for the texts' activations, which several runs may share. By default 'cache' in --out."""
    neurons: bool = option(False, panel="Controls")
    """Probe the MLP neurons of the language model itself, at the layer of the hook point."""
    random: bool = option(False, panel="Controls")
    """Probe random features too, as many as the first GLP's."""
    out: Path = option(Path("results/probing"), panel="Run")
    """Folder for the output."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if self.store is not None and (self.label is None or self.tasks or self.neurons):
            raise InputError(
                "--store takes --label, a column of classes, and neither --tasks nor --neurons: it has no texts"
            )


def probe(
    settings: ProbeJob,
    *,
    model: lm.Model | None = None,
    page: bool = True,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Results:
    """Sparse probing: how well single features, and few of them, of each model separate two classes.

    Every feature is scored exactly. A second run continues where the first stopped.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        page: also write report.html.
        command: the command line, for the page.
        say: prints a line.

    Raises:
        InputError: models, tasks, a store or a hook point that cannot be used, or results that are already there.
    """
    from glp_lens.evals import probing as suite

    settings.refuse_overwrite("results.json")
    trained = load_models(settings.models, settings.device)
    settings.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before texts are run
    if settings.store is None:
        tasks = open_tasks(settings, settings.seed)
        opened = open_language_model(settings, settings.device) if model is None else model
        entries, activations = _of_texts(settings, trained, tasks, opened)
    else:
        task, activations = _of_store(settings, settings.store)
        tasks, entries = [task], _entries(settings, trained, activations.source["hook"])
    results = suite.run(
        entries,
        suite.ProbingData(tasks, activations, settings.device),
        ProbingSettings.of(settings),
        folder=settings.out / "scores",
        allow_mismatch=settings.allow_mismatch,
    )
    return finish(results, settings, page=page, command=command, say=say)


def open_tasks(settings: TaskSettings, seed: int, names: Sequence[str] | None = None) -> list[Task]:
    """The tasks of the settings, or those of other names with the same sizes and columns.

    Raises:
        InputError: a pattern that matches no task, or a file that makes none.
    """
    from glp_lens.evals import probing as suite

    return suite.open_tasks(
        settings.tasks or None if names is None else names,
        max_train=settings.probe_train or None,
        max_test=settings.probe_test or None,
        text=settings.text_column,
        label=settings.label_column,
        group=settings.group_column,
        split=settings.split_column,
        positive=settings.positive,
        seed=seed,
    )


def _of_texts(
    settings: ProbeJob, trained: dict[str, ActivationModel], tasks: Sequence[Task], model: lm.Model
) -> tuple[list[Entry], TaskActivations]:
    """What is compared, and the activations of the tasks' texts where each entry is read."""
    from glp_lens import provenance
    from glp_lens.evals import probing as suite
    from glp_lens.evals.entries import Entry
    from glp_lens.models.neurons import Neurons

    point = hook_point(model, settings.hook, trained)
    entries = _entries(settings, trained, point)
    here = provenance.here(model, point)  # a model that does not fit is told before the texts are run
    for entry in entries:
        at = {**here, "hook": point if settings.hook else entry.model.hook or point, "d_in": None}
        provenance.check_models({entry.label: entry.model}, at, allow_mismatch=settings.allow_mismatch)
    points = [point, *(entry.model.hook for entry in entries if entry.model.hook and not settings.hook)]
    if settings.neurons:
        neurons = Neurons.of(model, point)
        entries.append(Entry("neurons", neurons))
        points.append(str(neurons.hook))
    cache = settings.cache or settings.out / "cache"
    return entries, suite.collect(model, tasks, points, pooling=settings.pooling, context=settings.context, cache=cache)


def _of_store(settings: ProbeJob, folder: Path) -> tuple[Task, TaskActivations]:
    """The task that a labelled column of a store makes."""
    from glp_lens.activations import ActivationStore
    from glp_lens.evals import probing as suite

    return suite.from_store(
        ActivationStore.open(folder),
        str(settings.label),
        positive=settings.positive,
        seed=settings.seed,
        max_train=settings.probe_train or None,
        max_test=settings.probe_test or None,
    )


def _entries(settings: ProbeJob, trained: dict[str, ActivationModel], point: str) -> list[Entry]:
    """What is compared, random features among it if they are asked for and not given."""
    from glp_lens.pipeline.entries import probing_entries, random_control

    models = at_hook(trained, point)
    if settings.random and not any(model.kind == "random" for model in models.values()):
        models["random"] = random_control(models, seed=settings.seed)
    return probing_entries(models, settings.sigmas)
