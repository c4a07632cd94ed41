"""The suites, one row each, in the order in which a comparison runs them.

A suite is a package with these modules:

- `settings`: what decides its numbers; quick to import;
- `suite`: what it is run on, and `run(entries, data, settings, folder=..., allow_mismatch=...)`;
- `job`: the settings of its command, quick to import, and how they are carried out. `measure(job, trained, inputs)`
  gives the results on trained models, `check(settings)` is called before any stage of a comparison starts: it refuses
  settings that `measure` would refuse, and gives those whose files count by their content. `in_comparison(folder)`
  names the models and stores of a comparison;
- `page`: how its results are shown. `TITLE` is that of its own page; `CONDITIONS` are titles and plot styles of labels
  that are no model's, such as controls; `section(runs, frame, palette, focus)` is its section of the report and
  `columns(runs, frame, focus)` what it gives to the table that a report begins with,
  `verdicts(frame, focus)` who wins, in sentences, and `text_table(results)` the main numbers, for a terminal.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from glp_lens.settings import Settings


@dataclass(frozen=True)
class Suite:
    """One suite; its modules are imported when asked for.

    Attributes:
        name: of its package, its results and its stage.
        command: that runs it.
        job_name: class of the command's settings.
        section: where in a report it stands.
        compared: whether `compare` and `quickstart` run it when they are not told which.
    """

    name: str
    command: str
    job_name: str
    section: int
    compared: bool = True

    @property
    def package(self) -> ModuleType:
        """With `run`, and its settings and data classes."""
        return import_module(f"{__package__}.{self.name}")

    @property
    def job(self) -> ModuleType:
        """What its command does."""
        return import_module(f"{__package__}.{self.name}.job")

    @property
    def settings(self) -> Any:
        """The settings of its command."""
        return getattr(self.job, self.job_name)

    @property
    def own_settings(self) -> list[type[Settings]]:
        """What decides its numbers: the classes of its module `settings` that no other one there extends."""
        module = import_module(f"{__package__}.{self.name}.settings")
        values = [value for value in vars(module).values() if isinstance(value, type)]
        own = [each for each in values if issubclass(each, Settings) and each.__module__ == module.__name__]
        return [each for each in own if not any(each in other.__mro__[1:] for other in own)]

    @property
    def page(self) -> ModuleType:
        """How its results are shown."""
        return import_module(f"{__package__}.{self.name}.page")


SUITES = (
    Suite("density", "density", "DensityJob", 4),
    Suite("probing", "probe", "ProbeJob", 1),
    Suite("steering", "steer", "SteerJob", 2),
    Suite("fidelity", "fidelity", "FidelityJob", 3),
    Suite("detect", "detect", "DetectJob", 5, compared=False),
    Suite("generation", "generation", "GenerationJob", 6, compared=False),
)
COMPARED = tuple(suite.name for suite in SUITES if suite.compared)
"""What `compare` and `quickstart` run by default."""


def in_report() -> list[Suite]:
    """The suites in the order of a report."""
    return sorted(SUITES, key=lambda suite: suite.section)
