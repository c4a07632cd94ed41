"""`quickstart` and `compare`: the whole comparison in one command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from glp_lens_cli import options as o
from glp_lens_cli._app import numbers, split

Tokens = Annotated[
    int, typer.Option("--tokens", min=1, help="Activations collected for training.", rich_help_panel="Sizes")
]
HeldoutTokens = Annotated[
    int, typer.Option("--heldout-tokens", min=1, help="Activations of held-out documents.", rich_help_panel="Sizes")
]
Rows = Annotated[
    int,
    typer.Option(
        "--rows",
        min=1,
        help="Activations shown to the GLP and to the SAE each; above --tokens means several epochs.",
        rich_help_panel="Sizes",
    ),
]
GlpWidth = Annotated[
    int, typer.Option("--glp-width", min=1, help="Width of the GLP's denoiser.", rich_help_panel="Sizes")
]
GlpMlp = Annotated[
    int,
    typer.Option("--glp-mlp", min=1, help="Meta-neurons in each block of the GLP's denoiser.", rich_help_panel="Sizes"),
]
GlpLayers = Annotated[
    int, typer.Option("--glp-layers", min=1, help="Blocks of the GLP's denoiser.", rich_help_panel="Sizes")
]
SaeLatents = Annotated[int, typer.Option("--sae-latents", min=1, help="Dictionary size.", rich_help_panel="Sizes")]
SaeK = Annotated[int, typer.Option("--sae-k", min=1, help="Latents active on a row.", rich_help_panel="Sizes")]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        help="Patterns of sae-probes task names, separated by commas: '162_agnews_1,8*'. "
        "By default one task from each of many families.",
        rich_help_panel="Suites",
    ),
]
ProbeTrain = Annotated[
    int, typer.Option("--probe-train", min=10, help="Most training prompts a task.", rich_help_panel="Suites")
]
ProbeTest = Annotated[
    int, typer.Option("--probe-test", min=4, help="Most test prompts a task.", rich_help_panel="Suites")
]
Concept = Annotated[
    str, typer.Option("--concept", help="Steer towards sports, business or world.", rich_help_panel="Suites")
]
Strengths = Annotated[
    str,
    typer.Option(
        "--strengths",
        help="Steering strengths, in median activation norms, separated by commas.",
        rich_help_panel="Suites",
    ),
]
Prompts = Annotated[int, typer.Option("--prompts", min=2, help="Neutral prompts to steer.", rich_help_panel="Suites")]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", min=1, help="Tokens generated after each.", rich_help_panel="Suites")
]
ProjectU = Annotated[
    float,
    typer.Option(
        "--project-u",
        min=0,
        max=0.999,
        help="Noise level of the GLP's projection as the released code's u: 0 is pure noise, near 1 is data; "
        "0.5 is sigma 0.474 on 20 steps.",
        rich_help_panel="Suites",
    ),
]
ProjectSigma = Annotated[
    float,
    typer.Option(
        "--project-sigma",
        min=0.001,
        max=0.999,
        help="A second, milder noise level of the GLP's projection.",
        rich_help_panel="Suites",
    ),
]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Project with a third of the GLP's network calls, at about the error of the default.",
        rich_help_panel="Suites",
    ),
]
Documents = Annotated[
    int,
    typer.Option("--documents", min=1, help="Held-out documents for the change in LM loss.", rich_help_panel="Suites"),
]


QUICKSTART = """See the whole idea work: GLP, SAE, PCA and baselines compared on a small language model.

Minutes on two CPU cores, offline if the packaged model is installed. Writes report.html, results.json,
metrics.csv and the trained models to --out. Run it again to continue where it stopped.
"""


def compare(
    out: o.Out = Path("runs"),
    model: o.Model = "HuggingFaceTB/SmolLM2-135M-Instruct",
    hook: o.Hook = None,
    backend: o.Backend = "bridge",
    lm_dtype: o.Dtype = "bfloat16",
    context: o.Context = 128,
    texts: o.Texts = "",
    tokens: Tokens = 150_000,
    heldout_tokens: HeldoutTokens = 8_000,
    rows: Rows = 400_000,
    glp_width: GlpWidth = 768,
    glp_mlp: GlpMlp = 1536,
    glp_layers: GlpLayers = 3,
    sae_latents: SaeLatents = 2304,
    sae_k: SaeK = 32,
    tasks: Tasks = "",
    probe_train: ProbeTrain = 256,
    probe_test: ProbeTest = 200,
    concept: Concept = "sports",
    strengths: Strengths = "0.2,0.4,0.6,0.8,1.0",
    prompts: Prompts = 24,
    new_tokens: NewTokens = 24,
    project_u: ProjectU = 0.5,
    project_sigma: ProjectSigma = 0.2,
    fast: Fast = False,
    documents: Documents = 24,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    overwrite: o.Overwrite = False,
    config: o.Config = None,
) -> None:
    """Compare GLP, SAE, PCA and baselines on a language model, by default the packaged one.

    Collects activations, trains every model on the same rows, runs all suites, and writes report.html,
    results.json, metrics.csv and the trained models to --out. Run it again to continue where it stopped.
    """
    from glp_lens.pipeline import CompareConfig
    from glp_lens.pipeline import compare as run

    settings = CompareConfig(
        model=model,
        backend=backend,  # type: ignore[arg-type]
        lm_dtype=lm_dtype,
        hook=hook,
        device=device,
        seed=seed,
        texts=tuple(split(texts)),
        tokens=tokens,
        heldout_tokens=heldout_tokens,
        context=context,
        rows=rows,
        glp_width=glp_width,
        glp_mlp=glp_mlp,
        glp_layers=glp_layers,
        sae_latents=sae_latents,
        sae_k=sae_k,
        tasks=tuple(split(tasks)),
        probe_train=probe_train,
        probe_test=probe_test,
        concept=concept,
        strengths=numbers(strengths, "--strengths"),
        prompts=prompts,
        new_tokens=new_tokens,
        project_u=project_u,
        project_sigma=project_sigma,
        fast=fast,
        documents=documents,
    )
    report = run(settings, out, overwrite=overwrite, command=shlex.join(["glp-lens", *sys.argv[1:]]), say=typer.echo)
    typer.echo(f"report: {report}\nnumbers: {out / 'metrics.csv'} and {out / 'results.json'}")
