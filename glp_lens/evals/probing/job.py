"""The job of `glp-lens probe`: tasks, their activations, and the models whose features are probed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from glp_lens.errors import InputError, counted
from glp_lens.evals.probing.settings import ProbingSettings, TaskSettings
from glp_lens.pipeline.inputs import ContextSettings, LanguageModelSettings, SuiteJob, at_hook, hook_point
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.probing import Task, TaskActivations
    from glp_lens.evals.results import Results
    from glp_lens.pipeline.suites import Inputs
    from glp_lens.types import Json


@dataclass(frozen=True, kw_only=True)
class ProbeJob(TaskSettings, ProbingSettings, LanguageModelSettings, ContextSettings, SuiteJob):
    """Settings of `probe`."""

    essentials = ("models", "tasks", "probe_train", "ks", "pooling", "neurons", "random", "model", "device", "out")

    acts_with: ClassVar[Mapping[str, str]] = {"label": "store"}

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


def in_comparison(folder: Path) -> Json:
    """The models of a comparison, and where the activations of the tasks' texts are kept."""
    return {"models": ("glp", "sae", "pca", "gaussian", "raw", "random"), "cache": folder / "cache" / "probing"}


def check(settings: Settings) -> Json:
    """Refuse names that are no task's, and files that make none; files count by what is in them."""
    from glp_lens.corpus.tables import TABLES, kind_of
    from glp_lens.evals import probing as suite
    from glp_lens.evals.cache import digest

    assert isinstance(settings, TaskSettings)
    assert isinstance(settings, ProbingSettings)
    files = [spec for spec in settings.tasks if kind_of(spec) in TABLES]
    suite.names([spec for spec in settings.tasks if spec not in files] or None)
    if not files:
        return {}
    own = [asdict(task) for task in open_tasks(settings, settings.seed, files)]
    return {"tasks": [*settings.tasks, f"hash {digest(own)}"]}


def measure(job: ProbeJob, trained: Mapping[str, ActivationModel], inputs: Inputs) -> Results:
    """Sparse probing: how well one feature, or a few, of each model separate two classes.

    Every feature is scored exactly. Prints a table and writes report.html, results.json and metrics.csv to --out.
    Run it again to continue where it stopped.
    """
    from glp_lens.evals import probing as suite

    if job.store is None:
        tasks = open_tasks(job, job.seed)
        inputs.say(_amount(job, tasks, trained))
        compared, activations = _of_texts(job, trained, tasks, inputs.language_model(job, job.device))
    else:
        task, activations = _of_store(job, job.store)
        tasks, compared = [task], _entries(job, trained, activations.source["hook"])
    return suite.run(
        compared,
        suite.ProbingData(tasks, activations, job.device),
        ProbingSettings.of(job),
        folder=job.out / "scores",
        allow_mismatch=job.allow_mismatch,
    )


def _amount(job: ProbeJob, tasks: Sequence[Task], trained: Mapping[str, ActivationModel]) -> str:
    """What is about to be read and probed."""
    families = len({task.family for task in tasks})
    texts = len({text for task in tasks for text in task.texts})
    drawn = job.random and not any(model.kind == "random" for model in trained.values())
    models = len(trained) + job.neurons + drawn
    return (
        f"{counted(len(tasks), 'task')} of {counted(families, 'family', 'families')}: {counted(texts, 'text')} to "
        f"read, but for those in the cache, then {counted(models, 'model')} to probe on each; bars say how long "
        "either takes"
    )


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
    settings: ProbeJob, trained: Mapping[str, ActivationModel], tasks: Sequence[Task], model: lm.Model
) -> tuple[list[Entry], TaskActivations]:
    """What is compared, and the activations of the tasks' texts where each entry is read."""
    from glp_lens import lm, provenance
    from glp_lens.evals import probing as suite
    from glp_lens.evals.entries import Entry
    from glp_lens.models.neurons import Neurons

    point = hook_point(model, settings.hook, trained)
    entries = _entries(settings, trained, point)
    identity = lm.identity(model)
    here = provenance.here(model, point, identity)  # a model that does not fit is told before the texts are run
    for entry in entries:
        at = {**here, "hook": point if settings.hook else entry.model.hook or point, "d_in": None}
        provenance.check_models({entry.label: entry.model}, at, allow_mismatch=settings.allow_mismatch)
    points = [point, *(entry.model.hook for entry in entries if entry.model.hook and not settings.hook)]
    if settings.neurons:
        neurons = Neurons.of(model, point, identity)
        entries.append(Entry("neurons", neurons))
        points.append(str(neurons.hook))
    cache = settings.cache or settings.out / "cache"
    rows = suite.collect(
        model, tasks, points, pooling=settings.pooling, context=settings.context, cache=cache, identity=identity
    )
    return entries, rows


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


def _entries(settings: ProbeJob, trained: Mapping[str, ActivationModel], point: str) -> list[Entry]:
    """What is compared, random features among it if they are asked for and not given."""
    models = at_hook(trained, point)
    if settings.random and not any(model.kind == "random" for model in models.values()):
        models["random"] = random_control(models, seed=settings.seed)
    return entries(models, settings.sigmas)


def entries(trained: Mapping[str, ActivationModel], sigmas: Sequence[float]) -> list[Entry]:
    """A GLP's meta-neurons, and every other model's features.

    A GLP stands at the first of the noise levels. More of them are a sweep, which also gives the features of all
    levels side by side; neither is in the pairwise comparisons.
    """
    from glp_lens.evals.entries import Entry

    compared = []
    for label, model in trained.items():
        if model.kind != "glp":
            compared.append(Entry(label, model))
        elif len(sigmas) == 1:
            compared.append(Entry(label, model, {"sigma": sigmas[0]}))
        else:
            compared += [
                Entry(f"{label} sigma={sigma:g}", model, {"sigma": sigma}, main=sigma == sigmas[0]) for sigma in sigmas
            ]
            together = tuple(sorted(sigmas))
            name = "+".join(f"{sigma:g}" for sigma in together)
            compared.append(Entry(f"{label} sigma={name}", model, {"sigma": together}, main=False))
    return compared


def random_control(trained: Mapping[str, ActivationModel], *, seed: int = 0) -> ActivationModel:
    """Random features of the scale and number of the first GLP's.

    Raises:
        InputError: there is no GLP among the models.
    """
    from glp_lens.models.glp import GLP
    from glp_lens.models.random_features import RandomFeatures

    glp = next((model for model in trained.values() if isinstance(model, GLP)), None)
    if glp is None:
        raise InputError(
            "random features take their number and scale from a GLP, got none: add one, or a folder of "
            "'glp-lens train random'"
        )
    return RandomFeatures.draw(*glp.statistics(None, glp.device), glp.n_features, seed=seed)
