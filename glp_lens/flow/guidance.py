"""Classifier-free and classifier guidance: functions from velocities to velocities.

Both change the score of the noisy data, `grad log p(z) = -(z + (1 - sigma) v) / sigma`, to which the velocity is tied
by `v = -(z + sigma grad log p(z)) / (1 - sigma)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from glp_lens import numerics
from glp_lens.errors import InputError, one_line, pass_shortage
from glp_lens.flow.path import data_from_velocity
from glp_lens.flow.solvers import Velocity
from glp_lens.types import Acts

Classifier = Callable[[Tensor], Tensor]
"""Rows `(n, d_in)`, in activation units, to one number each, `(n,)`: for example log-probabilities of a class."""

LARGEST_LEVEL = 0.8
"""Above it, classifier guidance takes the gradient of this level.

The gradient is divided by `1 - sigma`. At sigma = 1 the estimate of the data does not depend on `z`, so that a perfect
denoiser's gradient vanishes too and the quotient changes slowly; of a trained one, only the error would be left. Up to
0.8 it grows at most fivefold; the level that does best lies between 0.7 and 0.9 for small priors of Gaussian data.
"""


@dataclass(frozen=True)
class Guide:
    """Guidance of a flow by a condition, a classifier, or both.

    Attributes:
        condition: `(d_condition,)`, or `(n, d_condition)`, NaN in a row for none.
        guidance: weight of classifier-free guidance: 1 is the plain conditional flow, 0 the unconditional one, more
            than 1 exaggerates the condition.
        classifier: a differentiable score of activations, each row by itself.
        classifier_scale: what the score is multiplied by.

    Raises:
        InputError: guidance without a condition to weigh, a scale without a classifier, or weights that are not finite.
    """

    condition: Tensor | None = None
    guidance: float = 1.0
    classifier: Classifier | None = None
    classifier_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check that the weights apply to something."""
        for name in ("guidance", "classifier_scale"):
            if not math.isfinite(value := getattr(self, name)):
                raise InputError(f"{name} must be a finite number, got {value}")
        if self.guidance != 1 and self.condition is None:
            raise InputError(
                f"guidance={self.guidance:g} weighs a condition: pass condition too, or leave guidance out"
            )

        if self.classifier_scale != 1 and self.classifier is None:
            raise InputError(
                f"classifier_scale={self.classifier_scale:g} weighs a classifier: pass classifier too, or leave it out"
            )

    def levels(self, path: list[float]) -> list[float]:
        """The noise levels at which velocities are evaluated along `path`."""
        return path if self.classifier is None else [*path, LARGEST_LEVEL]

    def lead(
        self,
        along: Callable[[Tensor | None], Velocity],
        condition: Tensor | None,
        to_units: Callable[[Tensor], Acts],
    ) -> Velocity:
        """The guided velocity of some rows.

        Args:
            along: maps a condition, or None, to the unguided velocity.
            condition: of these rows, or None.
            to_units: maps normalised rows to activation units, which the classifier takes.
        """
        velocity = along(condition)
        if self.guidance != 1:
            velocity = classifier_free(velocity, along(None), self.guidance)
        if (classifier := self.classifier) is not None:
            velocity = classifier_guided(velocity, lambda z: classifier(to_units(z)), self.classifier_scale)
        return velocity


def classifier_free(conditional: Velocity, unconditional: Velocity, weight: float) -> Velocity:
    """`v_uncond + weight (v_cond - v_uncond)` (Ho and Salimans, 2022, equation 6, whose w is `weight - 1`)."""
    if weight in (0, 1):
        return conditional if weight == 1 else unconditional

    def velocity(z: Tensor, sigma: float) -> Tensor:
        base = unconditional(z, sigma)
        return base + weight * (conditional(z, sigma) - base)

    return velocity


def classifier_guided(
    velocity: Velocity, score: Classifier, scale: float = 1.0, largest_level: float = LARGEST_LEVEL
) -> Velocity:
    """The velocity of a flow to the density `p(x) exp(scale score(x))`, up to a constant factor.

    The noisy data need `grad log E[exp(scale score(x)) | z]` added to their score; as usual the expectation is
    replaced by its value at the posterior mean `x = z - sigma v` (Chung et al., 2023, equation 11), which is exact for
    Gaussian data and a linear score. The velocity changes by `-sigma / (1 - sigma)` times that.

    Args:
        velocity: differentiable, each row by itself.
        score: of the estimated data, as `velocity` has them; each row by itself.
        largest_level: see `LARGEST_LEVEL`.

    Raises:
        InputError: on a call, a score of another shape, without a gradient, or not finite.
    """

    def guided(z: Tensor, sigma: float) -> Tensor:
        level = min(sigma, largest_level)
        through = torch.is_grad_enabled() and z.requires_grad  # the caller differentiates through the flow
        with numerics.own(), torch.enable_grad():
            at = z if through else z.detach().clone().requires_grad_()
            v = velocity(at, level)
            gradient = _gradient(score, data_from_velocity(at, v, level), at, through=through)
        if not through:
            v = v.detach()
        if level != sigma:
            v = velocity(z, sigma)
        return v - level / (1 - level) * scale * gradient

    return guided


def _gradient(score: Classifier, x: Acts, at: Tensor, *, through: bool) -> Tensor:
    """Gradient of the rows' scores at `x`, a function of `at`, with respect to `at`."""
    values = score(x)
    if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"expected one number a row of the classifier, shape ({len(x)},), got {got}")
    if not values.requires_grad:
        raise InputError("the classifier's scores have no gradient: write it in torch, without detach or no_grad")
    try:
        (gradient,) = torch.autograd.grad(values.sum(), at, create_graph=through)
    except RuntimeError as error:
        pass_shortage(error)
        raise InputError(
            f"the classifier's scores have no gradient with respect to the rows it got ({one_line(error)})"
        ) from None
    if not (values.isfinite().all() and gradient.isfinite().all()):
        raise InputError("the classifier gave scores or gradients that are not finite: give log-probabilities, bounded")
    return gradient
