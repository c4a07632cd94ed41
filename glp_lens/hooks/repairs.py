"""Repair of edited rows by a projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from glp_lens.arguments import check
from glp_lens.errors import InputError
from glp_lens.hooks.noise import RowNoise, SeededNoise
from glp_lens.hooks.operations import Directions
from glp_lens.hooks.places import Places

Repair: TypeAlias = Literal["project", "difference", "orthogonal"]
"""How a projector repairs an edit; see `glp_lens.hooks.steer`."""


class Projects(Protocol):
    """What a hook needs of a projector."""

    @property
    def d_in(self) -> int:
        """Width of its activations."""

    @property
    def hook(self) -> str | None:
        """The hook point that it was trained at, if known."""

    @property
    def max_norm(self) -> float | None:
        """Norm of a row above which it is a massive activation."""

    @property
    def project(self) -> Callable[..., Tensor]:
        """As `Projector.project`."""


class Repairer:
    """Moves edited rows towards a projector's manifold, but for massive ones.

    Without `noise`, noise is drawn from the option `generator`, or from one seeded with 0 that lives as long as this.
    A stream in bfloat16 is repaired by matrix products in bfloat16 where the projector has a choice: the row that it
    gives is rounded more coarsely than that.
    """

    def __init__(
        self,
        projector: Projects,
        noise: RowNoise | None,
        options: dict[str, Any],
        repair: Repair = "project",
        directions: Directions | None = None,
    ) -> None:
        self.projector, self.noise, self.repair, self.directions = projector, noise, repair, directions
        self.options = dict(options)
        check(projector.project, **self.options)
        if noise is None and self.options.get("generator") is None:
            self.options["generator"] = torch.Generator().manual_seed(0)

    def __call__(self, edited: Tensor, rows: Tensor, places: Places) -> Tensor:
        """The repaired rows `(n, d)`.

        Args:
            edited, rows: the rows after and before the edit, float32.
            places: where they come from.

        Raises:
            InputError: rows of another width than the projector's, or noise or conditions for another batch.
        """
        d_in = self.projector.d_in
        if rows.shape[1] != d_in:
            raise InputError(
                f"this {type(self.projector).__name__} was trained on width {d_in}, the hook point has "
                f"width {rows.shape[1]}: use the model and hook point it was trained on"
            )
        left_out = self.massive(edited)
        if self.repair == "difference":
            left_out = left_out | self.massive(rows)
            options = self._options(places, drawn=True)
            options = {name: torch.cat([v, v]) if _by_row(name, v) else v for name, v in options.items()}
            after, before = self._project(torch.cat([edited, rows]), options).split(len(rows))
            new = rows + (after - before)
        else:
            new = self._project(edited, self._options(places, drawn=False))
            if self.directions is not None:
                new = edited + self.directions.to(rows.device).outside(new - edited)
        return torch.where(left_out, edited, new)

    def massive(self, rows: Tensor) -> Tensor:
        """`(n, 1)`, whether rows are massive activations, which the projector's training left out."""
        limit = self.projector.max_norm
        norms: Tensor = rows.norm(dim=1, keepdim=True)
        return norms.gt(torch.inf if limit is None else limit)

    def _project(self, rows: Tensor, options: dict[str, Any]) -> Tensor:
        projected: Tensor = self.projector.project(rows, **options)
        return projected.to(rows.device, rows.dtype)

    def _options(self, places: Places, *, drawn: bool) -> dict[str, Any]:
        """Those of a call: the noise of each row, and its text's condition where each text has its own.

        Args:
            drawn: draw the noise here, rather than let the projector draw it.
        """
        for name, value in self.options.items():
            if _by_row(name, value) and len(value) != places.batch:
                raise InputError(
                    f"got {name} of {len(value)} texts for a batch of {places.batch}: give one row for each text"
                )
        options = {n: v[places.texts.to(v.device)] if _by_row(n, v) else v for n, v in self.options.items()}
        if places.dtype == torch.bfloat16 and getattr(self.projector, "takes_dtype", False):
            options.setdefault("dtype", torch.bfloat16)
        if self.noise is not None:
            if isinstance(self.noise, SeededNoise):
                self.noise.check(places.batch)
            options["noise"] = self.noise(places.texts, places.positions, self.projector.d_in)
        elif drawn:
            generator = options.pop("generator")
            size = (len(places), self.projector.d_in)
            options["noise"] = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float32)
        return options


def _by_row(name: str, value: Any) -> bool:
    """Whether an option has one value for each row (or text)."""
    return isinstance(value, Tensor) and value.ndim == 2 and name in ("noise", "condition")
