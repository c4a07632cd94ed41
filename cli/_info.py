"""What `store info` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from glp_lens.errors import counted

About = dict[str, Any]
_LEVELS = {"0.01": "1%", "0.25": "25%", "0.5": "median", "0.75": "75%", "0.99": "99%", "1": "max"}
_REASONS = {"position_0": "position 0", "not_chosen": "not chosen", "over_budget": "over the number asked for",
            "over_context": "cut off by the context"}  # fmt: skip


def show(about: About) -> None:
    """Print the description of a store, in groups that fit one screen."""
    page = Table.grid(padding=(0, 2, 0, 0))
    page.add_column(style="bold", no_wrap=True)
    page.add_column(ratio=1)
    groups = {
        "Model": _facts(_model(about)),
        "Rows": _facts(_rows(about)),
        "Norms": _norms(about),
        "Dimensions": _facts(_dimensions(about)),
        "Left out": _left_out(about),
        "Corpus": _facts(_corpus(about)),
        "Tokens": _tokens(about["examples"]),
    }
    for name, group in groups.items():
        if group is not None:
            if page.row_count:
                page.add_row()
            page.add_row(name, group)
    console = Console(highlight=False)
    console.print(Text(about["path"], style="bold"), Text(state(about), style="dim"))
    console.print()
    console.print(page)


def show_several(folder: object, stores: Sequence[About]) -> None:
    """Print one line for each store below a folder."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("store", overflow="fold")
    for name in ("rows", "width", "size", "mean norm"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state")
    for about in stores:
        name = about["path"].removeprefix(f"{folder}/")
        if "error" in about:
            table.add_row(Text(name), "", "", "", "", Text("cannot be opened", style="red"))
            continue
        norm = f"{about['mean_norm']:,.4g}" if "mean_norm" in about else ""
        numbers = (f"{about['rows']:,}", f"{about['d_in']:,}", size(about["bytes"]), norm)
        table.add_row(Text(name), *numbers, state(about))
    console = Console(highlight=False)
    console.print(Text(f"{folder}: {counted(len(stores), 'store')}", style="bold"))
    console.print()
    console.print(table)


def state(about: About) -> str:
    """Whether a store is complete, being collected or interrupted, and what part or stream it is."""
    words = []
    if about["part"]:
        words.append("part {}/{}".format(*about["part"]))
    if about["window"]:
        words.append(f"stream of {counted(about['window'], 'shard')}")
    running = "being collected" if about.get("being_written") else "interrupted"
    words.append("complete" if about["complete"] else running)
    if about["dropped"]:
        words.append(f"{len(about['dropped'])} dropped")
    return ", ".join(words)


def size(n: int) -> str:
    """A number of bytes with a binary unit."""
    value, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:,.0f} B" if units[0] == "B" else f"{value:,.1f} {units[0]}"


def listed(items: Iterable[object], most: int = 6) -> str:
    """The first few of many, and how many more there are."""
    names = [str(item) for item in items]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _facts(facts: dict[str, str]) -> RenderableType | None:
    """A table of names and values, without empty values."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, width=10)
    table.add_column(overflow="fold", ratio=1)
    for name, value in facts.items():
        if value:
            table.add_row(name, Text(value))
    return table if table.row_count else None


def _model(about: About) -> dict[str, str]:
    model = about["model"]
    kind = [model.get("class"), model.get("dtype")]
    if model.get("weight_processing"):
        kind.append(f"{model['weight_processing']} weights")
    return {
        "name": model.get("name") or "not known",
        "opened as": ", ".join(part for part in kind if part),
        "hook point": about["hook"],
    }


def _rows(about: About) -> dict[str, str]:
    settings = about["settings"]
    keep = settings.get("keep", "all")
    kept = {"all": "", "last": "the last token", "mean": "the mean of the tokens"}.get(keep, f"{keep} random tokens")
    generate = settings.get("generate")
    taken = [
        f"texts of {settings['context']} tokens at most" if "context" in settings else "",
        f"{kept} of each text" if kept else "",
        "chat template" if settings.get("chat") else "",
        f"{generate['tokens']} generated tokens, temperature {generate['temperature']:g}" if generate else "",
    ]
    files = f"{about['shards']:,} shard{'s' if about['shards'] != 1 else ''}"
    return {
        "rows": f"{about['rows']:,} of width {about['d_in']:,}, {about['dtype']}",
        "size": f"{size(about['bytes'])} in {files}",
        "taken from": ", ".join(part for part in taken if part),
        "dropped": listed(f"shard {index}" for index in about["dropped"]),
        "go on": "" if about["complete"] or about.get("being_written") else "interrupted: run the same collect again",
        "labels": listed(f"{name} ({dtype})" for name, dtype in about["labels"].items()),
    }


def _norms(about: About) -> RenderableType | None:
    if "mean_norm" not in about:
        return None
    table = Table.grid(padding=(0, 3, 0, 0))
    values = {"mean": about["mean_norm"]} | {_LEVELS[q]: v for q, v in about["norm_quantiles"].items()}
    for _ in values:
        table.add_column(justify="right", no_wrap=True)
    table.add_row(*(Text(name, style="dim") for name in values))
    table.add_row(*(f"{value:,.4g}" for value in values.values()))
    return table


def _dimensions(about: About) -> dict[str, str]:
    if "dead_dims" not in about:
        return {}
    return {
        name: f"{len(dims):,} of {about['d_in']:,}" + (f": {listed(dims)}" if dims else "")
        for name, dims in (("dead", about["dead_dims"]), ("massive", about["massive_dims"]))
    }


def _left_out(about: About) -> RenderableType | None:
    """Tokens that are in no row, by reason; padding is none."""
    excluded = {reason: n for reason, n in about["excluded"].items() if n and reason != "padding"}
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column()
    total = about["rows"] + sum(excluded.values())
    limit = f" (norm over {about['max_norm']:,.4g})" if about["max_norm"] is not None else ""
    if limit:
        excluded.setdefault("massive", about["excluded"].get("massive", 0))
    for reason, n in excluded.items():
        name = _REASONS.get(reason, reason.replace("_", " ")) + (limit if reason == "massive" else "")
        table.add_row(f"{n:,}", f"{n / max(total, 1):.2%}", Text(name))
    return table if table.row_count else None


def _corpus(about: About) -> dict[str, str]:
    corpus, imported = about["corpus"], about["imported"] or {}
    known = {"name": corpus.get("name") or "", "documents": f"{corpus['documents']:,}"}
    if "seed" in corpus:
        known["seed"] = str(corpus["seed"])
    if imported:
        known["imported"] = f"{imported.get('from')} ({imported.get('format')})"
    return known


def _tokens(examples: Sequence[str]) -> RenderableType | None:
    """The beginnings of a few texts, a line each."""
    if not examples:
        return None
    table = Table.grid()
    table.add_column(no_wrap=True, overflow="ellipsis")
    for text in examples[:3]:
        table.add_row(Text(" ".join(text.split())))
    return table
