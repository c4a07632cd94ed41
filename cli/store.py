"""`store`: inspect activation stores, verify and repair them, merge parts, import and export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from glp_lens.errors import InputError, counted

from ._app import Commands, refuse_empty, split

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore
    from glp_lens.activations.manifest import Manifest

_HELP = "Inspect activation stores, verify and repair them, merge parts, import and export."
app = typer.Typer(cls=Commands, no_args_is_help=True, help=_HELP)

Folder = Annotated[Path, typer.Argument(help="Folder of a store.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="The new folder or file, if not named without an option.")
]
Form = Literal["memmaps", "sae-lens", "arrays"]
FORMS: dict[Form, tuple[str, set[str]]] = {
    "memmaps": ("folder of the released GLP code", {"hook", "dtype"}),
    "sae-lens": ("cached activations of SAELens", {"hook", "keep_first", "drop_tokens"}),
    "arrays": (".npy or .safetensors files", {"hook", "key"}),
}
"""Formats of other programs, each with its description and the options of its import."""


@app.callback(help=_HELP)
def _group() -> None:
    pass


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Folder of a store, or of several.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    png: Annotated[
        Path | None,
        typer.Option("--png", help="Also plot the distribution of norms here.", metavar="FILE"),
    ] = None,
) -> None:
    """Show what a store holds: model, hook point, rows, norms, dead and massive dimensions, exclusions, corpus, tokens.

    For a folder of several stores, one line each. An interrupted store, a part or a stream is shown as such.
    """
    from glp_lens.activations import ActivationStore
    from glp_lens.activations.describe import describe_folder, stores_in

    from . import _info

    if png is not None and png.suffix.lower() != ".png":
        raise InputError(f"--png takes the name of a .png file, got {str(png)!r}")
    folders = stores_in(folder)
    if folders != [folder]:
        if png is not None:
            raise InputError(f"--png draws one store, {folder} holds {len(folders)}: name one, like {folders[0]}")
        several = [_try_describe(path) for path in folders]
        if as_json:
            typer.echo(json.dumps(several, indent=2))
        else:
            _info.show_several(folder, several)
        return
    about = describe_folder(folder)
    if png is not None:
        if "mean_norm" not in about:
            raise InputError(f"--png needs rows, and {folder} has none to read: collect first, or leave --png out")
        from glp_lens.report.plots import norm_histogram

        norms = ActivationStore.open(folder, partial=True).column("norm")
        name = str(about["model"].get("name") or "").partition(" (")[0]
        title = f"{name}\n{about['rows']:,} rows of {about['hook']}".strip()
        norm_histogram(norms, png, title=title, limit=about["max_norm"])
    if as_json:
        typer.echo(json.dumps(about, indent=2))
        return
    _info.show(about)
    if png is not None:
        typer.echo(f"norms: {png}")


def _try_describe(folder: Path) -> dict[str, Any]:
    """The description of a store, or why it cannot be opened: one damaged store must not hide the others."""
    from glp_lens.activations.describe import describe_folder

    try:
        return describe_folder(folder)
    except InputError as error:
        return {"path": str(folder), "error": str(error)}


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a store, or of several.", show_default=False)],
) -> None:
    """Read every byte of a store and compare with the checksums it was written with; of a stream, what is on disk."""
    from glp_lens.activations.describe import stores_in

    damaged: list[str] = []
    for path in stores_in(folder):
        try:
            typer.echo(f"{_verify(path)}: {path}")
        except InputError as error:
            damaged.append(str(error))
    if damaged:
        raise InputError("; ".join(damaged))


def _verify(store: Path) -> str:
    """What to print of a store whose checksums are right."""
    from glp_lens.activations.manifest import Manifest
    from glp_lens.activations.store import verify

    manifest = Manifest.read(store)
    if manifest.window == 0:
        return "no rows to verify, only statistics were kept"
    compared = verify(store, manifest)
    if manifest.window is not None:
        return f"ok: shards of a stream that are on disk: {compared} of {len(manifest.files)} so far"
    size = sum(shard.bytes for shard in manifest.files)
    return f"ok: {counted(manifest.rows, 'row')} in {counted(len(manifest.files), 'shard')}, {size:,} bytes"


@app.command()
def repair(
    folder: Annotated[Path, typer.Argument(help="Folder of a store, or of several.", show_default=False)],
    refetch: Annotated[
        bool, typer.Option("--refetch", help="Collect the dropped shards again, with the recorded options.")
    ] = False,
) -> None:
    """Drop damaged and missing shards, so that the rest can be used and the lost rows be collected again."""
    from glp_lens.activations.describe import stores_in
    from glp_lens.activations.manifest import Manifest
    from glp_lens.activations.repair import repair as run

    roots: dict[Path, tuple[Manifest, str]] = {}
    for store in stores_in(folder):
        before = Manifest.read(store)
        dropped = run(store)
        if not dropped:
            typer.echo(f"ok: as written, {counted(len(before.files), 'shard')}: {store}")
        for shard in dropped:
            typer.echo(f"dropped {shard.name}, {shard.rows:,} of {counted(before.rows, 'row')}: {store}")
        manifest = Manifest.read(store)
        if manifest.dropped:
            out, state = _out(store, manifest), "the rest can be used as it is"
            if out != store:
                state = f"the rows of the stores in {out} are not aligned until the same collect has run again"
            roots[out] = manifest, state
    for out, (manifest, state) in roots.items():
        _collect_again(folder, out, manifest, refetch, state)


def _out(store: Path, manifest: Manifest) -> Path:
    """The `--out` of the collection that a store is of: with several hook points, the folder of all their stores."""
    several = len(manifest.source.get("settings", {}).get("hooks", ())) > 1
    return store.parent if several and store.name == manifest.hook else store


def _collect_again(folder: Path, out: Path, manifest: Manifest, refetch: bool, state: str) -> None:
    """With `refetch`, collect the dropped shards again; otherwise print the state of the store and how to do so."""
    from glp_lens import pipeline

    if manifest.part is not None:
        i, n = manifest.part
        how = f"run the same glp-lens collect --shard {i}/{n} again: it collects exactly the missing shards"
    elif manifest.command is not None and refetch:
        for store in pipeline.collect_again(manifest.command, out):
            typer.echo(f"{counted(len(store), 'row')}: {store.path}")
        return
    elif manifest.command is not None:
        how = f"run glp-lens store repair {folder} --refetch: it collects exactly the missing shards"
    elif "settings" in manifest.source:
        how = "make the same collect() call again: it collects exactly the missing shards"
    else:
        how = "write or import it again, into a new folder"
    if refetch:
        raise InputError(f"{out} has no recorded command to run again: {how}")
    typer.echo(f"{state}; for what is lost, {how}")


@app.command()
def merge(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folder of the merged store, unless --out names it; then those of all the parts, by default those "
            "in OUT/parts.",
            metavar="[OUT] PARTS",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Merge the parts that 'collect --shard i/N' made into the store that one process would have made."""
    from glp_lens.activations.merge import merge as run

    to, parts = _out_and_rest(paths or [], out, first=True)
    _print(run(to, parts))


@app.command("import")
def import_(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="What to import, a folder or array files; then the folder of the new store, unless --out names it.",
            metavar="SOURCES [OUT]",
            show_default=False,
        ),
    ],
    form: Annotated[Form, typer.Option("--from", help="Of the released GLP code, of SAELens, or array files.")],
    hook: Annotated[
        str | None,
        typer.Option("--hook", help="Hook point the rows came from; {layer} in it imports all layer_XX folders."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="Name of the language model: without it no use of the rows with another one is refused."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of memmaps: int16 (bfloat16 bits), float16 or float32.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Of arrays: the tensor in a safetensors file.")] = None,
    keep_first: Annotated[
        bool,
        typer.Option("--keep-first", help="Of sae-lens: keep each sequence's first row, an attention sink."),
    ] = False,
    drop_tokens: Annotated[
        str, typer.Option("--drop-tokens", help="Of sae-lens: ids of tokens to leave out, separated by commas.")
    ] = "",
    out: Out = None,
) -> None:
    """Make a store of activations that another program saved."""
    from glp_lens.activations import convert

    to, sources = _out_and_rest(paths, out, first=False)
    if not sources:
        raise InputError("store import takes what to import and the folder of the new store: name both")
    refuse_empty(hook=hook, model=model, dtype=dtype, key=key)
    given = {"hook": hook, "dtype": dtype, "key": key, "keep_first": keep_first, "drop_tokens": _ids(drop_tokens)}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value}
    if strange := sorted(asked.keys() - FORMS[form][1]):
        raise InputError(f"--{strange[0].replace('_', '-')} is no option of --from {form}: leave it out")
    if form != "sae-lens" and hook is None:
        raise InputError(f"--from {form} needs --hook, for example --hook blocks.7.hook_resid_post")
    if form != "arrays" and len(sources) > 1:
        raise InputError(f"--from {form} takes one folder, got {len(sources)}: import them apart")
    stores: Any
    if form == "arrays":
        stores = convert.import_arrays(sources, to, model=model, **asked)
    elif form == "sae-lens":
        skip_first = not asked.pop("keep_first", False)
        stores = convert.import_sae_lens(sources[0], to, model=model, skip_first=skip_first, **asked)
    elif "{layer}" in str(hook):
        stores = convert.import_memmap_layers(sources[0], to, model=model, **asked)
    else:
        stores = convert.import_memmaps(sources[0], to, model=model, **asked)
    _print(stores)
    if model is None:
        typer.echo(
            "note: the language model of these rows is not known, so that their use with another one is not refused: "
            "--model names it"
        )


@app.command()
def export(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a store; of several layers for memmaps.", show_default=False)
    ],
    named: Annotated[
        Path | None,
        typer.Argument(
            help="New folder, or .npy or .safetensors file, unless --out names it.", metavar="OUT", show_default=False
        ),
    ] = None,
    *,
    form: Annotated[Form, typer.Option("--to", help="Of the released GLP code, of SAELens, or array files.")],
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Of sae-lens: rows of a sequence; by default 128.")
    ] = None,
    out: Out = None,
) -> None:
    """Write the rows of a store for another program; as memmaps, also those of the stores of several layers."""
    from glp_lens.activations import ActivationStore, convert
    from glp_lens.activations.describe import stores_in

    out, strange = _out_and_rest([] if named is None else [named], out, first=True)
    if strange:
        raise InputError(f"two places to write to, --out {out} and {strange[0]}: name one")
    if context is not None and form != "sae-lens":
        raise InputError(f"--context is no option of --to {form}: leave it out")
    if form == "memmaps" and (folders := stores_in(folder)) != [folder]:
        stores = [ActivationStore.open(path) for path in folders]
        convert.export_memmap_layers(stores, out)
        amount = f"{counted(sum(map(len, stores)), 'row')} of {counted(len(stores), 'layer')}"
        typer.echo(f"{amount} as {FORMS[form][0]}: {out}")
        return
    store = ActivationStore.open(folder)
    left_out = 0
    if form == "memmaps":
        convert.export_memmaps(store, out)
    elif form == "arrays":
        convert.export_arrays(store, out)
    else:
        left_out = convert.export_sae_lens(store, out, context=context or 128)
    note = f" ({left_out:,} at the end fill no sequence and are left out)" if left_out else ""
    typer.echo(f"{counted(len(store) - left_out, 'row')} as {FORMS[form][0]}{note}: {out}")


def _out_and_rest(paths: Sequence[Path], out: Path | None, *, first: bool) -> tuple[Path, list[Path]]:
    """Where to write, and the other paths: without `--out` it is the first or the last of them.

    Raises:
        InputError: it is named nowhere.
    """
    if out is not None:
        return out, list(paths)
    if not paths:
        raise InputError("where to write is missing: name it, or pass --out")
    return (paths[0], list(paths[1:])) if first else (paths[-1], list(paths[:-1]))


def _ids(text: str) -> list[int]:
    items = split(text)
    if not all(item.isdecimal() for item in items):
        raise InputError(f"--drop-tokens takes token ids separated by commas, for example 0,2; got {text!r}")
    return [int(item) for item in items]


def _print(stores: ActivationStore | dict[str, ActivationStore]) -> None:
    for store in stores.values() if isinstance(stores, dict) else [stores]:
        typer.echo(f"{counted(len(store), 'row')} of width {store.d_in} from {store.hook}: {store.path}")
