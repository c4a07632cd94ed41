"""What a scaling run would take, how far it is, and how long the rest takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from glp_lens.pipeline.stages import stage_seconds

if TYPE_CHECKING:
    from glp_lens.pipeline.scale_run import Run
    from glp_lens.scaling.estimate import Times
    from glp_lens.scaling.grid import Unit


def tell(run: Run, chosen: Sequence[Unit], say: Callable[[str], None]) -> None:
    """Say what would be trained, and what that would take."""
    import torch

    from glp_lens.scaling import estimate
    from glp_lens.scaling.training import sae_seconds_per_flop, seconds_per_flop

    s = run.settings
    times = estimate.Times(stage_seconds(run.out))
    to_train = [run.to_train(unit) for unit in chosen]
    with _threads(max(1, torch.get_num_threads() // s.jobs)):
        for cell in (cell for unit in to_train for cell in unit.cells if cell.flops):
            if (key := estimate.shape(cell)) not in times.rates:
                times.rates[key] = (
                    seconds_per_flop(cell, s, run.store.d_in, device=s.device)
                    if cell.kind == "glp"
                    else sae_seconds_per_flop(cell, s, run.store, device=s.device)
                )
    training, measuring = _left(run, chosen, to_train, times)
    done = [cell.cell for unit in chosen for cell in unit.cells if run.is_done(cell)]
    for line in estimate.table(
        chosen, training, measuring, done, s.ray or s.jobs, keep_models=s.keep_models, keep_states=s.keep_states
    ):
        say(line)


def _left(
    run: Run, units: Sequence[Unit], to_train: Iterable[Unit], times: Times
) -> tuple[dict[str, float], float | None]:
    """Expected seconds of one worker for what is not done: of each training, and of all evaluations, if any.

    Args:
        to_train: of each unit what `Run.to_train` gives.
    """
    training = {cell.cell: times.training(cell, unit, run.settings) for unit in to_train for cell in unit.cells}
    suites = [(cell, run.suites_left(cell)) for unit in units for cell in unit.cells]
    measuring = sum(times.measuring(cell, names) for cell, names in suites)
    return training, measuring if any(names for _, names in suites) else None


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


class Progress:
    """Says which cells are done, by what is on the disk, whoever has made them, and how long the rest takes."""

    def __init__(self, run: Run, chosen: Sequence[Unit], say: Callable[[str], None]) -> None:
        self.run, self.units, self.say = run, chosen, say
        self.cells = {cell.cell: cell for unit in chosen for cell in unit.cells}
        self.done = self._done({*self.cells})
        if self.done:
            say(f"{len(self.done)} of {len(self.cells)} cells are done already")

    def _done(self, names: set[str]) -> set[str]:
        return {name for name in names if self.run.is_done(self.cells[name])}

    def update(self) -> None:
        """Say what has been done since the last call."""
        from glp_lens.scaling import estimate
        from glp_lens.scaling.cells import Cell

        if not (new := sorted(self._done(self.cells.keys() - self.done))):
            return
        seconds = stage_seconds(self.run.out)
        times = estimate.Times(seconds)
        times.learn(Cell.load(self.run.folder(cell)) for cell in self.cells.values() if self.run.is_trained(cell))
        training, measuring = _left(self.run, self.units, map(self.run.to_train, self.units), times)
        left = sum(training.values()) + (measuring or 0.0)
        workers = self.run.settings.ray or self.run.settings.jobs
        for name in new:
            self.done.add(name)
            loss = Cell.load(self.run.folder(self.cells[name])).loss
            own = sum(value for stage, value in seconds.items() if stage == name or stage.startswith(f"{name}."))
            self.say(
                f"[{len(self.done)}/{len(self.cells)}] {name}: "
                + ("" if loss is None else f"loss {loss:.4f}, ")
                + f"{estimate.duration(own)}; about {estimate.duration(left / workers)} left"
            )
