"""Edits of rows along directions: add, ablate, clamp, rotate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Literal, Self, TypeAlias

import torch
from torch import Tensor

from glp_lens.errors import InputError

Operation: TypeAlias = Literal["add", "ablate", "clamp", "rotate"]
"""What to do along the directions; see `glp_lens.hooks.steer`."""
_PARALLEL = 1e-6
"""Share of a row's norm below which its part beside the direction is rounding."""


class Directions:
    """Directions `(k, d)`, and the space that they span.

    Attributes:
        vectors: `(k, d)` float32, as given.
        inverse: `(d, k)`, its pseudo-inverse: `y @ inverse` are the coordinates of the span's point nearest to `y`.
        basis: `(k, d)`, orthonormal rows of the same span, by Gram-Schmidt in the order given.
    """

    def __init__(self, vectors: Tensor, inverse: Tensor, basis: Tensor) -> None:
        self.vectors, self.inverse, self.basis = vectors, inverse, basis

    @classmethod
    def of(cls, given: Tensor, *, spanning: bool) -> Self:
        """One direction `(d,)` or several `(k, d)`.

        Args:
            given: in activation units.
            spanning: their span is needed, so they must be independent.

        Raises:
            InputError: no finite directions, or where their span is needed, some that depend on the others, or are 0.
        """
        if given.ndim not in (1, 2) or not given.numel() or not torch.isfinite(given).all():
            raise InputError(f"direction must be a finite vector (d_in,) or (k, d_in), got shape {tuple(given.shape)}")
        vectors = given.detach().reshape(-1, given.shape[-1])
        wide = vectors.cpu().double()
        units = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-300)
        if spanning and int(torch.linalg.matrix_rank(units)) < len(units):
            raise InputError("directions must be linearly independent, and none of them 0: leave some out")
        q, r = torch.linalg.qr(wide.T)
        basis = (q * r.diagonal().sign()).T.contiguous()
        return cls(vectors.float(), torch.linalg.pinv(wide).float().to(given.device), basis.float().to(given.device))

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Width of the activations."""
        return self.vectors.shape[1]

    def to(self, device: torch.device) -> Directions:
        """The directions on another device."""
        return Directions(self.vectors.to(device), self.inverse.to(device), self.basis.to(device))

    def combine(self, coefficients: Tensor) -> Tensor:
        """`(n, k)` coefficients times the directions, summed, `(n, d)`."""
        if len(self.vectors) == 1:
            return coefficients * self.vectors
        return coefficients @ self.vectors

    def outside(self, y: Tensor) -> Tensor:
        """What is left of rows `(n, d)` after taking off their part in the span."""
        return y - (y @ self.basis.T) @ self.basis


def _add(x: Tensor, y: Tensor, alpha: Tensor, directions: Directions) -> Tensor:
    return x + directions.combine(alpha)


def _ablate(x: Tensor, y: Tensor, alpha: Tensor, directions: Directions) -> Tensor:
    return x - directions.combine(alpha * (y @ directions.inverse))


def _clamp(x: Tensor, y: Tensor, alpha: Tensor, directions: Directions) -> Tensor:
    return x + directions.combine(alpha - y @ directions.inverse)


def _rotate(x: Tensor, y: Tensor, alpha: Tensor, directions: Directions) -> Tensor:
    if len(directions.vectors) == 1:
        return _turn_towards(x, y, alpha, directions.basis)
    a = y @ directions.basis.T
    cos, sin = alpha.cos(), alpha.sin()
    turned = torch.cat([cos * a[:, :1] - sin * a[:, 1:], sin * a[:, :1] + cos * a[:, 1:]], dim=1)
    return x + (turned - a) @ directions.basis


def _turn_towards(x: Tensor, y: Tensor, alpha: Tensor, unit: Tensor) -> Tensor:
    along = (y * unit).sum(1, keepdim=True)
    beside = y - along * unit
    height = beside.norm(dim=1, keepdim=True)
    norm = torch.hypot(along, height)
    angle = (torch.atan2(height, along) - alpha).clamp(0, math.pi)
    turned = norm * (angle.cos() * unit + angle.sin() * beside / height.clamp(min=torch.finfo(y.dtype).tiny))
    return torch.where(height > _PARALLEL * norm, x + (turned - y), x)


OPERATIONS: Final[dict[str, Callable[[Tensor, Tensor, Tensor, Directions], Tensor]]] = {
    "add": _add,
    "ablate": _ablate,
    "clamp": _clamp,
    "rotate": _rotate,
}
"""(rows `(n, d)`, the same less the centre, strengths `(n, k)` or angles `(n, 1)`, directions) -> new rows."""
