"""A scaling run at work: its cells, made one by one, and its tables."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glp_lens.errors import InputError
from glp_lens.evals.registry import SUITES, Suite
from glp_lens.pipeline.inputs import ColumnSettings, LanguageModelSettings, SuiteJob, open_language_model
from glp_lens.pipeline.scale import ScaleJob
from glp_lens.pipeline.stages import MARK, Stage, run_stages, settings_made_with, stage_states
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
        self._check_warmup()
        for suite in self.suites:
            self.files |= suite.job.check(self.settings)

    def _check_warmup(self) -> None:
        """Refuse a warmup that differs from that of the priors in the folder only because the smallest budget does."""
        from glp_lens.scaling.cells import CELL_FOLDERS

        rise = self.settings.rise
        if self.settings.warmup_rows or self.settings.overwrite:
            return
        for path in sorted((self.out / CELL_FOLDERS).glob("glp-*/cell.json")):
            there = settings_made_with(path.parent.name, self.out).get("warmup_rows", rise)
            if there != rise:
                raise InputError(
                    f"learning rates of the priors in {self.out} rise over {there} rows, and here over {rise}, a tenth "
                    f"of the smallest budget: pass --warmup-rows {there} to train alike, or another --out"
                )

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

    def make(self, unit: Unit, on_cell: Callable[[], None] = lambda: None) -> bool:
        """Train and measure the cells of a unit, those that are not done; False if another process is at that."""
        from glp_lens.activations.writer import AtWorkError, locked
        from glp_lens.scaling.training import remove_states

        if not self.files:
            self.check()
        if (done := self.made(unit)) and not self.left_over(unit):
            return True
        with ExitStack() as held:
            try:
                held.enter_context(locked(self.trunk(unit)))
            except AtWorkError:  # on other cells of it, if these are done
                return done
            for cell in unit.cells:
                run_stages(
                    self.stages(cell, unit), self.identity(), self.out, overwrite=self.settings.overwrite, say=_quiet
                )
                if self.settings.keep_models:
                    self.ensure_model(cell, unit)
                else:
                    shutil.rmtree(self.model_folder(cell), ignore_errors=True)
                self.write_tables(cell)
                on_cell()
            remove_states(self.trunk(unit), but_longest=self.settings.keep_states)
        return True

    def made(self, unit: Unit) -> bool:
        """Whether all cells of a unit are done, with their models if those are wanted."""
        lacking = self.settings.keep_models and any(map(self.lacks_model, unit.cells))
        return not lacking and all(map(self.is_done, unit.cells))

    def left_over(self, unit: Unit) -> bool:
        """Whether states or models are there that need not be kept."""
        from glp_lens.scaling.training import has_other_states

        models = not self.settings.keep_models and any(self.model_folder(cell).exists() for cell in unit.cells)
        return models or has_other_states(self.trunk(unit), but_longest=self.settings.keep_states)

    def model_folder(self, cell: Cell) -> Path:
        """Of the saved model of a cell."""
        from glp_lens.scaling.training import MODEL

        return self.folder(cell) / MODEL

    def lacks_model(self, cell: Cell) -> bool:
        """Whether the model of a cell was deleted, or never made."""
        from glp_lens.artifacts import CONFIG

        return not (self.model_folder(cell) / CONFIG).exists()

    def stages(self, cell: Cell, unit: Unit, *, also_others: bool = False) -> list[Stage]:
        """Of a cell: its training, and each suite.

        Args:
            also_others: with the suites that this run was not asked for, whose settings do not matter.
        """
        own = {"glp": ("heldout", "mlp_ratio", "warmup_rows", "glp_batch", "glp_lr"), "sae": ("sae_k",)}
        name = self.folder(cell).relative_to(self.out)
        train = Stage(
            cell.cell, ("store", *own.get(cell.kind, ())), (), (str(name / "cell.json"),),
            partial(self.train, cell, unit),
        )  # fmt: skip
        asked = self.suites_of(cell)
        return [train, *(
            Stage(f"{cell.cell}.{suite.name}", _decide(suite) if suite in asked else (), (cell.cell,),
                  (str(results := name / "results" / suite.name), str(results / "results.json")),
                  partial(self.measure, cell, unit, suite))
            for suite in (SUITES if also_others else asked)
        )]  # fmt: skip

    def identity(self) -> Json:
        """All settings, with the contents of stores and files for their names."""
        stores = {"store": self.store.fingerprint, "heldout": self.heldout.fingerprint}
        return self.settings.to_json() | self.files | stores | {"warmup_rows": self.settings.rise}

    def train(self, cell: Cell, unit: Unit) -> None:
        """Train a cell."""
        from glp_lens.scaling.training import remove_states, train_cell
        from glp_lens.training.checkpoint import OtherTrainingError

        run = partial(
            train_cell, cell, unit, self.settings, self.store, self.heldout, self.folder(cell), self.trunk(unit),
            keep_states=self.settings.keep_states, device=self.settings.device,
        )  # fmt: skip
        try:
            run()
        except OtherTrainingError:
            if not self.settings.overwrite:
                raise
            remove_states(self.trunk(unit))
            run()

    def train_together(self, chosen: Sequence[Unit]) -> None:
        """Train the priors with all the processes that torchrun started; what else there is to do, one does later."""
        from glp_lens.activations.writer import locked
        from glp_lens.training import distributed

        if self.settings.jobs > 1 or self.settings.ray:
            raise InputError("torchrun trains one prior at a time on all its processes: leave out --jobs and --ray")
        for unit in chosen:
            for cell in unit.cells if unit.cells[0].kind == "glp" else ():
                distributed.barrier()
                stage = self.stages(cell, unit)[0]
                state = stage_states([stage], self.identity(), self.out)[stage.name]
                distributed.barrier()  # before the main process changes it
                if state.done or (state.changed and not self.settings.overwrite):  # which is refused later
                    continue
                if distributed.is_main():
                    with locked(self.trunk(unit)):
                        run_stages([stage], self.identity(), self.out, overwrite=self.settings.overwrite, say=_quiet)
                else:
                    self.train(cell, unit)
        distributed.barrier()

    def ensure_model(self, cell: Cell, unit: Unit) -> None:
        """Train a cell again whose model was deleted."""
        if self.lacks_model(cell):
            self.train(cell, unit)

    def measure(self, cell: Cell, unit: Unit, suite: Suite) -> None:
        """Run a suite on a cell."""
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
            models=(f"{cell.kind}={self.model_folder(cell)}",), **changes,
        )  # fmt: skip
        model = self.model if issubclass(kind, LanguageModelSettings) else None
        run_suite(job, model=model, page=False, say=_quiet)
        (job.out / MARK).unlink()  # of this model, which is deleted; the stage's mark says that it is done

    def write_tables(self, new: Cell | None = None) -> None:
        """Write the tables of all cells that are there, or add one that is new."""
        from glp_lens.scaling.evaluating import write_tables

        with self.tables():
            write_tables(self.out, self.measured()[0], new.cell if new else None)

    def finish(self, say: Callable[[str], None]) -> None:
        """Write the tables and, if all cells of this run are done, the page."""
        from glp_lens.scaling.analysis import analyse
        from glp_lens.scaling.evaluating import write_tables

        with self.tables():
            measured, others = self.measured()
            write_tables(self.out, measured)
            if others:
                name, changed = next(iter(others.items()))
                more = f" and {len(others) - 1} more" if len(others) > 1 else ""
                say(f"note: left out of the tables, made with other settings: {name} ({changed}){more}")
            missing = sum(not self.is_done(cell) for cell in self.cells)
            cells = self.out / "cells.parquet"
            if missing:
                say(f"{len(self.cells) - missing} of {len(self.cells)} cells are done: {cells}")
            else:
                say(f"all {len(self.cells)} cells are done: {cells} and utilities.parquet beside it")
                analyse(self.out, say=say)

    def tables(self) -> AbstractContextManager[None]:
        """Keep other processes from the tables, which all write."""
        from glp_lens.activations.writer import locked

        return locked(self.out / "stages", wait=True)

    def measured(self) -> tuple[dict[str, list[str]], dict[str, str]]:
        """The trained cells in the folder, also of other grids, with the names of the suites that are done.

        Returns:
            Those with the settings of this run, and of others by name what differs.
        """
        from glp_lens.scaling.cells import CELL_FOLDERS, Cell

        planned = [cell.cell for cell in self.cells]
        there = {path.parent.name for path in (self.out / CELL_FOLDERS).glob("*/cell.json")}
        identity, found, others = self.identity(), dict[str, list[str]](), dict[str, str]()
        for name in [*(name for name in planned if name in there), *sorted(there - {*planned})]:
            cell = Cell.load(self.out / CELL_FOLDERS / name)
            train, *suites = self.stages(cell, Unit(name, (cell,), 0.0), also_others=True)
            states = stage_states([train, *suites], identity, self.out)
            if states[name].done:
                found[name] = [stage.name.removeprefix(f"{name}.") for stage in suites if states[stage.name].done]
            elif states[name].changed:
                others[name] = states[name].changed
        return found, others

    def is_done(self, cell: Cell) -> bool:
        """Whether all stages of a cell are done with the settings of this run."""
        return not self._undone(cell)

    def is_trained(self, cell: Cell) -> bool:
        """Whether a cell has been trained with the settings of this run."""
        return cell.cell not in self._undone(cell)

    def suites_left(self, cell: Cell) -> list[str]:
        """Names of the suites that are to measure a cell."""
        undone = self._undone(cell)
        return [name for name in self.names_of(cell) if f"{cell.cell}.{name}" in undone]

    def to_train(self, unit: Unit) -> Unit:
        """The cells of a unit that are to be trained, also those whose deleted model is needed, and what is kept."""
        from glp_lens.scaling.training import held_state

        def needed(cell: Cell) -> bool:
            undone = self._undone(cell)
            wanted = self.settings.keep_models or bool(undone)
            return cell.cell in undone or (wanted and self.lacks_model(cell))

        cells = tuple(filter(needed, unit.cells))
        begun = held_state(self.trunk(unit), cells[0], self.settings) if cells else 0
        return replace(unit, cells=cells, begun=begun)

    def _undone(self, cell: Cell) -> set[str]:
        """Names of the stages of a cell that are not done with the settings of this run."""
        stages = self.stages(cell, Unit(cell.cell, (cell,), 0.0))
        states = stage_states(stages, self.identity(), self.out)
        return {name for name, state in states.items() if not state.done}


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
