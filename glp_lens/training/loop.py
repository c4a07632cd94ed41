"""The training loop: a denoiser on an iterator of normalised batches, resumable and reproducible bit for bit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from glp_lens.errors import InputError
from glp_lens.training import checkpoint, distributed
from glp_lens.training.config import FREE, RunOptions, TrainConfig
from glp_lens.training.mixed_precision import MixedAdamW
from glp_lens.training.objective import Batch, Noise, draw_noise, flow_matching_loss, validation_loss
from glp_lens.training.optim import Average, optimizers, set_rates
from glp_lens.types import Json

Feed = Callable[[int], Generator[Batch]]
"""`feed(k)` yields this process's share of the batches from the k-th on, the same ones at every call.

It is closed at the end, so that its threads and memory go even where an error keeps the training's frame alive.
"""

_LATEST = 300.0
"""Seconds after which the state is also written between two logging points."""
_LOOK = 20
"""Steps between two checks of the loss on an accelerator, where a check waits for the device."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a training, besides the weights.

    Attributes:
        history: one entry for each logging point: step, rows, lr, seconds, loss and grad_norm (means since the last
            entry), validation losses.
        seconds: wall-clock time over all runs of a resumed training.
    """

    history: list[Json]
    seconds: float


def train(
    denoiser: nn.Module,
    feed: Feed,
    config: TrainConfig,
    *,
    validation: Batch | None = None,
    run: RunOptions | None = None,
    identity: Json | None = None,
    save_now: Callable[[int], bool] = lambda _: False,
    on_saved: Callable[[int], None] = lambda _: None,
    on_snapshot: Callable[[int], None] = lambda _: None,
) -> TrainResult:
    """Train `denoiser` in place, on the device it is on.

    Noise and noise levels of a row depend only on the seed, the step and the row's place in the batch: a run that was
    interrupted and resumed ends with the weights of one that was not, and several processes give the weights of one,
    but for rounding of sums.

    Args:
        feed: the data, already normalised; of several processes, each gets an equal share of every batch.
        validation: held-out rows, scored at every logging point with noise fixed once.
        run: how the training is run. Its folder of checkpoints is up to `on_snapshot`.
        identity: what else must match for `run.state` to be continued, for example the store's hash.
        save_now: called after each step with the number of steps done; whether the state must be written at once. All
            processes must answer the same.
        on_saved: called after each write, and when a run is resumed, with the number of steps that the state holds.
        on_snapshot: called `run.snapshots` times, in every process, with the number of steps done, while the denoiser
            holds the weights that it would end with (on the CPU if training is sharded).

    Raises:
        InputError: batches that cannot be shared out evenly; a loss or gradient that is not finite: the weights, and
            the state written last, are from before it.
    """
    run = run or RunOptions()
    trainer = _Trainer(denoiser, config, run)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    key = {"config": settings, "identity": identity or {}}
    place = _begin(trainer, run, key, on_saved)
    step, history, (loss_sum, norm_sum, count) = place.step, place.history, place.pending
    total = torch.tensor([loss_sum, norm_sum], dtype=torch.float32, device=trainer.device)
    every = max(1, config.steps // run.log_points)
    marks = snapshot_steps(config.steps, run.snapshots)
    began = saved = time.monotonic()
    bar = tqdm(
        total=config.steps * config.batch_size,
        initial=step * config.batch_size,
        desc="train GLP",
        unit="row",
        unit_scale=True,
        mininterval=2,
        disable=not distributed.is_main() or bool(os.environ.get("TQDM_DISABLE")),
    )
    with bar, closing(feed(step)) as data:
        while step < config.steps:
            before, together = step, config.batches_at(step)
            total += together * trainer.step(step, [next(data) for _ in range(together)])
            step, count = step + together, count + together
            bar.update(together * config.batch_size)
            logging = step // every > before // every or step == config.steps
            snapshot = not marks.isdisjoint(range(before + 1, step + 1))
            asked = run.state is not None and save_now(step)
            keeping = logging or asked or snapshot
            look = keeping or trainer.always_look or step // _LOOK > before // _LOOK
            if look and not trainer.is_sound(total, weights=keeping):
                raise trainer.diverged(step, run.state, key, on_snapshot if run.snapshots else None)
            if logging:
                loss, norm = (total / count).tolist()
                entry = {
                    "step": step,
                    "rows": step * config.batch_size,
                    "lr": config.lr_at(before),
                    "seconds": place.seconds + time.monotonic() - began,
                    "loss": loss,
                    "grad_norm": norm,
                }
                if validation is not None:
                    with trainer.averaged():
                        entry |= validation_loss(trainer.denoiser, validation, autocast=config.autocast)
                history.append(entry)
                losses: dict[str, str] = {k: f"{entry[k]:.3f}" for k in ("loss", "validation_loss") if k in entry}
                bar.set_postfix(losses, refresh=False)  # with the next drawing, not one for each entry
                if run.on_entry and distributed.is_main():
                    run.on_entry(entry)
                total, count = torch.zeros_like(total), 0
            if snapshot:  # before the state, so that a run killed here takes it again
                with trainer.final_weights():
                    on_snapshot(step)
            now = time.monotonic()
            due = run.state and (
                step == config.steps or asked or _is_due(before, step, count == 0, now - saved, run.save_seconds)
            )
            if files := [file for file in (run.keep.get(step), run.state if due else None) if file]:
                pending = (float(total[0]), float(total[1]), count)
                reached = checkpoint.Place(step, history, place.seconds + now - began, pending)
                for file in files:
                    checkpoint.save(file, key, trainer.parts(), reached)
            if due:
                saved = now
                on_saved(step)
    trainer.finish()
    return TrainResult(history, place.seconds + time.monotonic() - began)


def _begin(trainer: _Trainer, run: RunOptions, key: Json, on_saved: Callable[[int], None]) -> checkpoint.Place:
    """Where the run begins: where it was interrupted, else where a longer one is to be left, else at the start."""
    if run.state and (resumed := trainer.load(run.state, key)):
        on_saved(resumed.step)
        return resumed
    return trainer.begin_from(run.start, key) if run.start else checkpoint.Place()


def _is_due(before: int, step: int, logged: bool, seconds: float, save_seconds: float) -> bool:
    """Whether to write the state: at a logging point, or anywhere if the last time is long ago."""
    if distributed.running() and not logged and step // _LOOK == before // _LOOK:
        return False  # the processes must agree, which costs time
    return distributed.agreed(seconds > (save_seconds if logged else max(save_seconds, _LATEST)))


def snapshot_steps(steps: int, n: int) -> set[int]:
    """About `n` numbers of steps, from 1 to all, evenly spaced on a logarithmic scale; if one, the last."""
    n = min(n, steps)
    return {round(steps ** (i / (n - 1))) for i in range(n)} if n > 1 else {steps} if n else set()


class _Trainer:
    """A denoiser with its optimisers and the running average of its weights."""

    def __init__(self, denoiser: nn.Module, config: TrainConfig, run: RunOptions) -> None:
        self.given, self.config = denoiser, config
        self.device = next(denoiser.parameters()).device
        self.always_look = self.device.type == "cpu"
        world = distributed.world_size()
        if config.batch_size % (world * config.accumulate):
            raise InputError(
                f"a batch must divide into equal parts: batch_size={config.batch_size} does not among {world} "
                f"process(es) times accumulate={config.accumulate}"
            )
        self.share = config.batch_size // world
        if run.shard_weights:
            self.denoiser = distributed.shard(denoiser, bfloat16=config.autocast)
        else:  # a copy around the same weights, so that compiling does not change the given module
            self.denoiser = deepcopy(denoiser, {id(p): p for p in denoiser.parameters()})
        self.denoiser.train()
        if run.recompute:
            self.denoiser.recompute = True  # type: ignore[assignment]
        if run.compile or (run.compile is None and self.device.type == "cuda" and find_spec("triton")):
            for block in self.denoiser.get_submodule("layers").children():
                block.compile()
        self.module = distributed.wrap(self.denoiser)
        self.optimizers = optimizers(self.denoiser, config)
        mixed = [optimizer for optimizer in self.optimizers if isinstance(optimizer, MixedAdamW)]
        self.mixed = mixed[0] if mixed else None
        self.average = Average(self.denoiser, config.ema) if config.ema else None
        self._rehearsed = not isinstance(self.module, DistributedDataParallel)

    def step(self, step: int, batches: Sequence[Batch]) -> Tensor:
        """One optimiser step, from batch `step` on; returns loss and gradient norm, `(2,)`, equal in all processes."""
        start = distributed.rank() * self.share
        rows = range(start, start + self.share)
        for own in batches:
            if len(own) != self.share:
                raise InputError(f"expected {self.share} rows for this process, got a batch of {len(own)}")
        width = batches[0].x.shape[1]
        noise = Noise.joined([draw_noise(self.config, step + i, rows, width, self.device) for i in range(len(batches))])
        batch = Batch.joined(batches).to(self.device).without_condition(noise.drop)
        # Where a batch does not fit into memory, several do not either.
        parts = self.config.accumulate * (len(batches) if self.config.accumulate > 1 else 1)
        total, size = torch.zeros((), dtype=torch.float32, device=self.device), len(batch) // parts
        if not self._rehearsed:
            # DDP regroups the gradients after the first pass, which changes the order of its sums: were that a pass
            # of a step, a resumed run would round differently from an uninterrupted one.
            self._backward(batch.part(slice(size)), noise.part(slice(size)), parts)
            self._forget_gradients()
            self._rehearsed = True
        for at in range(0, len(batch), size):
            part = slice(at, at + size)
            last = at + size == len(batch)
            with nullcontext() if last else distributed.without_sync(self.module):
                total += self._backward(batch.part(part), noise.part(part), parts) / parts
        norm = self.mixed.clip() if self.mixed else self._clip()
        # Where the check costs nothing, a bad gradient does not reach the weights.
        if not self.always_look or bool(norm.isfinite()):
            for optimizer in self.optimizers:
                set_rates(optimizer, self.config, step)
                optimizer.step()
        self._forget_gradients()
        if self.average:
            self.average.update(self.denoiser, step)
        return torch.stack([distributed.mean(total), norm])

    def _backward(self, batch: Batch, noise: Noise, parts: int) -> Tensor:
        """Accumulate the gradient of some rows, one of so many parts of a step; returns their loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast and not self.mixed):
            loss = flow_matching_loss(self.module, batch, noise.eps, noise.sigma).mean()
        (loss / parts).backward()
        return loss.detach()

    def _clip(self) -> Tensor:
        return distributed.whole(nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.clip))

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def is_sound(self, total: Tensor, *, weights: bool) -> bool:
        """Whether loss and gradient norm are finite, and the weights: an update can overflow them by itself."""
        seen = [total.sum()]
        if weights:
            seen += [distributed.whole(p.detach().norm()) for p in self.denoiser.parameters()]
        return bool(torch.stack(seen).isfinite().all())

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the trained copy has the weights that it would end with."""
        return self.average.in_place(self.denoiser) if self.average else nullcontext()

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """Context in which the given denoiser has the weights that it would end with."""
        with self.averaged():
            distributed.gather(self.denoiser, into=self.given)
            yield

    def finish(self) -> None:
        """Put the final weights into the given denoiser, on its device."""
        if self.average:
            self.average.swap(self.denoiser)
        if self.mixed:
            self.mixed.release()
        distributed.gather(self.denoiser, into=self.given)
        self.given.to(self.device).eval()

    def parts(self) -> checkpoint.Parts:
        """The parts of the training state."""
        return checkpoint.Parts(self.denoiser, self.optimizers, self.average.values if self.average else {})

    def load(self, state: Path, key: Json) -> checkpoint.Place | None:
        """Put a saved state into the parts; None if there is none."""
        place = checkpoint.load(state, key, self.parts())
        if self.mixed:
            self.mixed.refresh()
        return place

    def begin_from(self, path: Path, key: Json) -> checkpoint.Place:
        """Put the state of a longer training into the parts.

        Raises:
            InputError: there is none, or its training was another up to there.
        """
        if not path.exists():
            raise InputError(f"no state to begin from: {path} does not exist")
        before = checkpoint.key_of(path)
        try:
            longer = TrainConfig(**before["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no settings of a training ({error}): make it again") from None
        given = {**before, "config": {**before["config"], "rows": key["config"]["rows"]}}
        if given != json.loads(json.dumps(key)):
            raise checkpoint.OtherTrainingError(
                f"{path} belongs to a training with other settings or data: begin from one that differs in rows only"
            )
        place = checkpoint.load(path, before, self.parts())
        assert place is not None
        if place.step > self.config.steps or any(
            longer.lr_at(step) != self.config.lr_at(step) for step in range(place.step)
        ):
            raise InputError(
                f"{path} is of step {place.step} of {longer.steps}, up to which its learning rate was not that of a "
                f"training of {self.config.steps} steps: begin from one of step {self.config.steps_held} at most, and "
                "give both the same warmup_rows"
            )
        if self.mixed:
            self.mixed.refresh()
        return place

    def diverged(
        self, step: int, state: Path | None, key: Json, on_snapshot: Callable[[int], None] | None
    ) -> InputError:
        """The error for a loss that is not finite; the last good state is put back first."""
        kept = "nothing was saved before"
        if state and (place := self.load(state, key)):
            kept = f"the last good state, of step {place.step}, is kept in {state}"
            if on_snapshot:
                with self.final_weights():
                    on_snapshot(place.step)
        return InputError(
            f"training diverged at step {step}: loss or gradient is not finite; lower lr (now {self.config.lr:g}) or "
            f"check the store for massive activations; {kept}"
        )
