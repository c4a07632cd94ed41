"""What `doctor` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from glp_lens.doctor import Check, problems

_ALONE = {"versions": 8, "imports": 0}
"""Topics of which no more than so many lines that are well stand alone."""
_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


def show(checks: Sequence[Check]) -> None:
    """Print what was looked at, by topic, each with its advice below; last, whether all is well."""
    console = Console(highlight=False)
    for topic in dict.fromkeys(check.topic for check in checks):
        table = Table.grid(padding=(0, 2, 0, 0))
        for width in (7, 24):
            table.add_column(no_wrap=True, min_width=width)
        table.add_column(overflow="fold")
        these = [check for check in checks if check.topic == topic]
        well = [check for check in these if check.state == "ok" and not check.advice]
        together = well[_ALONE.get(topic, len(well)) :]
        for check in (each for each in these if each not in together):
            about = Text(check.found)
            if check.advice:
                about.append(f"\n{check.advice}", style="dim" if check.state == "ok" else _STYLES[check.state])
            table.add_row(Text(check.state, style=_STYLES[check.state]), check.name, about)
        if together:
            name = "others" if len(together) < len(these) else "all"
            table.add_row(Text("ok", style=_STYLES["ok"]), name, ", ".join(check.name for check in together))
        console.print(Text(topic, style="bold"), table, "", sep="\n")
    wrong = [check.name for check in problems(checks)]
    console.print(Text(f"will not work: {', '.join(wrong)}" if wrong else "all is well", style="bold"))
