"""Rows in batches of bounded size, each with its layer of the language model and its condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens.errors import InputError

Layer = int | Tensor | None
"""Layer of the language model, for multi-layer priors: one for all rows, or `(n,)` integers."""

ROWS = 4096
"""Rows that go through the network at once."""


@dataclass(frozen=True)
class Known:
    """Layer and condition of rows, each one value for all or one for each row; `known[index]` are those of a slice."""

    layer: Layer
    condition: Tensor | None

    def __getitem__(self, index: slice) -> tuple[Layer, Tensor | None]:
        """Those of the rows in `index`."""
        condition = self.condition
        each = condition is not None and condition.ndim == 2
        return pick(self.layer, index), condition[index] if condition is not None and each else condition


def known(n: int, layer: Layer, condition: Tensor | None, device: torch.device) -> Known:
    """Layer and condition of `n` rows, on the device of the network.

    Raises:
        InputError: conditions of another number of rows, or infinite ones.
    """
    layer = layer.to(device) if isinstance(layer, Tensor) else layer
    if condition is None:
        return Known(layer, None)
    if not isinstance(condition, Tensor):
        condition = torch.as_tensor(condition, dtype=torch.float32)
    if condition.ndim == 2 and len(condition) != n:
        raise InputError(f"expected one condition, or one for each of {n} rows, got {len(condition)}")
    if condition.isinf().any():
        raise InputError("expected a finite condition, or NaN for none, got infinity")
    return Known(layer, condition.to(device))


def check_layer(layer: Layer, n: int | None, trained: Sequence[int]) -> Layer:
    """The layer as a plain integer, or `(n,)` int64.

    Args:
        n: number of rows; None for any.
        trained: layers that a prior knows; if empty, any.

    Raises:
        InputError: no integers, another number of them than rows, or a layer that is not `trained`.
    """
    if layer is None:
        return None
    layers = None if isinstance(layer, str) else torch.as_tensor(layer)
    fits = layers is not None and (layers.ndim == 0 or (layers.ndim == 1 and n in (None, len(layers))))
    if layers is None or not fits or layers.is_floating_point() or layers.dtype == torch.bool:
        got = repr(layer) if layers is None or not layers.ndim else f"{layers.dtype} of shape {tuple(layers.shape)}"
        raise InputError(f"layer must be an integer, or one for each of {'the' if n is None else n} rows, got {got}")
    if trained:
        strange = layers[~torch.isin(layers, torch.tensor(trained, device=layers.device))]
        if len(strange):
            raise untrained(int(strange[0]), trained)
    return layers.long() if layers.ndim else int(layers)


def untrained(layer: int | str, trained: Sequence[int]) -> InputError:
    """The error for a layer that a prior was not trained on."""
    return InputError(f"this prior was trained on layers {', '.join(map(str, trained))}, got {layer}: pass one of them")


def pick(value: Layer, index: slice) -> Layer:
    """The part of a per-row value that belongs to a batch; a value for all rows passes."""
    return value[index] if isinstance(value, Tensor) and value.ndim else value


def in_batches(
    function: Callable[[Tensor, slice], Tensor], rows: Tensor, *, copies: int = 1, differentiable: bool = False
) -> Tensor:
    """`function(rows, their slice)` over batches of bounded size, joined; with gradients only if `differentiable`.

    Args:
        copies: times that the function passes each row through the network at once.
    """
    size = max(1, ROWS // copies)
    slices = [slice(i, i + size) for i in range(0, len(rows), size)] or [slice(0, 0)]
    bar = tqdm(slices, desc="prior", unit="batch", mininterval=2, delay=2, leave=False, disable=len(slices) == 1)
    grad = differentiable and torch.is_grad_enabled()
    with torch.set_grad_enabled(grad):
        return torch.cat([function(rows[s], s) for s in bar])
