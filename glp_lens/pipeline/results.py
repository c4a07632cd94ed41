"""What every suite's job ends with: results on disk, a page, and the numbers that matter most on screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from glp_lens.pipeline.inputs import ResultSettings

if TYPE_CHECKING:
    from glp_lens.evals.results import Results


def finish(
    results: Results, settings: ResultSettings, *, page: bool, command: str | None, say: Callable[[str], None]
) -> Results:
    """Save results, write their page if it is asked for, and print the suite's table and notes."""
    from glp_lens.evals.registry import SUITES
    from glp_lens.report import write_report

    files = [settings.out / "results.json", settings.out / "metrics.csv"]
    results.save(settings.out)
    if page:
        context = {"command": command, "seed": settings.seed}
        files.insert(0, write_report([results], settings.out, context))
    say(next(suite.page for suite in SUITES if suite.name == results.suite).text_table(results))
    for sentence in results.failures:
        say(f"note: {sentence}")
    say(f"saved: {', '.join(map(str, files[:-1]))} and {files[-1]}")
    return results
