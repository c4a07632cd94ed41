"""What every model does first with the rows it is given: check them, and draw noise of their shape."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from glp_lens.activations.massive import Massive, check_massive, norm_limit
from glp_lens.activations.stats import Stats, merge
from glp_lens.activations.stream import ActivationStream
from glp_lens.errors import InputError
from glp_lens.training import distributed
from glp_lens.types import Acts

if TYPE_CHECKING:
    from glp_lens.activations.store import ActivationStore


CONSTANT: Final = 1e-4
"""Standard deviation, in medians over the dimensions, below which a dimension counts as constant."""
_BLOCK = 8192
_SAMPLE = 16_384
"""Rows in which a gap is looked for."""


def check_rows(x: Tensor, d_in: int) -> Acts:
    """The rows as float32, on their own device; `x` itself where it is that already.

    Raises:
        InputError: not `(n, d_in)`, or NaN or infinity among the values.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"expected activations as a torch tensor, got {type(x).__name__}: use torch.as_tensor")
    if x.ndim != 2 and x.shape[-1:] == (d_in,):
        raise InputError(f"expected rows of shape (n, {d_in}), got {tuple(x.shape)}: pass x.reshape(-1, {d_in})")
    if x.ndim != 2 or x.shape[1] != d_in:
        raise InputError(
            f"expected activations of shape (n, {d_in}), got {tuple(x.shape)}: "
            "use the language model and hook point that this model was trained on"
        )
    x = x.float()
    if not x.isfinite().all():
        bad = int((~x.isfinite()).any(1).sum())
        raise InputError(
            f"expected finite activations, got NaN or infinity in {bad} of {len(x)} rows: "
            "run the language model in bfloat16 or float32, float16 overflows"
        )
    return x


def draw_noise(n: int, d_in: int, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
    """`noise` as float32 if given, else `(n, d_in)` standard normal numbers, on the generator's device.

    All rows are drawn before any batching, which makes a row's noise independent of the batch size. Without a
    generator the noise is that of seed 0: the same call gives the same result.

    Raises:
        InputError: `noise` has another shape.
    """
    if n < 0:
        raise InputError(f"expected a number of rows of at least 0, got {n}")
    if noise is None:
        generator = generator or torch.Generator().manual_seed(0)
        return torch.randn(n, d_in, generator=generator, device=generator.device, dtype=torch.float32)
    if noise.shape != (n, d_in):
        raise InputError(f"expected noise of shape ({n}, {d_in}), got {tuple(noise.shape)}: draw it to match")
    return noise.float()


def mean_and_std(store: ActivationStore | ActivationStream, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(d_in,)` of each dimension, float32; the latter 1 where (nearly) nothing varies.

    A dimension is nearly constant if its standard deviation is below `CONSTANT` times the median of all: what is left
    is rounding, and to blow it up would make the smallest edit of that dimension the largest of all.

    Args:
        limit: leave out rows whose norm is above it, which takes a pass over the store.
    """
    stats = store.stats if limit is None else stats_up_to(store, limit)  # type: ignore[arg-type]
    std = stats.var.sqrt()
    varies = std > 0
    if varies.any():
        varies &= std > CONSTANT * std[varies].median()
    if (constant := int((~varies).sum())) and distributed.is_main():
        warnings.warn(
            f"{constant} of {len(std)} activation dimensions are constant: they stay 0 in normalised space",
            stacklevel=4,
        )
    return stats.mean.float(), torch.where(varies, std, 1.0).float()


def massive_rows(store: ActivationStore | ActivationStream, massive: Massive) -> tuple[float, int] | None:
    """The norm above which rows of a store are massive, and how many there are; None if there are none.

    Where the collector left such rows out, nobody looks; a stream has no list of norms to look at.

    Args:
        massive: `gap`, from some thousands of rows, a multiple of the median norm, or None for none; see
            `activations.massive.norm_limit`.

    Raises:
        InputError: another rule.
    """
    check_massive(massive)
    if massive is None or isinstance(store, ActivationStream) or not hasattr(store, "column"):
        return None
    collected = store.manifest.source.get("settings", {}).get("massive")
    if collected is not None and ("gap" in (collected, massive) or collected <= massive):
        return None
    by_gap = massive == "gap"
    limit = norm_limit(store.sample(_SAMPLE, seed=0), "gap") if by_gap else float(massive) * store.median_norm
    count = 0 if limit is None else int((store.column("norm") > limit).sum())
    return (limit, count) if limit is not None and count else None


def stats_up_to(store: ActivationStore, limit: float) -> Stats:
    """Statistics of the rows with a norm of at most `limit`.

    The rows are read again: sums in which a massive row is 1e8 times the rest have lost the rest.
    """
    norms = torch.from_numpy(store.column("norm"))
    silent = not distributed.is_main()
    bar = tqdm(total=len(store), desc="statistics", unit="row", unit_scale=True, mininterval=2, disable=silent)

    def parts() -> Iterator[Stats]:  # merged one by one: all blocks' together can take gigabytes
        for start in range(0, len(store), _BLOCK):
            usable = norms[start : start + _BLOCK] <= limit
            if usable.any():
                yield Stats.of(store.rows(start, start + _BLOCK)[usable])
            bar.update(len(usable))

    with bar:
        return merge(parts())
