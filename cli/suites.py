"""`steer` and `fidelity`: one suite on trained models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from glp_lens_cli import _models as m
from glp_lens_cli import compare as c
from glp_lens_cli import options as o
from glp_lens_cli._app import numbers, split

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.results import Results


def steer(
    models: o.Models,
    store: o.Store = Path("acts"),
    out: o.Out = Path("results/steering"),
    model: o.Model = "HuggingFaceTB/SmolLM2-135M-Instruct",
    hook: o.Hook = None,
    backend: o.Backend = "bridge",
    lm_dtype: o.Dtype = "bfloat16",
    concept: c.Concept = "sports",
    strengths: c.Strengths = "0.2,0.4,0.6,0.8,1.0",
    prompts: c.Prompts = 24,
    new_tokens: c.NewTokens = 24,
    project_u: c.ProjectU = 0.5,
    project_sigma: c.ProjectSigma = 0.2,
    fast: c.Fast = False,
    allow_mismatch: o.AllowMismatch = False,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    overwrite: o.Replace = False,
    config: o.Config = None,
) -> None:
    """Steer generation towards a topic, plain and repaired by each model, and judge concept and fluency.

    The store says how long a typical activation is: strengths are in units of its median norm.
    """
    from glp_lens.activations import ActivationStore
    from glp_lens.evals import steering
    from glp_lens.pipeline.entries import matched_ranks, projector_entries

    o.refuse_overwrite(out / "results.json", overwrite=overwrite)
    trained = m.load(models, device)
    alphas = numbers(strengths, "--strengths")
    activations = ActivationStore.open(store)
    trained = m.bound(trained, activations.hook)
    _check_store(activations, trained, "glp-lens collect --out acts", allow_mismatch=allow_mismatch)
    ranks = matched_ranks(trained, activations.sample(2048, seed=0))
    opened, point = m.open_lm(model, hook, backend, lm_dtype, device, trained)
    results = steering.run(
        projector_entries(trained, project_u, project_sigma, ranks, fast=fast),
        steering.SteeringData(opened, point, activations.median_norm),
        steering.SteeringSettings(
            concept=concept,  # type: ignore[arg-type]
            strengths=alphas,
            prompts=prompts,
            new_tokens=new_tokens,
            seed=seed,
        ),
        folder=out / "cache",
        allow_mismatch=allow_mismatch,
    )
    _finish(results, out, "harmonic", setting="alpha=chosen")


def fidelity(
    models: o.Models,
    store: Annotated[
        Path, typer.Option("--store", help="Store of held-out activations.", rich_help_panel="Data")
    ] = Path("acts_heldout"),
    out: o.Out = Path("results"),
    model: o.Model = "HuggingFaceTB/SmolLM2-135M-Instruct",
    hook: o.Hook = None,
    backend: o.Backend = "bridge",
    lm_dtype: o.Dtype = "bfloat16",
    context: o.Context = 128,
    texts: Annotated[
        str,
        typer.Option(
            "--texts",
            help="Held-out texts: files or folders, separated by commas; by default the packaged held-out ones.",
            rich_help_panel="Data",
        ),
    ] = "",
    documents: c.Documents = 24,
    project_u: c.ProjectU = 0.5,
    fast: c.Fast = False,
    allow_mismatch: o.AllowMismatch = False,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    overwrite: o.Replace = False,
    config: o.Config = None,
) -> None:
    """Reconstruction error, change in language-model loss, and held-out flow-matching loss.

    The last goes to the folder 'density' in --out, the others to 'fidelity'.
    """
    from glp_lens import corpus
    from glp_lens.evals import density
    from glp_lens.evals import fidelity as suite
    from glp_lens.evals.entries import Entry
    from glp_lens.pipeline.entries import matched_ranks, reconstruction_entries

    o.refuse_overwrite(out / "density/results.json", out / "fidelity/results.json", overwrite=overwrite)
    trained = m.load(models, device)
    heldout = _open_heldout(store, trained, allow_mismatch=allow_mismatch)
    trained = m.bound(trained, heldout.hook)
    piece = corpus.CHARACTERS_PER_TOKEN * context
    pool = list(corpus.from_files(split(texts), piece=piece)) if texts else corpus.packaged(seed, "heldout")
    opened, point = m.open_lm(model, hook, backend, lm_dtype, device, trained)
    entries = [Entry(label, found) for label, found in trained.items()]
    rows = density.DensityData(heldout.rows(), heldout.column("doc_id"), heldout.provenance())
    settings = density.DensitySettings(seed=seed)
    found = density.run(entries, rows, settings, allow_mismatch=allow_mismatch)
    _finish(found, out / "density", "flow_loss", setting="sigma=all")
    results = suite.run(
        reconstruction_entries(trained, project_u, matched_ranks(trained, heldout.sample(2048, seed=0)), fast=fast),
        suite.FidelityData(opened, point, pool, heldout.stats.mean, heldout.stats.var.sqrt()),
        suite.FidelitySettings(documents=documents, context=context, seed=seed),
        allow_mismatch=allow_mismatch,
    )
    _finish(results, out / "fidelity", "delta_nll")


def _check_store(
    store: ActivationStore, trained: dict[str, ActivationModel], command: str, *, allow_mismatch: bool
) -> None:
    """Refuse a store of other activations than the models were trained on."""
    from glp_lens import provenance

    for label, model in trained.items():
        remedy = f"collect activations for {store.path} as in training, '{command}"
        remedy += f" --hook {model.hook}'" if model.hook else "'"
        provenance.check(
            f"model {label!r} was trained",
            provenance.trained_on(model),
            store.provenance(),
            remedy=remedy,
            allow_mismatch=allow_mismatch,
        )


def _open_heldout(folder: Path, trained: dict[str, ActivationModel], *, allow_mismatch: bool) -> ActivationStore:
    """A store that can stand for unseen activations: of the models' hook point, and not what they were trained on."""
    from glp_lens import provenance
    from glp_lens.activations import ActivationStore
    from glp_lens.errors import InputError

    collect = "glp-lens collect --split heldout --out acts_heldout"
    if not folder.exists():
        raise InputError(f"no activation store at {folder}: collect held-out activations with '{collect}'")
    store = ActivationStore.open(folder)
    trained = m.bound(trained, store.hook)
    _check_store(store, trained, collect, allow_mismatch=allow_mismatch)
    manifest = store.provenance()["manifest_hash"]
    for label, model in trained.items():
        if provenance.trained_on(model).get("manifest_hash") == manifest:
            raise InputError(
                f"{folder} is the store that model {label!r} was trained on, expected held-out "
                f"activations: collect them with '{collect}'"
            )
    return store


def _finish(results: Results, out: Path, metric: str, **where: str) -> None:
    """Save, and print the metric that matters most."""
    results.save(out)
    frame = results.frame()
    frame = frame[frame.metric == metric]
    for column, value in where.items():
        frame = frame[frame[column].str.startswith(value)]
    for row in frame.itertuples():
        interval = f" [{row.ci_low:.3f}, {row.ci_high:.3f}]" if row.ci_low == row.ci_low else ""
        typer.echo(f"{row.model:24} {row.setting:32} {metric} {row.value:.3f}{interval}")
    for sentence in results.failures:
        typer.echo(f"note: {sentence}")
    typer.echo(f"saved: {out / 'results.json'} and {out / 'metrics.csv'}")
