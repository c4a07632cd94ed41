"""A scaling run at work: its cells, made one by one, and how far it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glp_lens.errors import InputError
from glp_lens.evals.registry import SUITES, Suite
from glp_lens.pipeline.inputs import ColumnSettings, LanguageModelSettings, SuiteJob, open_language_model
from glp_lens.pipeline.scale import ScaleJob
from glp_lens.pipeline.stages import MARK, Stage, run_stages, stage_seconds
from glp_lens.pipeline.suites import run_suite
from glp_lens.scaling.grid import Unit, planned, units
from glp_lens.settings import options

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.activations import ActivationStore
    from glp_lens.scaling.cells import Cell
    from glp_lens.types import Json

_TRUNKS = "trunks"
"""Folder of the states of trainings that are not done."""


class Run:
    """One run: its cells, and the stores and the language model that they share."""

    def __init__(self, settings: ScaleJob, model: lm.Model | None = None) -> None:
        self.settings, self.given_model, self.out = settings, model, settings.out
        self.suites = [suite for suite in SUITES if suite.name in settings.suites]
        self.files: Json = {}
        d_in, stored = self.store.d_in, len(self.store)
        self.cells = planned(settings, seed=settings.seed, d_in=d_in, stored=stored)
        self.units = units(self.cells, settings)

    @cached_property
    def store(self) -> ActivationStore:
        """Training activations."""
        from glp_lens.activations import ActivationStore

        return ActivationStore.open(self.settings.store)

    @cached_property
    def heldout(self) -> ActivationStore:
        """Held-out activations, refused if they are others than the training activations, or the same."""
        from glp_lens import provenance
        from glp_lens.activations import ActivationStore

        heldout = ActivationStore.open(self.settings.heldout)
        if heldout.fingerprint == self.store.fingerprint:
            raise InputError(f"{heldout.path} is the training store: pass held-out activations as --heldout")
        provenance.check(
            f"{self.store.path} was collected", self.store.provenance(), heldout.provenance(),
            remedy=f"collect {heldout.path} the same way", allow_mismatch=False,
        )  # fmt: skip
        return heldout

    @cached_property
    def model(self) -> lm.Model:
        """The language model, refused if the store is of another one."""
        from glp_lens import provenance

        model = self.given_model or open_language_model(self.settings, self.settings.device)
        if differences := provenance.mismatches(self.store.provenance(), provenance.here(model, self.store.hook)):
            raise InputError(
                f"{self.store.path} was collected {', '.join(differences)}: use the same copy of the model, or another "
                "store"
            )
        return model

    def check(self) -> None:
        """Refuse, before any work, what a cell or a suite would refuse."""
        from glp_lens.lm import check_device

        check_device(self.settings.device)
        _ = self.heldout
        for suite in self.suites:
            self.files |= suite.job.check(self.settings)

    def suites_of(self, cell: Cell) -> list[Suite]:
        """The suites that measure a cell's kind of model."""
        return [suite for suite in self.suites if cell.kind in suite.job.in_comparison(self.out)["models"]]

    def names_of(self, cell: Cell) -> list[str]:
        """Names of these suites."""
        return [suite.name for suite in self.suites_of(cell)]

    def folder(self, cell: Cell) -> Path:
        """Of a cell."""
        from glp_lens.scaling.cells import CELL_FOLDERS

        return self.out / CELL_FOLDERS / cell.cell

    def trunk(self, unit: Unit) -> Path:
        """Folder of the states of a unit's trainings."""
        return self.out / _TRUNKS / unit.name

    def make(self, unit: Unit, on_cell: Callable[[], None] = lambda: None) -> None:
        """Train and measure the cells of a unit, those that are not done."""
        from glp_lens.activations.writer import locked
        from glp_lens.scaling.training import MODEL, remove_states

        if not self.files:
            self.check()
        with locked(self.trunk(unit)):
            for cell in unit.cells:
                folder, stages = self.folder(cell), self.stages(cell, unit)
                run_stages(stages, self.identity(), self.out, overwrite=self.settings.overwrite, say=_quiet)
                if self.settings.keep_models:
                    self.ensure_model(cell, unit)
                else:
                    shutil.rmtree(folder / MODEL, ignore_errors=True)
                self.write_tables(cell)
                on_cell()
            remove_states(self.trunk(unit))

    def stages(self, cell: Cell, unit: Unit) -> list[Stage]:
        """Of a cell: its training, and each suite."""
        own = {"glp": ("heldout", "mlp_ratio", "warmup_rows", "glp_batch", "glp_lr"), "sae": ("sae_k",)}
        name = self.folder(cell).relative_to(self.out)
        train = Stage(
            cell.cell, ("store", *own.get(cell.kind, ())), (), (str(name / "cell.json"),),
            partial(self.train, cell, unit),
        )  # fmt: skip
        return [train, *(
            Stage(f"{cell.cell}.{suite.name}", _decide(suite), (cell.cell,), (str(name / "results" / suite.name),),
                  partial(self.measure, cell, unit, suite))
            for suite in self.suites_of(cell)
        )]  # fmt: skip

    def identity(self) -> Json:
        """All settings, with the contents of stores and files for their names."""
        stores = {"store": self.store.fingerprint, "heldout": self.heldout.fingerprint}
        return self.settings.to_json() | self.files | stores | {"warmup_rows": self.settings.rise}

    def train(self, cell: Cell, unit: Unit) -> None:
        """Train a cell."""
        from glp_lens.scaling.training import train_cell

        train_cell(
            cell, unit, self.settings, self.store, self.heldout, self.folder(cell), self.trunk(unit),
            device=self.settings.device,
        )  # fmt: skip

    def train_together(self, chosen: Sequence[Unit]) -> None:
        """Train the priors with all the processes that torchrun started; what else there is to do, one does later."""
        from glp_lens.training import distributed

        if self.settings.jobs > 1 or self.settings.ray:
            raise InputError("torchrun trains one prior at a time on all its processes: leave out --jobs and --ray")
        for unit in chosen:
            for cell in unit.cells if unit.cells[0].kind == "glp" else ():
                distributed.barrier()
                undone = not (self.folder(cell) / "cell.json").exists()
                distributed.barrier()  # before the main process makes it
                if undone:
                    self.train(cell, unit)
        distributed.barrier()

    def ensure_model(self, cell: Cell, unit: Unit) -> None:
        """Train a cell again whose model was deleted."""
        from glp_lens.artifacts import CONFIG
        from glp_lens.scaling.training import MODEL

        if not (self.folder(cell) / MODEL / CONFIG).exists():
            self.train(cell, unit)

    def measure(self, cell: Cell, unit: Unit, suite: Suite) -> None:
        """Run a suite on a cell."""
        from glp_lens.scaling.training import MODEL

        self.ensure_model(cell, unit)
        out, kind = self.out, suite.settings
        places = {out / "acts" / "train": self.settings.store, out / "acts" / "heldout": self.settings.heldout}
        changes: Json = {name: places.get(value, value) for name, value in _places(suite, out).items()}
        if "cache" in changes:
            changes["cache"] = out / "cache" / suite.name  # what is equal for all cells is made once
        if cell.kind != "gaussian" and "train_store" in changes:
            changes["train_store"] = None  # references fitted to it are measured once, beside the Gaussian
        if issubclass(kind, ColumnSettings):
            changes["text_column"] = self.settings.texts_column
        job: SuiteJob = kind.of(
            self.settings, out=self.folder(cell) / "results" / suite.name, overwrite=True,
            models=(f"{cell.kind}={self.folder(cell) / MODEL}",), **changes,
        )  # fmt: skip
        model = self.model if issubclass(kind, LanguageModelSettings) else None
        run_suite(job, model=model, page=False, say=_quiet)
        (job.out / MARK).unlink()  # of this model, which is deleted; the stage's mark says that it is done

    def write_tables(self, new: Cell | None = None) -> None:
        """Write the tables of all cells that are there, or add one that is new."""
        from glp_lens.activations.writer import locked
        from glp_lens.scaling.evaluating import write_tables

        with locked(self.out / "stages", wait=True):  # other processes do the same
            write_tables(self.out, self.cells, [suite.name for suite in self.suites], new)

    def missing(self) -> int:
        """Number of cells that are not done."""
        seconds = stage_seconds(self.out)
        return sum(not self.is_done(cell, seconds) for cell in self.cells)

    def is_done(self, cell: Cell, seconds: dict[str, float]) -> bool:
        """Whether all stages of a cell are among those that took some time."""
        return {cell.cell, *(f"{cell.cell}.{name}" for name in self.names_of(cell))} <= seconds.keys()

    def tell(self, chosen: Sequence[Unit], say: Callable[[str], None]) -> None:
        """Say what would be trained, and what that would take."""
        import torch

        from glp_lens.scaling import estimate
        from glp_lens.scaling.training import sae_seconds_per_flop, seconds_per_flop

        s = self.settings
        times = estimate.Times(stage_seconds(self.out))
        with _threads(max(1, torch.get_num_threads() // s.jobs)):
            for cell in (cell for unit in chosen for cell in unit.cells if cell.flops):
                if (key := estimate.shape(cell)) not in times.rates:
                    times.rates[key] = (
                        seconds_per_flop(cell, s, self.store.d_in, device=s.device)
                        if cell.kind == "glp"
                        else sae_seconds_per_flop(cell, s, self.store, device=s.device)
                    )
        for line in estimate.table(chosen, s, times, s.ray or s.jobs, self.names_of, keep_models=s.keep_models):
            say(line)


class Progress:
    """Says which cells are done, by what is on the disk, whoever has made them, and how long the rest takes."""

    def __init__(self, run: Run, chosen: Sequence[Unit], say: Callable[[str], None]) -> None:
        self.run, self.units, self.say = run, chosen, say
        self.cells = {cell.cell: cell for unit in chosen for cell in unit.cells}
        self.done = self._done(stage_seconds(run.out))
        if self.done:
            say(f"{len(self.done)} of {len(self.cells)} cells are done already")

    def _done(self, seconds: dict[str, float]) -> set[str]:
        return {name for name, cell in self.cells.items() if self.run.is_done(cell, seconds)}

    def update(self) -> None:
        """Say what has been done since the last call."""
        from glp_lens.scaling import estimate
        from glp_lens.scaling.cells import Cell

        seconds = stage_seconds(self.run.out)
        times = estimate.Times(seconds)
        times.learn(self.units, self.run.settings)
        for name in sorted(self._done(seconds) - self.done):
            self.done.add(name)
            loss = Cell.load(self.run.folder(self.cells[name])).loss
            own = sum(value for stage, value in seconds.items() if stage == name or stage.startswith(f"{name}."))
            workers = self.run.settings.ray or self.run.settings.jobs
            left = estimate.left(self.units, self.run.settings, times, self.run.names_of)
            self.say(
                f"[{len(self.done)}/{len(self.cells)}] {name}: "
                + ("" if loss is None else f"loss {loss:.4f}, ")
                + f"{estimate.duration(own)}; about {estimate.duration(left / workers)} left"
            )


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Let torch use `n` threads in the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _places(suite: Suite, out: Path) -> dict[str, Any]:
    """Where a suite finds what it reads in a comparison, but for the models."""
    return {name: value for name, value in suite.job.in_comparison(out).items() if name != "models"}


def _decide(suite: Suite) -> tuple[str, ...]:
    """Names of the settings of a run that decide the numbers of a suite."""
    shared = {each.name for each in options(suite.settings)} & {each.name for each in options(ScaleJob)}
    shared |= {"texts_column"} if issubclass(suite.settings, ColumnSettings) else set()
    free = {"out", "overwrite", "device", "allow_mismatch"}
    return tuple(sorted((shared | {"store", "heldout"}) - free))


def _quiet(line: str) -> None:
    """Stages say what they do; a run says it of cells."""
