"""What a model of activations can do, as abstract types.

A model inherits the capabilities it has, and a suite asks for the one it needs. All methods take and return activations
in the language model's own units. Rows may lie on any device: the model computes on its own device and returns the
result on theirs; `sample` returns rows on the model's. `noise` `(n, d_in)` is standard normal and overrides
`generator`; models without randomness accept and ignore both. Results do not depend on the caller's modes of torch
(autocast, default dtype, inference mode): the methods named here compute outside of them, in every model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Generator, Tensor

from glp_lens import hooks, lm, numerics
from glp_lens.arguments import checked
from glp_lens.types import Acts, Features, HookFunction, PerRow

_COMPUTING = frozenset(
    ("encode", "decode", "reconstruct", "project", "sample", "score", "normalize", "denormalize", "velocity")
)


class Capability:
    """Something that a model can do.

    Its computing methods run in `numerics.own`, and their arguments are compared with their annotations, also in models
    of other authors.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Make the methods that compute independent of the caller's modes of torch, and check their arguments."""
        super().__init_subclass__(**options)
        for name in _COMPUTING & vars(cls).keys():
            setattr(cls, name, numerics.own()(checked(vars(cls)[name])))


class Featurizer(Capability, ABC):
    """Turns activations into features, for probing."""

    stochastic: ClassVar[bool] = False
    """Whether `encode`, `project` and `reconstruct` depend on noise."""

    @property
    @abstractmethod
    def n_features(self) -> int:
        """Number of features."""

    @property
    def feature_layers(self) -> int:
        """Number of equal, consecutive blocks that the features come in, one for each layer of the model's own."""
        return 1

    @abstractmethod
    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """Features of each row."""


class Decoder(Capability, ABC):
    """Turns features back into activations, by a linear map and an offset."""

    @abstractmethod
    def decode(self, features: Features) -> Acts:
        """The rows that have these features, as near as the model can say."""


class Reconstructor(Capability, ABC):
    """Passes activations through the model's bottleneck and back."""

    @abstractmethod
    def reconstruct(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """The rows as the model would write them."""


class Projector(Capability, ABC):
    """Moves edited activations towards the manifold of real ones."""

    takes_dtype: ClassVar[bool] = False
    """Whether `project` has an option `dtype`, the number format of its matrix products."""
    d_in: int

    @property
    @abstractmethod
    def hook(self) -> str | None:
        """The hook point that the training activations came from, if known."""

    @property
    @abstractmethod
    def max_norm(self) -> float | None:
        """Norm above which activations were left out of training: such rows are not projected."""

    @abstractmethod
    def project(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """The rows moved towards the manifold; models with a strength of projection take it as an option."""

    def projection_hook(
        self,
        hook: str | None = None,
        *,
        model: lm.Model | None = None,
        allow_mismatch: bool = False,
        positions: hooks.Positions = "last",
        noise: hooks.RowNoise | None = None,
        mask: Tensor | None = None,
        repair: hooks.Repair = "project",
        direction: Tensor | None = None,
        **options: Any,
    ) -> tuple[str, HookFunction]:
        """`(hook point, hook function)` for `model.hooks(fwd_hooks=[...])`; see `glp_lens.hooks.project`.

        The default noise depends on earlier calls and on the batch; passing `noise` makes it repeatable row by row.

        Args:
            hook: the hook point; by default the one this model was trained on. A multi-layer prior binds to its layer.
            model: the language model it is for. With it, weights and their processing are checked at once;
                without it, only the hook point and the width, when the hook runs.
            allow_mismatch: work on another hook point or language model than in training.
            positions, noise, mask, repair, direction, options: see `glp_lens.hooks.project`.

        Raises:
            InputError: no hook point is known, or another one, or another language model, and what
                `glp_lens.hooks.project` refuses.
        """
        return hooks.projection(
            self,
            hook,
            model=model,
            allow_mismatch=allow_mismatch,
            positions=positions,
            noise=noise,
            mask=mask,
            repair=repair,
            direction=direction,
            **options,
        )


class Sampler(Capability, ABC):
    """Draws activations."""

    @abstractmethod
    def sample(self, n: int, *, noise: Acts | None = None, generator: Generator | None = None) -> Acts:
        """`n` rows drawn from the model."""


class Scorer(Capability, ABC):
    """Says how typical an activation is."""

    scores_density: ClassVar[bool] = False
    """Whether `score` is, by default, a log-density in nats and activation units."""

    @abstractmethod
    def score(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> PerRow:
        """One number a row, higher for more typical rows: a log-density or a negative error."""


class VelocityField(Capability, ABC):
    """A flow between data (sigma = 0) and noise (sigma = 1), in normalised space."""

    d_in: int

    @abstractmethod
    def normalize(self, x: Acts) -> Acts:
        """Each dimension to mean 0 and variance 1, by the training data's statistics."""

    @abstractmethod
    def denormalize(self, z: Acts) -> Acts:
        """Back to activation units."""

    @abstractmethod
    def velocity(self, z: Acts, sigma: float | Tensor) -> Acts:
        """The expected `eps - x` given `z = (1 - sigma) x + sigma eps`; `sigma` is a number or `(n,)`."""
