"""Scaling: many priors and baselines of different size and budget, trained and measured alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.evals.registry import COMPARED, SUITES
from glp_lens.pipeline.collect import parse_shard
from glp_lens.pipeline.inputs import (
    ContextSettings,
    LanguageModelSettings,
    RunSettings,
    TextsSettings,
)
from glp_lens.processes import end_with_parent, stopping
from glp_lens.scaling.grid import GridSettings, Unit, part, shape_of
from glp_lens.settings import option

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.pipeline.scale_progress import Progress
    from glp_lens.pipeline.scale_run import Run

_POLL = 5.0
"""Seconds between two looks at what other processes have done."""


@dataclass(frozen=True, kw_only=True)
class ScaleJob(
    *(settings for suite in SUITES for settings in suite.own_settings),  # type: ignore[misc]
    LanguageModelSettings,
    ContextSettings,
    TextsSettings,
    RunSettings,
    GridSettings,
):
    """Settings of `scale`: the grid, and those of the suites."""

    essentials = (
        "store", "heldout", "widths", "layers", "shapes", "rows", "suites", "jobs", "dry_run", "device", "out",
    )  # fmt: skip

    store: Path = option(Path("acts"), panel="Data")
    """Folder of the activation store that all models are trained on."""
    heldout: Path = option(Path("acts_heldout"), panel="Data")
    """Folder of a store of held-out activations, written by 'collect --split heldout'."""
    texts_column: str = option("text", panel="Data")
    """Column of the text, or of chat messages, in the files of --texts."""
    suites: tuple[str, ...] = option(COMPARED, panel="Tasks")
    """Suites to run on every model: density, probing, steering, fidelity, detect, generation, separated by commas, or
    'none', which leaves the losses."""
    out: Path = option(Path("runs/scale"), panel="Run")
    """Folder for the output."""
    jobs: int = option(1, min=1, panel="Run")
    """Cells that are made at a time, in as many processes, which share the cores."""
    shard: tuple[int, int] | None = option(None, panel="Run", parse=parse_shard)
    """i/N, from 0: do the i-th of N parts of the work, for a task of a Slurm array; the last to end writes the page."""
    ray: int = option(0, min=0, panel="Run")
    """Spread the cells over this many Ray actors."""
    keep_models: bool = option(False, panel="Run")
    """Keep the trained models, which are otherwise deleted once they are measured."""
    keep_states: bool = option(False, panel="Run")
    """Keep the state of each longest training where its learning rate begins to fall, for larger budgets later."""
    dry_run: bool = option(False, panel="Run")
    """Only tell what would be trained, and what it would take on this device, from a few steps of each size."""
    overwrite: bool = option(False, panel="Run")
    """Redo cells that were made with other settings, instead of refusing."""

    def __post_init__(self) -> None:
        """Refuse what does not go together; 'none' is no suite at all."""
        self.take_none_for_empty("suites")
        super().__post_init__()
        known = [suite.name for suite in SUITES]
        if len({*self.suites}) < len(self.suites) or not {*self.suites} <= {*known}:
            raise InputError(f"suites must be some of {', '.join(known)}, each once, got {', '.join(self.suites)!r}")
        if self.ray and (self.shard or self.jobs > 1):
            raise InputError("--ray splits the work itself: pass it without --shard and --jobs")


@checked
def scale(settings: ScaleJob, *, model: lm.Model | None = None, say: Callable[[str], None] = print) -> Path:
    """Train priors and baselines of several sizes and budgets, and measure them all alike.

    Budgets of one size and seed share the beginning of one training. Writes to --out: cells/ (a folder for each model
    with its results), cells.parquet and utilities.parquet (all numbers of the cells in the folder) and, once all of
    this grid are done, scaling.json, report.html and pictures. Run it again to continue where it stopped, or with more
    sizes, budgets or suites, also side by side.

    Args:
        model: a HookedTransformer or TransformerBridge to use instead of the one that the settings name.
        say: prints a line.

    Returns:
        The folder.

    Raises:
        InputError: settings, stores or a model that cannot be used, a folder that holds another run, or in which one
            is at work on the same cells.
    """
    from glp_lens.files import make_writable
    from glp_lens.pipeline.scale_progress import Progress, tell
    from glp_lens.pipeline.scale_run import Run
    from glp_lens.training import distributed

    if model is not None and (settings.jobs > 1 or settings.ray):
        raise InputError("jobs and ray open the model themselves: name it in the settings, or leave them out")
    run = Run(settings, model)
    chosen = part(run.units, *settings.shard) if settings.shard else run.units
    run.check()
    if settings.dry_run:
        _tell_narrow(run, say)
        tell(run, chosen, say)
        return settings.out
    make_writable(settings.out)
    with distributed.session(settings.device):
        if distributed.is_main():
            _tell_narrow(run, say)
        if distributed.running():
            run.train_together(chosen)
            if not distributed.is_main():  # evaluations are the main process's alone
                return settings.out
    progress = Progress(run, chosen, say)
    if settings.ray:
        from glp_lens.activations.cluster import do_on_ray

        work = partial(_make_unit, settings, threads := max(1, (os.cpu_count() or 1) // settings.ray))
        gpus = int(settings.device.startswith("cuda"))
        do_on_ray(
            work, [unit.name for unit in chosen], actors=settings.ray, num_cpus=threads, num_gpus=gpus,
            done=lambda _: progress.update(),
        )  # fmt: skip
    elif settings.jobs > 1:
        _in_processes(settings, chosen, progress)
    else:
        for unit in chosen:
            run.make(unit, progress.update)
    busy = [unit.name for unit in chosen if not (run.made(unit) or run.make(unit, progress.update))]
    run.finish(say)
    if busy:
        raise InputError(
            f"another process is at work on {', '.join(busy)} in {settings.out}: run again when it has ended"
        )
    return settings.out


def _tell_narrow(run: Run, say: Callable[[str], None]) -> None:
    """Say once which denoisers are narrower than the activations, rather than in the training of each."""
    for width in sorted({width for width, _, _ in run.settings.trained}):
        if warning := shape_of(run.store.d_in, width, 1, 1).warning:
            say(f"note: {warning}")


def _in_processes(settings: ScaleJob, chosen: Sequence[Unit], progress: Progress) -> None:
    """Make units in several processes, that share the threads of this one."""
    import multiprocessing
    from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait

    import torch

    workers = min(settings.jobs, torch.get_num_threads(), len(chosen))
    if workers < settings.jobs:
        progress.say(f"{workers} at a time: there are {torch.get_num_threads()} threads and {len(chosen)} trainings")
    threads = torch.get_num_threads() // workers
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent, initargs=(stop,)) as pool:
        with _environment(threads):
            waiting = {pool.submit(_make_unit, settings, threads, unit.name) for unit in chosen}
        with stopping(stop, "run the same command again, with a smaller --jobs"):
            while waiting:
                done, waiting = wait(waiting, timeout=_POLL, return_when=FIRST_EXCEPTION)
                for each in done:
                    each.result()
                progress.update()


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """For processes that start in the block: their share of the cores, and no progress bars, which would overlap.

    numpy and tqdm read these as they are imported, which is before a process can set them itself.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    values = dict.fromkeys(names, str(threads)) | {"TQDM_DISABLE": "1"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _make_unit(settings: ScaleJob, threads: int, name: str) -> None:
    """Make a unit in another process."""
    import torch

    torch.set_num_threads(threads)
    run = _run_of(settings)
    run.make(next(unit for unit in run.units if unit.name == name))


@cache
def _run_of(settings: ScaleJob) -> Run:
    """The run in this process, which keeps the language model that it has opened."""
    from glp_lens.pipeline.scale_run import Run

    return Run(settings)
