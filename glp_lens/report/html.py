"""One self-contained HTML page from the results of any suites."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from glp_lens.display.comparisons import Verdict
from glp_lens.display.elements import Section
from glp_lens.display.labels import Palette, Style, count, display, duration, rounded
from glp_lens.display.overview import Overview, make_overview
from glp_lens.errors import InputError
from glp_lens.evals.registry import Suite, in_report
from glp_lens.evals.results import Results, metrics_frame, structured_frame
from glp_lens.files import write_atomic
from glp_lens.report.headline import headline, verdicts
from glp_lens.report.training import training_table

TEMPLATE = "report.html.j2"


def write_report(results: Sequence[Results], out: str | Path, context: Mapping[str, Any] | None = None) -> Path:
    """Write `report.html` and `plots/*.png` to the folder `out`.

    The page needs no network and no other file. Sections without results are left out.

    Args:
        results: of any suites, in any order; several of one suite share a section.
        out: folder, made if absent.
        context: what the results do not hold, all of it optional. `title`, a line; `focus`, the label whose
            wins and losses are told, `glp` by default; `training`, one mapping a model with `model`,
            `rows_seen`, `rows_distinct`, `parameters`, `flops`, `seconds` and any settings; `store`,
            facts about the activations, with their number as `rows`; `command`; `seed`; `versions`;
            `notes`, sentences on this run.

    Returns:
        The path of `report.html`.

    Raises:
        InputError: no results at all.
    """
    if not results:
        raise InputError("nothing to report: run a suite (probe, steer, fidelity) first, then the report")
    given = dict(context or {})
    focus = str(given.get("focus", "glp"))
    judged = verdicts(metrics_frame(m for r in results for m in r.metrics), focus)
    columns = [column for suite, runs, frame in _suites(results) for column in suite.page.columns(runs, frame, focus)]
    size = {str(row.get("model")): row.get("parameters") for row in given.get("training") or []}
    below = {model: f"{rounded(n)} parameters" for model, n in size.items() if n}
    return write_page(
        sections(results, focus),
        {suite.name: [v for v in judged if v.suite == suite.name] for suite in in_report()},
        results,
        Path(out),
        given,
        table=make_overview(columns, judged, focus, _conditions(), below) if columns else None,
        summary=headline(judged, focus),
    )


def write_page(
    parts: Sequence[Section],
    judged: Mapping[str, list[Verdict]],
    results: Sequence[Results],
    out: Path,
    context: Mapping[str, Any],
    *,
    table: Overview | None = None,
    lead: str = "",
    summary: str = "",
    trained_once: bool = True,
    numbers: str = "results.json",
) -> Path:
    """Write a page of sections that are already made, and their plots.

    Args:
        parts: the sections.
        judged: verdicts by the id of their section.
        results: whose settings, data, failures and versions the page tells.
        out: folder, made if absent.
        context: as `write_report` takes it.
        table: what the page begins with.
        lead: what stands above it.
        summary: all verdicts in a few sentences; it is folded.
        trained_once: whether to say that another seed may change results.
        numbers: name of the file beside the page that holds all of them.

    Returns:
        The path of `report.html`.
    """
    from jinja2 import Environment, StrictUndefined

    training, store = context.get("training") or [], context.get("store") or {}
    page = (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
        .from_string(resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
        .render(
            title=context.get("title", "Activation models compared"),
            focus=display(str(context.get("focus", "glp"))),
            about=_about(results, store),
            lead=lead,
            overview=table,
            marked=table is not None and any(marks for row in table.rows for *_, marks in row.cells),
            summary=summary,
            verdicts=judged,
            trained_once=trained_once,
            numbers=numbers,
            training=training_table(training, store.get("rows")) if training else None,
            store=facts(store),
            sections=parts,
            notes=list(context.get("notes") or []),
            failures=[(r.suite, sentence) for r in results for sentence in r.failures],
            command=context.get("command"),
            seed=context.get("seed"),
            versions=context.get("versions") or results[0].versions,
            runs=[
                {
                    "suite": r.suite,
                    "seconds": duration(r.seconds),
                    "config": json.dumps(r.config, indent=2, ensure_ascii=False, default=str),
                    "data": json.dumps(_short(r.data), indent=2, ensure_ascii=False, default=str),
                }
                for r in results
            ],
        )
    )
    for plot in (p for part in parts for p in part.all_plots):
        write_atomic(out / "plots" / f"{plot.name}.png", plot.png)
    path = out / "report.html"
    write_atomic(path, page)
    return path


def sections(results: Sequence[Results], focus: str = "glp") -> list[Section]:
    """A section for each suite present, in a fixed order; several runs of one suite share a section."""
    palette = Palette((m.model for r in results for m in r.metrics), _conditions())
    return [suite.page.section(runs, frame, palette, focus) for suite, runs, frame in _suites(results)]


def _conditions() -> dict[str, Style]:
    return {label: style for suite in in_report() for label, style in suite.page.CONDITIONS.items()}


def _suites(results: Sequence[Results]) -> Iterator[tuple[Suite, list[Results], pd.DataFrame]]:
    """The suites present, in the order of a report, with their runs and all metrics, each once."""
    for suite in in_report():
        runs = [r for r in results if r.suite == suite.name]
        if runs:
            frame = structured_frame(m for r in runs for m in r.metrics)
            frame = frame.drop_duplicates(["model", "task", "setting", "metric", "other"])  # of runs that share a part
            yield suite, runs, frame


def _about(results: Sequence[Results], store: Mapping[str, Any]) -> str:
    """The language model, hook point and activations that the page is about, as far as they are known."""
    known = [store, *(r.data for r in results), *(r.config for r in results)]
    models = [each["model"] for each in known if isinstance(each.get("model"), Mapping)]
    model = next((str(each["name"]).partition(" (")[0] for each in models if each.get("name")), "")
    hook = next((str(each["hook"]) for each in known if isinstance(each.get("hook"), str)), "")
    rows = f"{count(store['rows'])} activations" if isinstance(store.get("rows"), int) else ""
    return " · ".join(part for part in (model, hook, rows) if part)


def facts(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as lines `(name, value)` that people can read."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += facts(value, f"{name}: ")
        elif isinstance(value, bool) or value is None:
            lines.append((name, {True: "yes", False: "no", None: "none"}[value]))
        elif isinstance(value, int):
            lines.append((name, f"{value:,}".replace(",", "\u202f")))
        elif isinstance(value, float):
            lines.append((name, f"{value:,.6g}".replace(",", "\u202f")))
        else:
            lines.append((name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)))
    return lines


def _short(value: Any, limit: int = 24) -> Any:
    """Long lists and mappings cut, so that provenance stays readable; `results.json` holds all of it."""
    if isinstance(value, Mapping):
        shown = {str(k): _short(v, limit) for k, v in list(value.items())[:limit]}
        return shown | ({"…": f"{len(value) - limit} more"} if len(value) > limit else {})
    if isinstance(value, list | tuple):
        return [_short(v, limit) for v in value[:limit]] + (["…"] if len(value) > limit else [])
    return value
