"""Comparing: all jobs in a row, with shared settings, from texts to a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.density.settings import DensitySettings
from glp_lens.evals.fidelity.settings import FidelitySettings
from glp_lens.evals.probing.settings import ProbingSettings, Size
from glp_lens.evals.registry import COMPARED, SUITES, Suite
from glp_lens.evals.steering.settings import Control, Repair, RepairSettings, SteeringSettings
from glp_lens.pipeline.collect import CollectJob, collect
from glp_lens.pipeline.inputs import (
    ColumnSettings,
    ContextSettings,
    LanguageModelSettings,
    RunSettings,
    TextsSettings,
    open_language_model,
)
from glp_lens.pipeline.report import ReportJob, read_results, write_all
from glp_lens.pipeline.stages import Stage, run_stages, stage_seconds
from glp_lens.pipeline.suites import run_suite
from glp_lens.pipeline.train import STATE, TrainJob, train
from glp_lens.settings import Settings, again, option, options
from glp_lens.training.config import recipe

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.activations import ActivationStore
    from glp_lens.corpus import Document
    from glp_lens.types import Json


@dataclass(frozen=True, kw_only=True)
class CompareJob(
    *(settings for suite in SUITES for settings in suite.own_settings),  # type: ignore[misc]
    LanguageModelSettings,
    ContextSettings,
    TextsSettings,
    RunSettings,
):
    """Settings of `compare` and `quickstart`: those of all jobs. The defaults finish in minutes on two CPU cores."""

    essentials = (
        "model", "hook", "texts", "tokens", "rows", "glp_width", "sae_latents", "suites", "tasks", "device", "out",
    )  # fmt: skip

    panel = "Sizes"

    texts_column: str = option("text", panel="Data")
    """Column of the text, or of chat messages, in the files of --texts."""
    tokens: int = option(60_000, min=1)
    """Activations collected for training."""
    heldout_tokens: int = option(8_000, min=2)
    """Activations of held-out documents."""
    rows: int = option(200_000, min=1)
    """Activations shown to the GLP and to the SAE each; above --tokens means several epochs."""
    glp_width: int | None = option(None, min=1, memory=True)
    """Width of the GLP's denoiser; by default that of the activations."""
    glp_mlp: int | None = option(None, min=1, memory=True)
    """Meta-neurons in each block of the GLP's denoiser; by default twice its width."""
    glp_layers: int = option(1, min=1, memory=True)
    """Blocks of the GLP's denoiser."""
    glp_lr: float | None = option(None, min=0, max=1)
    """Peak learning rate of the GLP; by default that of 'train glp', which falls with the width."""
    glp_batch: int | None = option(None, min=1, memory=True)
    """Rows in each of its steps; by default those of 'train glp', 256 and more as it goes on."""
    sae_latents: int | None = option(None, min=1, memory=True)
    """Dictionary size of the SAE; by default twice the width of the activations."""
    sae_k: int = option(32, min=1)
    """Latents active on a row."""
    sae_lr: float = option(2e-3, min=0, max=1)
    """Peak learning rate of the SAE."""
    sae_batch: int = option(512, min=1, memory=True)
    """Rows in each of its steps."""
    fit_rows: int = again(DensitySettings, "fit_rows", 20_000)
    documents: int = again(FidelitySettings, "documents", 16)
    prompts: int = again(SteeringSettings, "prompts", 12)
    texts_per_side: int = again(SteeringSettings, "texts_per_side", 128)
    repairs: tuple[Repair, ...] = again(RepairSettings, "repairs", ("difference",))
    controls: tuple[Control, ...] = again(SteeringSettings, "controls", ("shrink", "random labels"))
    probe_train: int = option(128, min=10, panel="Tasks", memory=True)
    """Most training texts a task."""
    probe_test: int = option(128, min=4, panel="Tasks", memory=True)
    """Most test texts a task."""
    ks: tuple[Size, ...] = again(ProbingSettings, "ks", (16,))
    suites: tuple[str, ...] = option(COMPARED, panel="Tasks")
    """Suites to run: density, probing, steering, fidelity, detect, generation, separated by commas."""
    out: Path = option(Path("runs"), panel="Run")
    """Folder for the output."""
    overwrite: bool = option(False, panel="Run")
    """Redo stages that were done with other settings, instead of refusing."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        super().__post_init__()
        for name in ("glp_lr", "sae_lr"):
            if (lr := getattr(self, name)) is not None and not 0 < lr < 1:
                raise InputError(f"{name} must be between 0 and 1, got {lr}")
        recipe("fast", self.rows, batch_size=self.glp_batch)  # refuses what is less than one batch
        if self.sae_latents is not None and self.sae_k > self.sae_latents:
            raise InputError(f"sae_k must be at most sae_latents = {self.sae_latents}, got {self.sae_k}")
        known = [suite.name for suite in SUITES]
        if not self.suites or len({*self.suites}) < len(self.suites) or not {*self.suites} <= {*known}:
            raise InputError(f"suites must be some of {', '.join(known)}, each once, got {', '.join(self.suites)!r}")

    @property
    def compared(self) -> list[Suite]:
        """The suites to run, in the order of `SUITES`."""
        return [suite for suite in SUITES if suite.name in self.suites]


@checked
def compare(
    settings: CompareJob,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train a GLP, an SAE, PCA and baselines on one language model, and compare them.

    Writes to `out`: `acts/` (the stores), `models/` (the trained models), `results/` (one folder a suite),
    `report.html`, `plots/`, `results.json` and `metrics.csv`. A stage whose output is there and matches is
    skipped; an interrupted one continues.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        texts: training texts to use instead of those that the settings name; a twentieth, chosen by hash, is held out.
        command: the command line, for the page.
        say: prints a line.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: bad settings, a model or hook point that cannot be used, or a folder that holds another run, or in
            which one is at work.
    """
    from glp_lens.activations.writer import locked

    files: Json = {}
    for suite in settings.compared:  # refused before any work, and not after minutes
        files |= suite.job.check(settings)
    run = _Comparison(settings, model, texts, command)
    with locked(settings.out):
        shared = settings.to_json() | files | run.identify()
        run_stages(
            run.stages(), shared, settings.out, overwrite=settings.overwrite, say=say, defaults=CompareJob().to_json()
        )
    say(f"report: {settings.out / 'report.html'}")
    say(f"numbers: {settings.out / 'metrics.csv'} and {settings.out / 'results.json'}")
    return settings.out / "report.html"


class _Comparison:
    """One run: its jobs, and the language model and texts that they share."""

    def __init__(
        self,
        settings: CompareJob,
        model: lm.Model | None,
        texts: Sequence[str | Document] | None,
        command: str | None,
    ) -> None:
        self.settings, self.given_model, self.texts, self.command = settings, model, texts, command
        self.in_memory = model is not None or texts is not None

    def identify(self) -> Json:
        """What stands for a language model or texts in memory, and for files, in the settings of stages."""
        from glp_lens import corpus, lm
        from glp_lens.corpus.opening import HUB

        known: Json = {}
        if self.given_model is not None:
            known["model"] = f"{lm.name_of(self.given_model)}, weights {lm.weights_hash(self.given_model)}"
        files = self.settings.texts
        if self.texts is None and files and not any(spec.startswith(HUB) for spec in files):
            if not (self.settings.out / "stages" / "collect.json").exists():
                # A wrong model or hook point is refused before texts are read, which takes a while.
                lm.check_hook(self.model, self.settings.hook or lm.default_hook(self.model))
            piece = corpus.CHARACTERS_PER_TOKEN * self.settings.context
            self.texts = list(corpus.from_files(files, self.settings.texts_column, piece=piece))
        if self.texts is not None:
            known["texts"] = f"{len(self.texts)} texts, hash {_hash(self.texts)}"
        return known

    def stages(self) -> list[Stage]:
        """All stages, in order: their jobs, and the settings that these depend on."""
        language_model = (*_names(LanguageModelSettings), "device", "seed")
        corpus = ("texts", "texts_column", "tokens", "heldout_tokens", "context")
        glp = ("rows", "glp_width", "glp_mlp", "glp_layers", "glp_lr", "glp_batch")
        sae = ("rows", "sae_latents", "sae_k", "sae_lr", "sae_batch")
        fits = ("train-glp", "train-sae", "train-baselines")
        baselines = ("pca", "pca_raw", "gaussian", "raw", "random")
        page = ("report.html", "results.json", "metrics.csv", "plots")
        return [
            Stage("collect", (*language_model, *corpus), (), ("acts",), self.collect),
            Stage("train-glp", glp, ("collect",), ("models/glp",), partial(self.train, "glp")),
            Stage("train-sae", sae, ("collect",), ("models/sae",), partial(self.train, "sae")),
            Stage("train-baselines", ("glp_width", "glp_mlp", "glp_layers"), ("collect",),
                  tuple(f"models/{b}" for b in baselines), partial(self.train, *baselines)),
            *(Stage(suite.name, tuple(name for each in suite.own_settings for name in _names(each)), fits,
                    (f"results/{suite.name}", f"cache/{suite.name}"), partial(self.measure, suite))
              for suite in self.settings.compared),
            Stage("report", (), tuple(suite.name for suite in self.settings.compared), page, self.report),
        ]  # fmt: skip

    @cached_property
    def model(self) -> lm.Model:
        """The language model, refused if another one's activations are already in the folder."""
        from glp_lens import provenance

        model = self.given_model
        if model is None:
            model = open_language_model(self.settings, self.settings.device)
        if (self.settings.out / "stages" / "train-glp.json").exists():  # then the store is complete
            store = self.store
            differences = provenance.mismatches(store.provenance(), provenance.here(model, store.hook))
            if differences:
                raise InputError(
                    f"{self.settings.out} was collected {', '.join(differences)}: use the same copy of the model, or "
                    "another folder"
                )
        return model

    @property
    def store(self) -> ActivationStore:
        """Training activations."""
        from glp_lens.activations import ActivationStore

        return ActivationStore.open(self.acts("train"))

    def acts(self, split: str) -> Path:
        """Folder of the activations of a split."""
        return self.settings.out / "acts" / split

    def collect(self) -> None:
        """Activations of training and held-out texts."""
        s = self.settings
        for split, tokens in (("train", s.tokens), ("heldout", s.heldout_tokens)):
            hook = (s.hook,) if s.hook else ()
            job = CollectJob.of(
                s, text_column=s.texts_column, out=self.acts(split), split=split, tokens=tokens, hook=hook
            )
            collect(job, model=self.model, texts=self.texts, repeatable=not self.in_memory, say=_quiet)

    def train(self, *names: str) -> None:
        """Trained models: the GLP, the SAE, or PCA, the Gaussian, raw activations and random features."""
        s, d_in = self.settings, self.store.d_in
        width = s.glp_width or d_in
        mlp = s.glp_mlp or 2 * width
        own: dict[str, Json] = {
            "glp": {
                "rows": s.rows, "batch_size": s.glp_batch, "lr": s.glp_lr, "d_model": width, "d_mlp": mlp,
                "n_layers": s.glp_layers, "validation": self.acts("heldout"),
            },
            "sae": {
                "rows": s.rows, "batch_size": s.sae_batch, "lr": s.sae_lr, "n_latents": s.sae_latents or 2 * d_in,
                "k": s.sae_k, "validation": self.acts("heldout"),
            },
            "pca_raw": {"kind": "pca", "standardize": False},
            "random": {"n_features": s.glp_layers * mlp},
        }  # fmt: skip
        earlier = s.out / "models" / "glp.state"
        if "glp" in names and earlier.exists():  # where earlier versions kept an interrupted training
            (s.out / "models" / "glp").mkdir(exist_ok=True)
            earlier.rename(s.out / "models" / "glp" / STATE)
        for name in names:
            changes: Json = {"kind": name, **own.get(name, {})}
            job = TrainJob(
                store=(self.acts("train"),), out=s.out / "models" / name, device=s.device, seed=s.seed,
                overwrite=True, **changes,
            )  # fmt: skip
            train(job, say=_quiet)

    def measure(self, suite: Suite) -> None:
        """The results of a suite."""
        out, kind = self.settings.out, suite.settings
        changes: Json = suite.job.in_comparison(out)
        changes["models"] = tuple(f"{name}={out / 'models' / name}" for name in changes["models"])
        if issubclass(kind, ColumnSettings):
            changes["text_column"] = self.settings.texts_column
        job = kind.of(self.settings, out=out / "results" / suite.name, overwrite=True, **changes)
        model = self.model if issubclass(kind, LanguageModelSettings) else None
        run_suite(job, model=model, texts=self.texts, page=False, say=_quiet)

    def report(self) -> None:
        """The page, and all numbers in one file each."""
        from glp_lens import models
        from glp_lens.files import versions

        s, about = self.settings, self.store.provenance()
        trained = ("glp", "sae", "pca", "pca_raw", "gaussian", "raw")
        training = {name: models.load(s.out / "models" / name).provenance.get("training", {}) for name in trained}
        seconds = ", ".join(f"{name} {value:.0f}" for name, value in stage_seconds(s.out).items())
        context: Json = {
            "config": s.to_json(),
            "training": [{"model": name, **each} for name, each in training.items()],
            "store": about,
            "command": self.command,
            "seed": s.seed,
            "versions": versions(),
            "notes": [f"Wall-clock seconds by stage: {seconds}."],
        }
        title = f"GLP, SAE and PCA on {about['model']['name'].split(' (')[0].split('/')[-1]}"
        results = [each for suite in s.compared for each in read_results(s.out / "results" / suite.name)]
        write_all(results, s.out, {"title": title, "focus": ReportJob.focus, **context})


def _names(settings: type[Settings]) -> tuple[str, ...]:
    """Names of the settings of a class; seed and context are those of the whole run."""
    return tuple(each.name for each in options(settings) if each.name not in ("seed", "context"))


def _quiet(line: str) -> None:
    """Stages say what they do."""


def _hash(texts: Sequence[str | Document]) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    for text in texts:
        digest.update((text if isinstance(text, str) else text.text).encode() + b"\0")
    return digest.hexdigest()
