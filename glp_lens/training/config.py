"""How a denoiser is trained: recipes, what can be changed in them, and the options of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.limits import LARGEST_SEED

if TYPE_CHECKING:
    from glp_lens.types import Json

_CHOICES = {
    "optimizer": ("adamw", "muon"),
    "decay": ("cosine", "linear"),
    "sigmas": ("uniform", "stratified"),
    "init": ("default", "tied"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings that determine the result of a training; the defaults are the paper's recipe.

    What does not change the result is in `RunOptions`. `recipe` gives the settings of a recipe by its name.

    Attributes:
        rows: activations seen in total; more than the store holds means several epochs.
        batch_size: rows in each optimiser step, over all processes and all micro-batches.
        grow_rows: rows after which two batches make one step, after twice as many four, and so on up to `grow_most`,
            at a learning rate that is higher by the square root of their number: gradients of a denoiser that has
            learned the coarse get noisier, and a step costs less a row; 0 for batches of one size.
        grow_most: most batches in one step.
        accumulate: micro-batches that each process splits its share of a batch into (gradient accumulation).
        optimizer: `adamw`, or `muon` for the matrices inside the network and AdamW for the rest.
        lr: peak learning rate.
        lr_width: width of the denoiser that `lr` is meant for: wider ones take `lr * lr_width / width`, since the steps
            of Adam in a wide matrix add up to more (Yang et al. 2022, "Tensor Programs V"); 0 for `lr` at any width.
        lr_start: share of `lr` at the first step.
        lr_end: share of `lr` at the last step.
        warmup: share of the steps in which the learning rate rises linearly.
        warmup_rows: rows in which it does instead of that share, so that trainings of several lengths begin alike; 0
            for the share.
        hold: share of the rest in which it stays at its peak.
        decay: how it falls after that, as a `cosine` or on a `linear` slope.
        embed_rows: rows after which the learning rate of the network that embeds the noise level falls as one over the
            rows seen, beside the schedule of `lr`; 0 for that of all else, at which its hidden units stop responding
            one after the other.
        beta2: decay of AdamW's average of squared gradients.
        clip: largest norm of the gradient.
        sigmas: how noise levels are drawn; `stratified` covers each batch evenly, with four rows to a level.
        ema: decay of the average of the weights that is validated and saved in their place; 0 for none.
        init: `default`, torch's; or `tied`: the input projection is orthogonal and the output projection its
            transpose, so that the untrained network returns about its input, and the timestep modulation starts
            around one.
        condition_dropout: of conditional priors, the share of rows whose condition is hidden, for classifier-free
            guidance.
        autocast: run the network in bfloat16, with float32 master weights.
        seed: of initialisation, order of rows, and noise.

    Raises:
        InputError: settings that cannot train.

    Example:
        >>> from glp_lens import TrainConfig
        >>> config = TrainConfig(rows=4096 * 100, lr=1e-4)
        >>> config.steps
        100
        >>> f"{config.lr_at(0):.0e}, then {config.lr_at(1):.0e}"
        '1e-06, then 1e-04'
    """

    rows: int = 1_000_000
    batch_size: int = 4096
    grow_rows: int = 0
    grow_most: int = 4
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 5e-5
    lr_width: int = 0
    lr_start: float = 0.01
    lr_end: float = 0.1
    warmup: float = 0.01
    warmup_rows: int = 0
    hold: float = 0.0
    decay: Literal["cosine", "linear"] = "cosine"
    embed_rows: int = 0
    beta2: float = 0.999
    clip: float = 1.0
    sigmas: Literal["uniform", "stratified"] = "uniform"
    ema: float = 0.0
    init: Literal["default", "tied"] = "default"
    condition_dropout: float = 0.1
    autocast: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        if self.batch_size < 1 or self.rows < self.batch_size:
            raise InputError(f"training needs at least one whole batch: rows={self.rows}, batch_size={self.batch_size}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise InputError(f"lr must be a positive number, got {self.lr}")
        least_of = {"seed": 0, "grow_rows": 0, "grow_most": 1, "accumulate": 1, "lr_width": 0, "warmup_rows": 0,
                    "embed_rows": 0}  # fmt: skip
        for name, least in least_of.items():
            if not least <= (number := getattr(self, name)) <= LARGEST_SEED:
                raise InputError(f"{name} must be between {least} and {LARGEST_SEED}, got {number}")
        if not (self.clip > 0):
            raise InputError(f"clip must be a positive number, got {self.clip}")
        for name in ("lr_start", "lr_end", "warmup", "condition_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share: expected 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.hold < 1:
            raise InputError(f"hold is a share below 1, as some steps must be left to fall in, got {self.hold}")
        if not 0 < self.beta2 < 1:
            raise InputError(f"beta2 must be between 0 and 1, got {self.beta2}")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is a decay such as 0.999, or 0 for none, got {self.ema}")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")

    @property
    def rows_per_sigma(self) -> int:
        """Rows of a batch that share a noise level, and with it the denoiser's time path."""
        return 4 if self.sigmas == "stratified" else 1

    @property
    def steps(self) -> int:
        """Whole batches in `rows`: optimiser steps, where none makes a step with others."""
        return self.rows // self.batch_size

    @property
    def largest_batch(self) -> int:
        """Rows of the largest optimiser steps."""
        return self.batch_size * self._growth(self.steps - 1)[1]

    @property
    def updates(self) -> int:
        """Optimiser steps."""
        at = found = 0
        while at < self.steps:
            _, together, end = self._growth(at)
            found, at = found - (at - end) // together, end
        return found

    def batches_at(self, step: int) -> int:
        """Batches of the optimiser step that begins with batch `step` (0-based)."""
        _, together, end = self._growth(step)
        return max(1, min(together, end - step))

    def begins_at(self, step: int) -> int:
        """The first batch (0-based) of the optimiser step that batch `step` is of."""
        start, together, _ = self._growth(step)
        return step - (step - start) % together

    def _growth(self, step: int) -> tuple[int, int, int]:
        """The part of the training that batch `step` is in: its first batch, how many make a step, its end."""
        start, together = 0, 1
        while self.grow_rows and 2 * together <= self.grow_most:
            end = -(-self.grow_rows * together // self.batch_size)
            if step < end:
                return start, together, min(end, self.steps)
            start, together = end, 2 * together
        return start, together, self.steps

    def for_width(self, width: int) -> TrainConfig:
        """These settings with the peak learning rate of a denoiser of this width."""
        scale = min(1.0, self.lr_width / width) if self.lr_width else 1.0
        return replace(self, lr=self.lr * scale, lr_width=0)

    @property
    def _rise(self) -> int:
        """Steps in which the learning rate rises."""
        rise = self.warmup_rows / self.batch_size if self.warmup_rows else self.warmup * self.steps
        return max(1, round(rise))

    @property
    def steps_held(self) -> int:
        """Steps before the learning rate falls: until then a longer training with equal `warmup_rows` is the same."""
        rise = self._rise
        return self.begins_at(min(self.steps, rise + int(self.hold * max(1, self.steps - 1 - rise)) + 1))

    def lr_at(self, step: int) -> float:
        """Learning rate of the optimiser step that begins with batch `step` (0-based)."""
        peak = self.lr * math.sqrt(self._growth(step)[1])
        rise = self._rise
        if step < rise:
            return peak * (self.lr_start + (1 - self.lr_start) * step / rise)
        share = min(1.0, (step - rise) / max(1, self.steps - 1 - rise))
        share = max(0.0, share - self.hold) / (1 - self.hold)
        height = 1 - share if self.decay == "linear" else (1 + math.cos(math.pi * share)) / 2
        return peak * (self.lr_end + (1 - self.lr_end) * height)

    def embed_share(self, step: int) -> float:
        """Learning rate of the noise level's embedding at batch `step` (0-based), as a share of that of all else."""
        return min(1.0, self.embed_rows / ((step + 1) * self.batch_size)) if self.embed_rows else 1.0


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a training is run and what it writes on the way; none of it changes the trained weights, but for rounding.

    Attributes:
        state: file that keeps the state of an unfinished training, so that the same call continues an interrupted one.
            It stays at the end, for whoever saves the model to remove: until then nothing else holds the weights.
            Several processes must all see it.
        start: state of a longer training to begin from, as if this one had made those steps itself. Its settings must
            be the same but for `rows`, and its learning rate must have been this one's up to there.
        keep: files for the state at some numbers of steps, for shorter trainings to `start` from.
        save_seconds: time between two writes of `state`.
        checkpoints: folder of intermediate models, each complete: `step_00000100` and so on.
        snapshots: about how many of them, at steps evenly spaced on a logarithmic scale.
        log_points: least number of entries in the training curve; there are at most about twice as many.
        on_entry: called with each entry of the training curve when it is made, in the main process.
        recompute: compute activations again in the backward pass rather than keep them (activation checkpointing):
            much less memory, a third more time.
        shard_weights: of several processes, spread weights, gradients and optimiser states over them (FSDP2).
        compile: compile the blocks (torch.compile); by default where there are CUDA and Triton.
    """

    state: Path | None = None
    start: Path | None = None
    keep: Mapping[int, Path] = field(default_factory=dict)
    save_seconds: float = 30.0
    checkpoints: Path | None = None
    snapshots: int = 0
    log_points: int = 50
    on_entry: Callable[[Json], None] | None = None
    recompute: bool = False
    shard_weights: bool = False
    compile: bool | None = None

    def __post_init__(self) -> None:
        """Take paths as texts, too."""
        for name in ("state", "start", "checkpoints"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))


FREE = ("accumulate", "lr_width")
"""Settings that an interrupted training may continue with others of: they change the result by rounding only, or, as
`lr_width`, are in another (`lr`) by the time of the training."""

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "small": {"batch_size": 512, "lr": 2e-3, "sigmas": "stratified"},
    "fast": {
        "batch_size": 256, "lr": 2e-3, "lr_width": 576, "lr_end": 0.0, "warmup": 0.1, "hold": 0.6, "decay": "linear",
        "grow_rows": 102_400, "embed_rows": 102_400, "beta2": 0.95, "sigmas": "stratified", "init": "tied",
    },
}  # fmt: skip
"""Recipes by name, as departures from the paper's: `fast` reached a given loss in the least time of all recipes
compared in docs/results/loss-for-compute; `small` is AdamW with a tuned learning rate, for small machines."""

DEFAULT_ROWS = 400_000
"""Rows of a training for which no number is given."""


@checked
def recipe(name: str = "fast", rows: int = DEFAULT_ROWS, **changes: Any) -> TrainConfig:
    """A recipe by its name, with some settings changed; those that are None stay the recipe's.

    Args:
        name: `fast`, `paper` or `small`.
        rows: activations seen in total.
        changes: other fields of `TrainConfig`; with `lr`, that is the peak at any width, and with `batch_size`, that is
            the size of all batches.

    Raises:
        InputError: no recipe of that name, or settings that cannot train.

    Example:
        >>> from glp_lens import recipe
        >>> config = recipe("fast", rows=100_000, lr=1e-3)
        >>> config.batch_size, config.lr, config.decay
        (256, 0.001, 'linear')
    """
    if name not in RECIPES:
        raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    changed = {setting: value for setting, value in changes.items() if value is not None}
    for given, off in (("lr", "lr_width"), ("batch_size", "grow_rows")):
        if given in changed:
            changed = {off: 0, **changed}
    return TrainConfig(**{**RECIPES[name], "rows": rows, **changed})
