"""Reporting: one page from results that are already there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError, one_line
from glp_lens.pipeline.inputs import ResultSettings
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens.evals.results import Results
    from glp_lens.types import Json


@dataclass(frozen=True, kw_only=True)
class ReportJob(ResultSettings):
    """Settings of `report`."""

    folders: tuple[Path, ...]
    """Folders with results.json of suites, or parents of them."""
    title: str = "Activation models compared"
    """Headline of the page."""
    focus: str = "glp"
    """The model that the headline and the verdicts are about."""
    out: Path = option(Path("report"), panel="Run")
    """Folder for the output."""


@checked
def report(settings: ReportJob, *, context: Json | None = None, say: Callable[[str], None] = print) -> Path:
    """Write report.html, metrics.csv and results.json from the results of any suites.

    Args:
        context: what else the page tells, see `glp_lens.report.write_report`.
        say: prints a line.

    Returns:
        The path of the page.

    Raises:
        InputError: no results, damaged ones, a report that is already there, or results that no page can be made of.
    """
    from glp_lens.evals.results import FILE
    from glp_lens.files import has_digest

    with settings.at_work("report", "results.json", "report.html") as begun:
        results = [each for folder in settings.folders for each in read_results(folder)]
        begun.saving()
        context = {"title": settings.title, "focus": settings.focus, **(context or {})}
        try:
            page = write_all(results, settings.out, context)
        except InputError as error:  # what was edited fails in whichever page reads it
            edited = [file for folder in settings.folders for file in _files(folder) if not has_digest(file)]
            if not edited:
                raise
            raise InputError(
                f"{error}; {edited[0]} carries no digest: undo what was edited, or {FILE.remedy}"
            ) from None
    say(f"report: {page}")
    return page


def write_all(results: Sequence[Results], out: Path, context: Json) -> Path:
    """Write all numbers, as metrics.csv and results.json, then report.html, whose path it gives.

    Raises:
        InputError: no page can be made of the numbers.
    """
    from glp_lens.report import write_report

    _merge(results, out, context)
    try:
        return write_report(results, out, context)
    except (InputError, OSError):
        raise
    except Exception as error:
        numbers = out / "results.json"
        raise InputError(f"no page could be made ({one_line(error)}), all numbers are saved: {numbers}") from error


def read_results(folder: Path) -> list[Results]:
    """The results of suites in a folder and those below it."""
    from glp_lens.evals.results import Results

    if not folder.is_dir():
        raise InputError(f"folder {folder} does not exist")
    files = _files(folder)
    if not files:
        raise InputError(f"{folder} holds no results.json of a suite: run probe, steer, fidelity or density first")
    return [Results.load(file.parent) for file in files]


def _files(folder: Path) -> list[Path]:
    """Files of results of single suites; what `compare` and `report` put together has several."""
    from glp_lens.evals.results import FILE
    from glp_lens.files import read_json

    return [file for file in sorted(folder.glob("**/results.json")) if "suites" not in read_json(file, FILE)]


def _merge(results: Sequence[Results], out: Path, context: Json) -> None:
    """`metrics.csv` and `results.json` of all suites together."""
    from glp_lens.evals.results import FILE, metrics_frame
    from glp_lens.files import write_atomic, write_json

    frame = metrics_frame(metric for each in results for metric in each.metrics)
    write_atomic(out / "metrics.csv", frame.to_csv(index=False))
    suites = {each.suite: each.to_json() for each in results}
    write_json(out / "results.json", {"format": 1, **context, "suites": suites}, FILE)
