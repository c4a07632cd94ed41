"""`collect`: activations of a language model into a store."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from glp_lens_cli import options as o
from glp_lens_cli._app import split

from glp_lens.kinds import massive_rule

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore

_DATA, _TOKENS, _SCALE = "Data", "Which tokens", "Scale"


def collect(
    out: o.Out = Path("acts"),
    model: o.Model = "HuggingFaceTB/SmolLM2-135M-Instruct",
    hook: Annotated[
        str,
        typer.Option(
            "--hook",
            help="Hook points, separated by commas; by default the residual stream after the middle layer.",
            rich_help_panel="Language model",
        ),
    ] = "",
    backend: o.Backend = "bridge",
    lm_dtype: o.Dtype = "bfloat16",
    context: o.Context = 128,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", min=1, help="Full-length texts in one forward pass.", rich_help_panel="Language model"
        ),
    ] = 32,
    texts: Annotated[
        str,
        typer.Option(
            "--texts",
            help="txt, jsonl, json, csv, tsv or parquet files or folders of them, '-' for standard input, or "
            "hf:NAME[:CONFIG[:SPLIT]] for a dataset of the Hub, separated by commas; by default the packaged corpus.",
            rich_help_panel=_DATA,
        ),
    ] = "",
    text_column: Annotated[
        str, typer.Option("--text-column", help="Column of the text, or of chat messages.", rich_help_panel=_DATA)
    ] = "text",
    labels: Annotated[
        str,
        typer.Option(
            "--labels", help="Columns of numbers to keep with every row, separated by commas.", rich_help_panel=_DATA
        ),
    ] = "",
    split_: Annotated[
        str,
        typer.Option(
            "--split",
            help="Part of the texts: 'train', 'heldout' (a twentieth, chosen by hash) or 'all'.",
            rich_help_panel=_DATA,
        ),
    ] = "train",
    documents: Annotated[
        int | None, typer.Option("--documents", min=1, help="Most documents to read.", rich_help_panel=_DATA)
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup/--no-dedup", help="Leave out repeated texts.", rich_help_panel=_DATA)
    ] = True,
    stream_texts: Annotated[
        bool,
        typer.Option(
            "--stream-texts", help="Read files bit by bit, for texts larger than memory.", rich_help_panel=_DATA
        ),
    ] = False,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=0, help="Activations to keep; 0 keeps all.", rich_help_panel=_DATA)
    ] = 150_000,
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="Format on disk: bfloat16, float16 or float32.", rich_help_panel=_DATA),
    ] = "bfloat16",
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="Of each text: 'all' tokens, the 'last', their 'mean' or 'max', or a number of them at random.",
            rich_help_panel=_TOKENS,
        ),
    ] = "all",
    exclude: Annotated[
        str,
        typer.Option(
            "--exclude",
            help="Tokens to leave out, separated by commas; 'special' names all special ones.",
            rich_help_panel=_TOKENS,
        ),
    ] = "",
    massive: Annotated[
        str,
        typer.Option(
            "--massive",
            help="Leave out norms beyond the gap in the data ('gap'), or over this many times the median; 0 keeps all.",
            rich_help_panel=_TOKENS,
        ),
    ] = "gap",
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the texts into the model's chat template.", rich_help_panel=_TOKENS)
    ] = False,
    generate: Annotated[
        int,
        typer.Option(
            "--generate",
            min=0,
            help="Continue each text by this many tokens, and collect those instead.",
            rich_help_panel=_TOKENS,
        ),
    ] = 0,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Of --generate; 0 is greedy.", rich_help_panel=_TOKENS)
    ] = 1.0,
    shard: Annotated[
        str,
        typer.Option(
            "--shard",
            help="i/N, from 0: do the i-th of N parts of the work; 'glp-lens store merge' joins them.",
            rich_help_panel=_SCALE,
        ),
    ] = "",
    ray: Annotated[
        int, typer.Option("--ray", min=0, help="Spread the work over this many Ray actors.", rich_help_panel=_SCALE)
    ] = 0,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            min=2,
            help="Keep at most this many shards on disk: 'train' uses them meanwhile and deletes them.",
            rich_help_panel=_SCALE,
        ),
    ] = None,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    config: o.Config = None,
) -> None:
    """Collect activations into a store: HDF5 shards with token, document and position of every row.

    BOS, position 0, padding and massive activations are left out and counted. An interrupted run continues.
    """
    from glp_lens.errors import InputError

    if split_ not in ("train", "heldout", "all"):
        raise InputError(f"--split must be train, heldout or all, got {split_!r}")
    if ray and (shard or window is not None):
        raise InputError("--ray splits the work itself: pass it without --shard and --window")
    if "-" in split(texts) and (ray or shard):
        raise InputError("standard input can be read only once: pass files to --shard or --ray")
    command = {
        "model": {"name": model, "device": device, "dtype": lm_dtype, "backend": backend},
        "texts": {
            "spec": split(texts),
            "split": split_,
            "seed": seed,
            "context": None if chat or generate else context,
            "text_column": text_column,
            "labels": split(labels),
            "dedup": dedup,
            "max_documents": documents,
            "stream": stream_texts,
        },
        "options": {
            "hooks": split(hook) or None,
            "max_tokens": tokens or None,
            "context": context,
            "batch_size": batch_size,
            "dtype": dtype,
            "keep": int(keep) if keep.isdecimal() else keep,
            "exclude": split(exclude),
            "massive": massive_rule(massive),
            "chat": chat,
            "seed": seed,
            "corpus": f"{texts or 'sae-probes texts'} ({split_})",
            "window": window,
        },
        "generate": {"tokens": generate, "temperature": temperature} if generate else None,
    }
    part = _part(shard) if shard else None
    for store in _run(command, out, ray=ray, part=part):
        typer.echo(f"{len(store):,} rows of width {store.d_in} from {store.hook}: {store.path}")
    if part is not None:
        typer.echo(f"part {part[0]} of {part[1]} is done; once all are: glp-lens store merge {out}")


def again(command: dict[str, Any], out: Path) -> None:
    """Repeat a collection from the options in its manifest: what is missing in `out` is collected."""
    for store in _run(command, out):
        typer.echo(f"{len(store):,} rows: {store.path}")


def _run(
    command: dict[str, Any], out: Path, *, ray: int = 0, part: tuple[int, int] | None = None
) -> list[ActivationStore]:
    from glp_lens import corpus, lm
    from glp_lens.activations.collect import Generation
    from glp_lens.activations.collect import collect as run
    from glp_lens.errors import InputError

    try:
        open_model = partial(lm.open_model, **command["model"])
        open_texts = partial(corpus.open_corpus, **command["texts"])
        inspect.signature(lm.open_model).bind(**command["model"])
        inspect.signature(corpus.open_corpus).bind(**command["texts"])
        inspect.signature(run).bind(None, None, **command["options"])
        generate = Generation(**command["generate"]) if command["generate"] else None
        repeatable = "-" not in command["texts"]["spec"]  # standard input is gone once read
        options = {**command["options"], "generate": generate, "command": command if repeatable else None}
    except (KeyError, TypeError) as error:
        raise InputError(f"the recorded command cannot be repeated ({error}): collect again by hand") from None
    if ray:
        from glp_lens.activations.cluster import collect_on_ray

        gpus = int(command["model"]["device"].startswith("cuda"))
        found = collect_on_ray(open_model, open_texts, out=out, actors=ray, num_gpus=gpus, **options)
    else:
        model = open_model()  # a wrong model or hook point is refused before texts are read, which takes a while
        for hook in options["hooks"] or ():
            lm.check_hook(model, hook)
        found = run(model, open_texts(), out=out, part=part, **options)
    return list(found.values()) if isinstance(found, dict) else [found]


def _part(text: str) -> tuple[int, int]:
    from glp_lens.errors import InputError

    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise InputError(f"--shard must be i/N with i from 0 to N-1, for example 0/16, got {text!r}")
    return int(i), int(n)
