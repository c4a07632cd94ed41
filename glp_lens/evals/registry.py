"""The suites, one row each, in the order of a report.

A suite is a package with the modules `settings` (its settings, quick to import), `suite` (what it is run on, and
`run(entries, data, settings, folder=..., allow_mismatch=...)`) and `page`: how its results are shown, by

- `CONDITIONS`: titles and plot styles of labels that are no model's, such as controls;
- `section(runs, frame, palette, focus)`: its section of the report;
- `verdicts(frame, focus)`: who wins, in sentences;
- `text_table(results)`: the numbers that matter most, for a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Suite:
    """One suite; its modules are imported when asked for."""

    name: str

    @property
    def package(self) -> ModuleType:
        """With `run`, and its settings and data classes."""
        return import_module(f"{__package__}.{self.name}")

    @property
    def page(self) -> ModuleType:
        """How its results are shown."""
        return import_module(f"{__package__}.{self.name}.page")


SUITES = (Suite("probing"), Suite("steering"), Suite("fidelity"), Suite("density"))
