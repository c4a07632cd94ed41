"""The language model's own MLP neurons as features: what it knows without any trained model."""

from __future__ import annotations

import re
from typing import ClassVar, Self

from torch import Generator, Tensor

from glp_lens import lm, provenance
from glp_lens.arguments import checked
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.interface import Featurizer
from glp_lens.models.row_checks import check_rows
from glp_lens.types import Acts, Features, Json


class Neurons(ActivationModel, Featurizer):
    """The hidden activations of one MLP, after the nonlinearity and any gate: what its output weights are given.

    Its `hook` is a hook point of its own, `blocks.N.mlp.hook_post`: its rows are activations collected there.
    """

    kind: ClassVar[str] = "neurons"

    def __init__(self, d_in: int) -> None:
        self.d_in = d_in
        self.provenance = {}

    @classmethod
    @checked
    def of(cls, model: lm.Model, hook: str, identity: Json | None = None) -> Self:
        """The neurons of a language model in the block of a hook point such as `blocks.14.hook_resid_post`.

        Args:
            model: the language model.
            hook: a hook point of the block.
            identity: `lm.identity(model)`, where the caller knows it already: making it reads all weights.

        Raises:
            InputError: the hook point is in no block, or the block has no MLP with a hook point for its neurons.
        """
        block = re.match(r"blocks\.\d+\.", hook)
        if not block:
            raise InputError(f"expected a hook point inside a block, such as blocks.3.hook_resid_post, got {hook!r}")
        point = lm.check_hook(model, f"{block.group()}mlp.hook_post")
        neurons = cls(int(model.cfg.d_mlp or 0))
        neurons.provenance = {"store": provenance.here(model, point, identity) | {"d_in": neurons.d_in}, "training": {}}
        return neurons

    @property
    def n_features(self) -> int:
        """Number of neurons."""
        return self.d_in

    def encode(self, x: Acts, *, noise: Acts | None = None, generator: Generator | None = None) -> Features:
        """A copy of the rows, `(n, d_in)`."""
        return check_rows(x, self.d_in).clone()

    def _config(self) -> Json:
        return {"d_in": self.d_in}

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    @classmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        if type(config["d_in"]) is not int or config["d_in"] < 1:
            raise ValueError(f"d_in is {config['d_in']!r}")
        return cls(config["d_in"])
