"""The whole comparison in one call: activations, models, suites, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from glp_lens import corpus, lm, models, provenance
from glp_lens.activations import ActivationStore, collect
from glp_lens.artifacts import ActivationModel, versions, write_atomic, write_json
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.evals import density, fidelity, probing, steering
from glp_lens.evals.entries import Entry
from glp_lens.evals.results import Results, metrics_frame
from glp_lens.evals.steering.judges import SentenceEmbedder
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.glp import GLP
from glp_lens.models.pca import PCA
from glp_lens.models.random_features import RandomFeatures
from glp_lens.models.raw import Raw
from glp_lens.models.sae import SAE
from glp_lens.pipeline.config import CompareConfig
from glp_lens.pipeline.entries import matched_ranks, probing_entries, projector_entries, reconstruction_entries
from glp_lens.pipeline.stages import Stage, run_stages, stage_seconds
from glp_lens.report import write_report
from glp_lens.report.plots import loss_curve
from glp_lens.training.config import recipe
from glp_lens.training.history import add_to_history, read_history, write_history
from glp_lens.types import Json

SUITES = ("density", "probing", "steering", "fidelity")
_LM = ("model", "backend", "lm_dtype", "hook", "device", "seed")
_GLP = ("rows", "glp_width", "glp_mlp", "glp_layers", "glp_lr", "glp_batch")
_SAE = ("rows", "sae_latents", "sae_k", "sae_lr", "sae_batch")


def compare(
    config: CompareConfig,
    out: str | Path,
    *,
    model: lm.Model | None = None,
    texts: Sequence[str | Document] | None = None,
    overwrite: bool = False,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Train a GLP, an SAE, PCA and the baselines on one language model's activations, and compare them.

    Writes to `out`: `acts/` (the stores), `models/` (the trained artifacts), `results/` (one folder a suite),
    `report.html`, `plots/`, `results.json` and `metrics.csv`. A stage whose output is there and matches is
    skipped; an interrupted one continues.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of `config.model`.
        texts: training texts instead of `config.texts`; a twentieth, chosen by hash, is held out.
        overwrite: redo stages that were done with other settings, instead of refusing.
        command: the command line, for the report.
        say: prints one line of progress.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: bad settings, a model or hook point that cannot be used, or a folder that holds another run.
    """
    _check(config)
    run = _Comparison(config, Path(out), model, texts, command)
    if texts is None and config.texts:
        if not (run.out / "stages" / "collect.json").exists():
            _ = run.hook  # a wrong model or hook point is refused before texts are read, which takes a while
        texts = list(corpus.from_files(config.texts, piece=corpus.CHARACTERS_PER_TOKEN * config.context))
        run.texts = texts
    settings = config.to_json()
    if model is not None:
        settings["model"] = f"{lm.name_of(model)}, weights {lm.weights_hash(model)}"
    if texts is not None:
        settings["texts"] = f"{len(texts)} texts, hash {_hash(texts)}"
    run_stages(run.stages(), settings, run.out, overwrite=overwrite, say=say)
    return run.out / "report.html"


class _Comparison:
    """One run: the stages, and what they share, each opened when first needed."""

    def __init__(
        self,
        config: CompareConfig,
        out: Path,
        model: lm.Model | None,
        texts: Sequence[str | Document] | None,
        command: str | None,
    ) -> None:
        self.config, self.out, self.given_model, self.texts, self.command = config, out, model, texts, command

    def stages(self) -> list[Stage]:
        """All stages, in order."""
        fits = ("train-glp", "train-sae", "train-baselines")
        return [
            Stage("collect", (*_LM, "texts", "tokens", "heldout_tokens", "context"), (), ("acts",), self.collect),
            Stage("train-glp", _GLP, ("collect",), ("models/glp", "models/glp.state"), self.train_glp),
            Stage("train-sae", _SAE, ("collect",), ("models/sae",), self.train_sae),
            Stage(
                "train-baselines",
                ("glp_mlp", "glp_layers"),
                ("collect",),
                ("models/pca", "models/pca_raw", "models/gaussian", "models/raw", "models/random"),
                self.train_baselines,
            ),
            Stage("density", (), fits, ("results/density",), self.density),
            Stage(
                "probing",
                ("tasks", "probe_train", "probe_test", "sigmas", "ks"),
                fits,
                ("results/probing", "cache/probing"),
                self.probing,
            ),
            Stage(
                "steering",
                ("concept", "strengths", "prompts", "new_tokens", "project_u", "project_sigma", "fast"),
                fits,
                ("results/steering", "cache/steering"),
                self.steering,
            ),
            Stage("fidelity", ("documents", "project_u", "fast"), fits, ("results/fidelity",), self.fidelity),
            Stage("report", (), SUITES, ("report.html", "results.json", "metrics.csv", "plots"), self.report),
        ]

    # -- what the stages share -----------------------------------------------------------------------------

    @cached_property
    def model(self) -> lm.Model:
        """The language model."""
        c = self.config
        model = self.given_model
        if model is None:
            model = lm.open_model(c.model, device=c.device, dtype=c.lm_dtype, backend=c.backend)
        if (self.out / "stages" / "train-glp.json").exists():  # then the store is complete
            found = provenance.mismatches(self.store.provenance(), provenance.here(model, self.store.hook))
            if found:
                raise InputError(
                    f"{self.out} was collected {', '.join(found)}: use the same copy of the model, or another folder"
                )
        return model

    @cached_property
    def hook(self) -> str:
        """The hook point of the run."""
        return lm.check_hook(self.model, self.config.hook or lm.default_hook(self.model))

    @cached_property
    def store(self) -> ActivationStore:
        """Training activations."""
        return ActivationStore.open(self.out / "acts" / "train")

    @cached_property
    def heldout(self) -> ActivationStore:
        """Activations of held-out documents."""
        store = ActivationStore.open(self.out / "acts" / "heldout")
        provenance.check(
            f"{self.store.path} was collected",
            self.store.provenance(),
            store.provenance(),
            remedy=f"collect {store.path} the same way, with overwrite",
        )
        return store

    def documents(self, split: corpus.Split) -> list[Document]:
        """Texts of a split, in seeded order."""
        if self.texts is None:
            return corpus.packaged(self.config.seed, split)
        return corpus.split_documents(self.texts, split, seed=self.config.seed)

    @cached_property
    def trained(self) -> dict[str, ActivationModel]:
        """The trained models by kind."""
        return {
            kind: models.load(self.out / "models" / kind).to(self.config.device)
            for kind in ("glp", "sae", "pca", "pca_raw", "gaussian", "raw", "random")
        }

    @cached_property
    def ranks(self) -> dict[str, int]:
        """The ranks at which PCA has the SAE's error on held-out rows."""
        return matched_ranks(self.trained, self.heldout.sample(2048, seed=0))

    # -- stages --------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Activations of training and held-out texts."""
        c = self.config
        name = "sae-probes texts" if self.texts is None else ", ".join(c.texts) or "own texts"
        sizes: dict[corpus.Split, int] = {"train": c.tokens, "heldout": c.heldout_tokens}
        for split, tokens in sizes.items():
            collect(
                self.model,
                self.documents(split),
                self.hook,
                self.out / "acts" / split,
                max_tokens=tokens,
                context=c.context,
                seed=c.seed,
                corpus=f"{name} ({split})",
            )

    def train_glp(self) -> None:
        """The generative latent prior."""
        c = self.config
        folder = self.out / "models" / "glp"
        glp = GLP.fit(
            self.store,
            recipe("fast", c.rows, batch_size=c.glp_batch, lr=c.glp_lr, seed=c.seed),
            d_model=c.glp_width,
            d_mlp=c.glp_mlp,
            n_layers=c.glp_layers,
            device=c.device,
            validation=self.heldout.sample(2048, seed=0),
            state=self.out / "models" / "glp.state",
            on_entry=partial(add_to_history, folder),
        )
        glp.save_pretrained(folder)
        write_history(folder, glp.history)
        loss_curve(read_history(folder), folder / "loss.png", title="Training of the GLP")
        (self.out / "models" / "glp.state").unlink(missing_ok=True)

    def train_sae(self) -> None:
        """The TopK SAE, by sae-lens."""
        c = self.config
        sae = SAE.fit(
            self.store,
            n_latents=c.sae_latents,
            k=c.sae_k,
            rows=c.rows,
            batch_size=c.sae_batch,
            lr=c.sae_lr,
            autocast=True,
            device=c.device,
            seed=c.seed,
        )
        health = sae.health(self.heldout.rows())
        sae.provenance["training"] |= {"alive": health.alive, "l0": health.l0, "heldout_fvu": health.fvu}
        sae.save_pretrained(self.out / "models" / "sae")

    def train_baselines(self) -> None:
        """PCA, the Gaussian and raw activations, on the same rows; random features, as many as the GLP's."""
        c, rows = self.config, len(self.store)
        seed = c.seed
        for name, standardize in (("pca", True), ("pca_raw", False)):
            pca = PCA.fit(self.store, standardize=standardize, max_rows=rows, seed=seed)
            pca.save_pretrained(self.out / "models" / name)
        Gaussian.fit(self.store, seed=seed).save_pretrained(self.out / "models" / "gaussian")
        Raw.fit(self.store, seed=seed).save_pretrained(self.out / "models" / "raw")
        random = RandomFeatures.fit(self.store, n_features=c.glp_layers * c.glp_mlp, seed=seed)
        random.save_pretrained(self.out / "models" / "random")

    def density(self) -> None:
        """Held-out flow-matching loss beside the Gaussian bound."""
        entries = [Entry(kind, self.trained[kind]) for kind in ("glp", "sae", "pca", "gaussian")]
        data = density.DensityData(self.heldout.rows(), self.heldout.column("doc_id"), self.heldout.provenance())
        results = density.run(entries, data, density.DensitySettings(seed=self.config.seed))
        results.extras["history"] = self._glp().history
        results.save(self.out / "results" / "density")

    def probing(self) -> None:
        """1-D and k-sparse probes on the sae-probes tasks."""
        c = self.config
        tasks = [
            probing.load(name, max_train=c.probe_train, max_test=c.probe_test)
            for name in probing.names(c.tasks or None)
        ]
        cache = self.out / "cache" / "probing"
        activations = probing.collect(self.model, tasks, self.hook, context=c.context, cache=cache)
        results = probing.run(
            probing_entries(self.trained, c.sigmas),
            probing.ProbingData(tasks, activations, c.device),
            probing.ProbingSettings(ks=c.ks, seed=c.seed),
            folder=cache / "scores",
        )
        results.save(self.out / "results" / "probing")

    def steering(self) -> None:
        """Steered generation, plain and repaired."""
        c = self.config
        settings = steering.SteeringSettings(
            concept=c.concept,  # type: ignore[arg-type]
            strengths=c.strengths,
            prompts=c.prompts,
            new_tokens=c.new_tokens,
            seed=c.seed,
        )
        results = steering.run(
            projector_entries(self.trained, c.project_u, c.project_sigma, self.ranks, fast=c.fast),
            steering.SteeringData(self.model, self.hook, self.store.median_norm),
            settings,
            folder=self.out / "cache" / "steering",
        )
        results.save(self.out / "results" / "steering")

    def fidelity(self) -> None:
        """Reconstruction error and the change in language-model loss."""
        c = self.config
        results = fidelity.run(
            reconstruction_entries(self.trained, c.project_u, self.ranks, fast=c.fast),
            fidelity.FidelityData(
                self.model,
                self.hook,
                self.documents("heldout"),
                self.store.stats.mean,
                self.store.stats.var.sqrt(),
            ),
            fidelity.FidelitySettings(documents=c.documents, context=c.context, seed=c.seed),
        )
        results.save(self.out / "results" / "fidelity")

    def report(self) -> None:
        """The page, and all numbers in one file each."""
        results = [Results.load(self.out / "results" / suite) for suite in SUITES]
        seconds = stage_seconds(self.out)
        context: Json = {
            "title": f"GLP, SAE and PCA on {self.store.provenance()['model']['name'].split(' (')[0].split('/')[-1]}",
            "training": training_table({k: m for k, m in self.trained.items() if k != "random"}),  # nothing was trained
            "store": self.store.provenance(),
            "command": self.command,
            "seed": self.config.seed,
            "versions": versions(),
            "notes": [f"Wall-clock seconds by stage: {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}."],
        }
        write_report(results, self.out, context)
        merge_results(results, self.out, {"config": self.config.to_json(), **context})

    def _glp(self) -> GLP:
        glp = self.trained["glp"]
        assert isinstance(glp, GLP)
        return glp


def _check(config: CompareConfig) -> None:
    """Refuse before any work what a late stage would refuse after minutes."""
    probing.names(config.tasks or None)
    SentenceEmbedder.check()
    if config.concept not in steering.NAMES:
        raise InputError(f"concept must be one of {', '.join(steering.NAMES)}, got {config.concept!r}")
    if not 2 <= config.prompts <= len(steering.PROMPTS):
        raise InputError(f"prompts must lie between 2 and {len(steering.PROMPTS)}, got {config.prompts}")


def training_table(trained: dict[str, ActivationModel]) -> list[Json]:
    """What each model got: rows, parameters, compute."""
    return [{"model": kind, **model.provenance.get("training", {})} for kind, model in trained.items()]


def merge_results(results: Sequence[Results], out: Path, context: Json) -> None:
    """`metrics.csv` and `results.json` of all suites together, in `out`."""
    frame = metrics_frame(m for r in results for m in r.metrics)
    write_atomic(out / "metrics.csv", frame.to_csv(index=False))
    suites = {r.suite: r.to_json() for r in results}
    write_json(out / "results.json", {"format": 1, **context, "suites": suites})


def _hash(texts: Sequence[str | Document]) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    for text in texts:
        digest.update((text if isinstance(text, str) else text.text).encode() + b"\0")
    return digest.hexdigest()
