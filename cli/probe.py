"""`probe`: sparse probing of trained models, from the texts or from a labelled store."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from glp_lens_cli import _models as m
from glp_lens_cli import options as o
from glp_lens_cli._app import numbers, split

if TYPE_CHECKING:
    from glp_lens.artifacts import ActivationModel
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.probing import Task, TaskActivations

_TASKS, _PROBES, _CONTROLS = "Tasks", "Probes", "Controls"

Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        help="Names or patterns of sae-probes' 113 tasks ('162_agnews_1,8*'), 'all' of them, or your own csv, tsv, "
        "jsonl, json or parquet files, separated by commas. By default one task from each of many families.",
        rich_help_panel=_TASKS,
    ),
]
TextColumn = Annotated[
    str, typer.Option("--text-column", help="Column of the texts in your own files.", rich_help_panel=_TASKS)
]
LabelColumn = Annotated[
    str, typer.Option("--label-column", help="Column of the classes in your own files.", rich_help_panel=_TASKS)
]
GroupColumn = Annotated[
    str | None,
    typer.Option(
        "--group-column",
        help="Column of your own files that says which texts belong together: they are never parted between training "
        "and test. By default equal texts.",
        rich_help_panel=_TASKS,
    ),
]
SplitColumn = Annotated[
    str | None,
    typer.Option(
        "--split-column",
        help="Column of your own files that says train or test. By default a quarter is drawn for the test.",
        rich_help_panel=_TASKS,
    ),
]
Positive = Annotated[
    str | None,
    typer.Option(
        "--positive",
        help="Of your own classes, where there are more than two: the one against the rest.",
        rich_help_panel=_TASKS,
    ),
]
Labelled = Annotated[
    Path | None,
    typer.Option(
        "--store", help="Probe the rows of an activation store with labels, instead of texts.", rich_help_panel=_TASKS
    ),
]
Label = Annotated[str | None, typer.Option("--label", help="Label column of that store.", rich_help_panel=_TASKS)]
Train = Annotated[
    int,
    typer.Option("--probe-train", min=0, help="Most training texts a task; 0 takes all.", rich_help_panel=_TASKS),
]
Test = Annotated[
    int, typer.Option("--probe-test", min=0, help="Most test texts a task; 0 takes all.", rich_help_panel=_TASKS)
]
Pooling = Annotated[
    str,
    typer.Option(
        "--pooling",
        help="What of a text is a row: its last token, the mean or max over its tokens, or all of them.",
        rich_help_panel=_TASKS,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder for the texts' activations, which several runs may share. By default 'cache' in --out.",
        rich_help_panel=_TASKS,
    ),
]
Sigmas = Annotated[
    str,
    typer.Option(
        "--sigmas",
        help="Noise levels at which a GLP's meta-neurons are read, separated by commas. The first is compared; more "
        "are shown as a sweep, and side by side as one set of features.",
        rich_help_panel=_PROBES,
    ),
]
Ks = Annotated[
    str,
    typer.Option(
        "--ks",
        help="Numbers of features of the k-sparse probes, separated by commas, 'dense' for all of them; or 'none'.",
        rich_help_panel=_PROBES,
    ),
]
Seeds = Annotated[
    int, typer.Option("--seeds", min=1, help="Noise seeds of models with randomness.", rich_help_panel=_PROBES)
]
Neurons = Annotated[
    bool,
    typer.Option(
        "--neurons/--no-neurons",
        help="Probe the MLP neurons of the language model itself, at the layer of the hook point.",
        rich_help_panel=_CONTROLS,
    ),
]
Random = Annotated[
    bool,
    typer.Option(
        "--random/--no-random",
        help="Probe random features too, as many as the first GLP's.",
        rich_help_panel=_CONTROLS,
    ),
]


def probe(
    models: o.Models,
    out: o.Out = Path("results/probing"),
    model: o.Model = "HuggingFaceTB/SmolLM2-135M-Instruct",
    hook: o.Hook = None,
    backend: o.Backend = "bridge",
    lm_dtype: o.Dtype = "bfloat16",
    context: o.Context = 128,
    tasks: Tasks = "",
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    group_column: GroupColumn = None,
    split_column: SplitColumn = None,
    positive: Positive = None,
    store: Labelled = None,
    label: Label = None,
    probe_train: Train = 1024,
    probe_test: Test = 1024,
    pooling: Pooling = "last",
    cache: Cache = None,
    sigmas: Sigmas = "0.1",
    ks: Ks = "1,2,5,16,64,128",
    seeds: Seeds = 3,
    neurons: Neurons = False,
    random: Random = False,
    allow_mismatch: o.AllowMismatch = False,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    overwrite: o.Replace = False,
    config: o.Config = None,
) -> None:
    """Sparse probing: how well single features, and few of them, of each model separate two classes.

    Every feature is scored exactly. Prints a table and writes report.html, results.json and metrics.csv to --out.
    Run it again to continue where it stopped.
    """
    from glp_lens import provenance
    from glp_lens.evals import probing
    from glp_lens.evals.entries import Entry
    from glp_lens.evals.probing.page import text_table
    from glp_lens.models.neurons import Neurons
    from glp_lens.report import write_report

    o.refuse_overwrite(out / "results.json", overwrite=overwrite)
    levels, sizes = numbers(sigmas, "--sigmas"), _sizes(ks)
    trained = m.load(models, device)
    out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is told before the texts are run
    most = {"max_train": probe_train or None, "max_test": probe_test or None}
    if store is not None:
        task, activations = _of_store(store, label, positive, most, seed, texts=bool(tasks) or neurons)
        loaded, entries = [task], _entries(trained, activations.source["hook"], levels, random=random, seed=seed)
    else:
        columns = {"text": text_column, "label": label_column, "group": group_column, "split": split_column}
        loaded = probing.open_tasks(split(tasks) or None, **most, **columns, positive=positive, seed=seed)
        opened, point = m.open_lm(model, hook, backend, lm_dtype, device, trained)
        entries = _entries(trained, point, levels, random=random, seed=seed)
        here = provenance.here(opened, point)  # a model that does not fit is told before the texts are run
        for entry in entries:
            at = {**here, "hook": point if hook else entry.model.hook or point, "d_in": None}
            provenance.check_models({entry.label: entry.model}, at, allow_mismatch=allow_mismatch)
        points = [point] if hook else [point, *(entry.model.hook for entry in entries if entry.model.hook)]
        if neurons:
            entries.append(Entry("neurons", own := Neurons.of(opened, point)))
            points.append(str(own.hook))
        activations = probing.collect(
            opened, loaded, points, pooling=pooling, context=context, cache=cache or out / "cache"
        )
    results = probing.run(
        entries,
        probing.ProbingData(loaded, activations, device),
        probing.ProbingSettings(ks=sizes, seeds=seeds, seed=seed),  # type: ignore[arg-type]
        folder=out / "scores",
        allow_mismatch=allow_mismatch,
    )
    results.save(out)
    command = shlex.join(["glp-lens", *sys.argv[1:]])
    page = write_report([results], out, {"title": "Sparse probing", "command": command, "seed": seed})
    typer.echo(text_table(results))
    for sentence in results.failures:
        typer.echo(f"note: {sentence}")
    typer.echo(f"saved: {page}, {out / 'results.json'} and {out / 'metrics.csv'}")


def _sizes(text: str) -> tuple[int | str, ...]:
    """Sizes of the k-sparse probes; none of 'none'."""
    from glp_lens.errors import InputError

    found = [] if text.strip() == "none" else split(text)
    if not all(size == "dense" or (size.isdecimal() and int(size)) for size in found) or not (found or text == "none"):
        raise InputError(f"--ks takes numbers of features, 'dense', or 'none', separated by commas; got {text!r}")
    return tuple(size if size == "dense" else int(size) for size in found)


def _of_store(
    folder: Path, label: str | None, positive: str | None, most: dict[str, int | None], seed: int, *, texts: bool
) -> tuple[Task, TaskActivations]:
    """The task that a labelled column of a store makes."""
    from glp_lens.activations import ActivationStore
    from glp_lens.errors import InputError
    from glp_lens.evals import probing

    if label is None or texts:
        raise InputError(
            "--store takes --label, a column of classes, and neither --tasks nor --neurons: it has no texts"
        )
    return probing.from_store(ActivationStore.open(folder), label, positive=positive, seed=seed, **most)


def _entries(
    trained: dict[str, ActivationModel], point: str, levels: tuple[float, ...], *, random: bool, seed: int
) -> list[Entry]:
    """What is compared, random features among it if they are asked for and not given."""
    from glp_lens.pipeline.entries import probing_entries, random_control

    models = m.bound(trained, point)
    if random and not any(model.kind == "random" for model in models.values()):
        models["random"] = random_control(models, seed=seed)
    return probing_entries(models, levels)
