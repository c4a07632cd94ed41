"""The normaliser of a model: mean and standard deviation of its training activations, without massive rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Final, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.activations.massive import Massive, check_massive, norm_limit
from glp_lens.activations.stats import Stats, merge
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.stream import ActivationStream
from glp_lens.errors import InputError
from glp_lens.models.batching import Layer
from glp_lens.training import distributed
from glp_lens.types import Acts

CONSTANT: Final = 1e-4
"""Standard deviation, in medians over the dimensions, below which a dimension counts as constant."""
_BLOCK = 8192
_SAMPLE = 16_384
"""Rows of a store in which a gap between the norms is looked for."""


class Normalizer:
    """Brings each dimension of the training activations to mean 0 and variance 1.

    What it computes with is kept for each device, so `mean` and `var` must not be changed in place once it was used.

    Attributes:
        mean: `(d_in,)`, or `(layers, d_in)` with one normaliser for each layer of the language model.
        var: likewise, the population variance.
        layers: of the language model that it has statistics of: rows without NaN. Empty for a single normaliser.
    """

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.mean, self.var = mean.float(), var.float()
        self.layers = [i for i, row in enumerate(self.mean.isfinite().all(1).tolist()) if row] if mean.ndim == 2 else []
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def to(self, device: str | torch.device) -> Self:
        """Move `mean` and `var` to a device, in place."""
        self.mean, self.var = self.mean.to(device), self.var.to(device)
        self._on_device.clear()
        return self

    def statistics(self, layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on a device, `(d_in,)`, or `(n, d_in)` for the layers `(n,)`.

        The standard deviation of a constant dimension is 1.

        Raises:
            InputError: a layer that there are no statistics of, or none where one is needed.
        """
        if device not in self._on_device:
            with torch.inference_mode(False), torch.no_grad():
                std = self.var.to(device).sqrt()
                self._on_device[device] = self.mean.to(device), torch.where(std == 0, 1.0, std)
        mean, std = self._on_device[device]
        if mean.ndim == 1:
            return mean, std
        if not isinstance(layer, Tensor):
            if layer is None or not 0 <= layer < len(mean):
                raise self._missing(layer)
            return mean[layer], std[layer]
        if len(strange := layer[(layer < 0) | (layer >= len(mean))]):
            raise self._missing(int(strange[0]))
        index = layer.to(device)
        return mean[index], std[index]

    def normalize(self, x: Acts, layer: Layer = None) -> Acts:
        """Each dimension to mean 0 and variance 1, on the device of `x`."""
        mean, std = self.statistics(layer, x.device)
        return (x - mean) / std

    def denormalize(self, z: Acts, layer: Layer = None) -> Acts:
        """Back to activation units, on the device of `z`."""
        mean, std = self.statistics(layer, z.device)
        return z * std + mean

    def _missing(self, layer: int | None) -> InputError:
        return InputError(f"this prior is conditioned on the layer: pass layer=0..{len(self.mean) - 1}, got {layer}")


def mean_and_std(store: ActivationStore | ActivationStream, limit: float | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(d_in,)` of each dimension of a store, float32.

    The standard deviation of a constant dimension is 1; one is constant if its standard deviation is below `CONSTANT`
    times the median of all. Such a dimension holds rounding errors only, which scaling to variance 1 would
    blow up.

    Args:
        limit: leave out rows with a norm above it, which takes a pass over the store.
    """
    stats = store.stats if limit is None else _stats_up_to(store, limit)  # type: ignore[arg-type]
    std = stats.var.sqrt()
    varies = std > 0
    if varies.any():
        varies &= std > CONSTANT * std[varies].median()
    if (constant := int((~varies).sum())) and distributed.is_main():
        warnings.warn(
            f"{constant} of {len(std)} activation dimensions are constant: they stay 0 in normalised space",
            stacklevel=5,
        )
    return stats.mean.float(), torch.where(varies, std, 1.0).float()


def massive_rows(store: ActivationStore | ActivationStream, massive: Massive) -> tuple[float, int] | None:
    """The norm above which rows of a store are massive activations, and how many there are; None if there are none.

    Of stores that were collected without massive activations, and of streams, there are none.

    Args:
        massive: `gap`, a multiple of the median norm, or None for none; see `activations.massive.norm_limit`.

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


def _stats_up_to(store: ActivationStore, limit: float) -> Stats:
    """Statistics of the rows with a norm of at most `limit`.

    The rows are read again, since sums that hold a massive row have lost the digits of all others.
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
