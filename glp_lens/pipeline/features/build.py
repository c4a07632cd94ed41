"""Building: all features of some models are measured in one pass over texts, or over a store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.features.settings import FeatureSettings
from glp_lens.pipeline.inputs import (
    ColumnSettings,
    ContextSettings,
    LanguageModelSettings,
    SuiteJob,
    hook_point,
    load_models,
    open_language_model,
)
from glp_lens.pipeline.stages import Stage, refuse_existing, run_stages, state_of_files
from glp_lens.settings import option, options

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.activations import ActivationStore
    from glp_lens.corpus import Document
    from glp_lens.evals.entries import Entry
    from glp_lens.features import FeatureFolder, ModelAbout
    from glp_lens.features.sample import Sample
    from glp_lens.features.source import Source
    from glp_lens.types import Json


@dataclass(frozen=True, kw_only=True)
class BuildFeaturesJob(FeatureSettings, LanguageModelSettings, ContextSettings, ColumnSettings, SuiteJob):
    """Settings of `features build`."""

    essentials = ("models", "texts", "store", "tokens", "sigma", "neurons", "random", "model", "device", "out")

    panel = "Data"

    models: tuple[str, ...] = ()
    """Trained models, separated by commas, each optionally named (glp=runs/a/glp): folders of any kind, sae-lens
    folders, Hub ids, or sae-lens:RELEASE:SAE_ID."""
    store: Path | None = None
    """Folder of an activation store, whose rows are read in place of texts."""
    split: Literal["train", "heldout", "all"] = "train"
    """Part of the texts: 'heldout' is a twentieth, chosen by hash."""
    neurons: bool = option(False, panel="Features")
    """Measure the MLP neurons of the language model itself too, at the layer of the hook point."""
    random: bool = option(False, panel="Features")
    """Measure random features too, as many as the first GLP's."""
    probed: Path | None = None
    """Folder of results of 'probe' on these models: adds the tasks that each feature won."""
    steered: int = option(0, min=0, panel="Features")
    """Features of each model, evenly spaced, along whose direction a few short texts are generated."""
    out: Path = option(Path("features"), panel="Run")
    """Folder for the output."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        if not self.models and not self.neurons:
            raise InputError("--models needs at least one folder of a trained model, or pass --neurons")
        if self.store is not None and (self.texts or self.neurons or self.hook):
            raise InputError(
                "--store has the rows of one hook point and no texts: pass it without --texts, --hook and --neurons"
            )


@checked
def build_features(
    settings: BuildFeaturesJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    say: Callable[[str], None] = print,
) -> FeatureFolder:
    """Measure every feature of trained models: how it is distributed, and the passages in which it is active.

    Then what it writes, which features are nearest to it, and a label of the tokens that stand out; of a GLP also how
    its meta-neurons change with the noise and what they do to the velocity. The texts are read once for all models, and
    memory does not grow with them. An interrupted run continues where it stopped, and what is done is not done again.
    Writes features.json, a folder of tables for each model, and index.html, a page that opens offline, to --out.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        texts: texts in memory to use instead of those that the settings name.
        say: prints a line.

    Returns:
        The folder.

    Raises:
        InputError: models, a store, texts or a hook point that cannot be used, or a folder that holds something else.
    """
    from glp_lens.activations.writer import locked
    from glp_lens.features import FeatureFolder
    from glp_lens.features.folder import ABOUT
    from glp_lens.features.page import write_page

    if settings.store is not None and texts is not None:
        raise InputError("a store has its texts already: pass either")
    run = _Build(settings, model, texts, say)
    with locked(settings.out):
        if not (settings.out / "stages").exists() and not settings.overwrite:
            refuse_existing(settings.out / ABOUT)
        run_stages(run.stages(), run.inputs, settings.out, overwrite=settings.overwrite, say=say)
        folder = FeatureFolder.open(settings.out)
        run.tasks(folder)
        run.texts_along_directions(folder)
        page = write_page(folder)
    for note in dict.fromkeys(run.notes):
        say(f"note: {note}")
    say(f"features: {settings.out}, to look at in {page}")
    return folder


class _Build:
    """One run: its stages, and the models and texts that they share."""

    def __init__(
        self,
        settings: BuildFeaturesJob,
        model: lm.Model | None,
        texts: Sequence[str | Document] | None,
        say: Callable[[str], None],
    ) -> None:
        from glp_lens.activations import ActivationStore
        from glp_lens.evals.results import Results

        self.settings, self.texts, self.say = settings, texts, say
        self.probed = None if settings.probed is None else Results.load(settings.probed)
        self.trained = load_models(settings.models, settings.device) if settings.models else {}
        self.store = None if settings.store is None else ActivationStore.open(settings.store)
        self.model = model or open_language_model(settings, settings.device)
        self.entries, self.notes = self._entries()

    def stages(self) -> list[Stage]:
        """All stages, in order: what they depend on, and what they make."""
        from glp_lens.features.folder import ABOUT, Way, folder_names
        from glp_lens.features.passes import STATE
        from glp_lens.features.sample import sample_path

        folders = folder_names([entry.label for entry in self.entries])
        samples = {sample_path(Path(), str(entry.hook)).name for entry in self.entries}

        def tables(*names: str) -> tuple[str, ...]:
            return tuple(f"{folder}/{name}.parquet" for folder in folders for name in names)

        pass_, needs = "statistics", ("statistics",)
        ways = [
            f"{folder}/directions-{way.replace(' ', '-')}.safetensors" for folder in folders for way in get_args(Way)
        ]
        made = (ABOUT, *folders, *tables("features", "examples"), *sorted(samples), STATE)
        return [
            Stage(pass_, tuple(self.of_statistics), (), made, self.statistics),
            Stage("writes", (), needs, (*tables("writes", "prior"), *ways), self.writes),
            Stage("neighbours", (), (*needs, "writes"), tables("neighbours"), self.neighbours),
            Stage("labels", (), needs, tables("labels"), self.labels),
        ]

    @cached_property
    def identity(self) -> Json:
        """What identifies the language model."""
        from glp_lens import lm

        return lm.identity(self.model)

    @cached_property
    def inputs(self) -> Json:
        """All that stages depend on, by name: settings, and what stands for models, files and texts in memory."""
        from glp_lens.evals.cache import digest

        own = ("out", "overwrite", "probed", "steered")  # what these add is made anew whenever it is asked for
        known = {name: value for name, value in self.settings.to_json().items() if name not in own}
        known["files"] = state_of_files({name: known[name] for name in ("texts", "store")})
        if self.texts is not None:
            known["texts"] = digest([each if isinstance(each, str) else each.text for each in self.texts])
        known["models"] = [entry.identity() for entry in self.entries]
        return known | {"model": self.identity}

    @property
    def of_statistics(self) -> Json:
        """Those that the pass over the tokens depends on."""
        shared = (FeatureSettings, LanguageModelSettings, ContextSettings, ColumnSettings)
        names = [each.name for settings in shared for each in options(settings)]
        return {name: self.inputs[name] for name in (*names, "models", "store", "split", "files", "device", "seed")}

    def statistics(self) -> None:
        """Statistics, passages and samples of rows, from one pass over the tokens."""
        from glp_lens import lm
        from glp_lens.evals.cache import digest
        from glp_lens.features import About, FeatureFolder, tables
        from glp_lens.features.passes import STATE, measure
        from glp_lens.files import versions

        s = self.settings
        kept = FeatureSettings.of(s)
        measured = measure(self.entries, self.source, kept, seed=s.seed, folder=s.out, key=digest(self.of_statistics))
        tokenizer = lm.tokenizer_of(self.model)
        names = {name or Path(folder).name: folder for name, _, folder in (each.rpartition("=") for each in s.models)}
        models = tables.write(
            measured, s.out, names=names, decode=lambda token: str(tokenizer.decode([token])), seed=s.seed
        )
        FeatureFolder(s.out).finish(
            About(
                models, self.identity, measured.texts, measured.tokens, self.corpus, s.to_json(), versions(),
                tuple(self.notes),
            )
        )  # fmt: skip
        (s.out / STATE).unlink(missing_ok=True)

    def writes(self) -> None:
        """Directions, the tokens that they speak for, and what is specific to a prior."""
        from glp_lens.features.describe import describe

        folder, samples = self._measured()
        for about, entry in self._pairs(folder):
            self.notes += describe(folder, about, entry.model, samples, self.model, seed=self.settings.seed)

    def neighbours(self) -> None:
        """The features nearest to each, within and across models."""
        from glp_lens.features.neighbours import neighbours

        folder, samples = self._measured()
        pairs = [(about, entry.model) for about, entry in self._pairs(folder)]
        neighbours(folder, pairs, samples, seed=self.settings.seed)

    def labels(self) -> None:
        """Automatic labels."""
        from glp_lens.features import FeatureFolder
        from glp_lens.features.labels import label

        label(FeatureFolder.open(self.settings.out), say=self.say)

    def tasks(self, folder: FeatureFolder) -> None:
        """Probing tasks that features won, if there are results."""
        from glp_lens.features.won_tasks import won_tasks

        if self.probed is not None:
            pairs = [(about, entry.model) for about, entry in self._pairs(folder)]
            self.notes += won_tasks(folder, pairs, self.probed, seed=self.settings.seed)

    def texts_along_directions(self, folder: FeatureFolder) -> None:
        """Texts along the directions of some features, if asked for; those that are there are kept."""
        from glp_lens.features.steered import evenly, steer

        for about in folder.about.models if self.settings.steered else ():
            if folder.ways(about):
                chosen = evenly(folder, about, self.settings.steered)
                steer(folder, about, chosen, self.model, keep=True, allow_mismatch=True, say=self.say)

    def _measured(self) -> tuple[FeatureFolder, dict[str, Sample]]:
        """The folder, and the samples of rows by hook point."""
        from glp_lens.features import FeatureFolder
        from glp_lens.features.sample import Sample, sample_path

        folder = FeatureFolder.open(self.settings.out)
        hooks = dict.fromkeys(about.hook for about in folder.about.models)
        return folder, {hook: Sample.read(sample_path(folder.path, hook)) for hook in hooks}

    def _pairs(self, folder: FeatureFolder) -> list[tuple[ModelAbout, Entry]]:
        """What describes each model, and what is measured."""
        entries = {entry.label: entry for entry in self.entries}
        return [(about, entries[about.label]) for about in folder.about.models]

    @property
    def source(self) -> Source:
        """The tokens."""
        from glp_lens.features.sample import norm_limits
        from glp_lens.features.source import Rows, Texts

        if self.store is not None:
            return Rows(self.store, self.settings.tokens)
        limits = norm_limits((str(entry.hook), entry.model) for entry in self.entries)
        hooks = dict.fromkeys(str(entry.hook) for entry in self.entries)
        return Texts(
            self.model, self._documents(), list(hooks), context=self.settings.context, limits=limits,
            tokens=self.settings.tokens,
        )  # fmt: skip

    @property
    def corpus(self) -> str:
        """Name of the texts."""
        s = self.settings
        if self.store is not None:
            return str((self.store.provenance().get("corpus") or {}).get("name") or s.store)
        return f"{','.join(s.texts) or ('own texts' if self.texts is not None else 'sae-probes texts')} ({s.split})"

    def _documents(self) -> Iterable[Document]:
        from glp_lens import corpus

        s = self.settings
        if self.texts is not None:
            return corpus.split_documents(self.texts, s.split, seed=s.seed)
        return corpus.open_corpus(
            s.texts, split=s.split, seed=s.seed, context=s.context, text_column=s.text_column, stream=True
        )

    def _entries(self) -> tuple[list[Entry], list[str]]:
        """What is measured, each where it is read, and notes on what is left out or does not fit."""
        from glp_lens import lm, provenance
        from glp_lens.evals.entries import Entry, usable
        from glp_lens.evals.probing.job import random_control
        from glp_lens.interface import Featurizer
        from glp_lens.models.neurons import Neurons

        s, notes = self.settings, list[str]()
        for control in (name for name in ("random", "neurons") if getattr(s, name) and name in self.trained):
            raise InputError(f"a model is called {control!r}, as the control is: name it otherwise, or leave that out")
        if self.store is None:
            point = hook_point(self.model, s.hook, self.trained)
            where = {
                label: lm.check_hook(self.model, s.hook or each.hook or point) for label, each in self.trained.items()
            }
        else:
            point = self.store.hook
            where = dict.fromkeys(self.trained, point)
            notes += [self._check_store(self.store)]
        models = {label: provenance.bound(each, where[label]) for label, each in self.trained.items()}
        if s.random:
            models["random"] = random_control(models, seed=s.seed)
            where["random"] = next(where[label] for label, each in models.items() if each.kind == "glp")
        if s.neurons:
            models["neurons"] = Neurons.of(self.model, point, self.identity)
            where["neurons"] = str(models["neurons"].hook)

        def source(entry: Entry) -> Json:
            if self.store is not None:
                return self.store.provenance()
            return provenance.here(self.model, str(entry.hook), self.identity)

        entries, more = usable(
            [
                Entry(label, each, {"sigma": s.sigma} if each.kind == "glp" else {}, where[label])
                for label, each in models.items()
            ],
            Featurizer, source, left_out="{label} has no features ({kind})", allow_mismatch=s.allow_mismatch,
        )  # fmt: skip
        if not entries:
            raise InputError(f"no model has features: {'; '.join(more)}")
        return entries, [note for note in notes + more if note]

    def _check_store(self, store: ActivationStore) -> str:
        """Refuse a language model that the store is not of: its tokenizer would give other texts."""
        from glp_lens import provenance

        return provenance.check(
            f"{store.path} was collected",
            store.provenance(),
            provenance.here(self.model, store.hook, self.identity),
            remedy="pass the language model of the store as --model",
            allow_mismatch=self.settings.allow_mismatch,
        )
