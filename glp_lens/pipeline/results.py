"""What every suite's job ends with: results on disk, a page, and the numbers that matter most on screen."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glp_lens.evals.results import Results


def finish(results: Results, out: Path, say: Callable[[str], None], *, page: bool, seed: int) -> Results:
    """Save results, write their page if it is asked for, and print the suite's table and notes."""
    from glp_lens.report import text_table, write_report

    files = [out / "results.json", out / "metrics.csv"]
    results.save(out)
    if page:
        files.insert(0, write_report([results], out, {"command": command_line(), "seed": seed}))
    say(text_table(results))
    for sentence in results.failures:
        say(f"note: {sentence}")
    say(f"saved: {', '.join(map(str, files[:-1]))} and {files[-1]}")
    return results


def command_line() -> str | None:
    """The command that runs this, for reports; None in a program of the user's."""
    return shlex.join(["glp-lens", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("glp-lens", "__main__") else None
