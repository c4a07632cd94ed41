"""The denoiser network of the released GLPs: residual SwiGLU blocks whose gate is modulated by the noise level.

The names of its parameters are those of the released checkpoints, after their `model.` prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu
from torch.utils.checkpoint import checkpoint

from glp_lens.errors import InputError, pass_shortage
from glp_lens.limits import LAYERS, PARAMETERS, check_limit
from glp_lens.training.mixed_precision import Linear
from glp_lens.types import Acts, Json

_MAX_PERIOD = 10_000.0
_norm = partial(nn.LayerNorm, dtype=torch.float32)


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a denoiser.

    Attributes:
        d_input: width of the activations.
        d_model: width of the network's own residual stream; twice `d_input` in the paper.
        d_mlp: hidden width of each block, the number of meta-neurons in it; four times `d_input` in the paper.
        n_layers: number of blocks.
        multi_layer_n_layers: number of layers of the language model, for a prior conditioned on the layer.
        d_condition: width of a vector that the prior is conditioned on, a class or concept embedding; not in the
            released models.
    """

    d_input: int
    d_model: int
    d_mlp: int
    n_layers: int
    multi_layer_n_layers: int | None = None
    d_condition: int | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built, or are beyond the bounds in docs/limits.md."""
        for name, value in asdict(self).items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"denoiser: {name} must be a positive integer, got {value!r}")
        check_limit(LAYERS, self.n_layers, "a denoiser's number of blocks is")
        check_limit(LAYERS, self.multi_layer_n_layers or 1, "the number of layers that a denoiser is conditioned on is")
        check_limit(PARAMETERS, self.n_parameters, "a denoiser's number of parameters is")

    @property
    def n_parameters(self) -> int:
        """Number of parameters of a denoiser of this shape."""
        d, wide = self.d_model, self.d_mlp
        block = 2 * d + 3 * (d + 1) * wide + (wide + 1) * d
        embeddings = [d, *([] if self.multi_layer_n_layers is None else [d]), *filter(None, [self.d_condition])]
        ends = (self.d_input + 1) * d + 2 * d + (d + 1) * self.d_input
        return ends + self.n_layers * block + sum((width + 1) * d + (d + 1) * d for width in embeddings)

    @property
    def floor(self) -> float:
        """What a denoiser narrower than the activations loses at noise level 1, at least, by its width alone.

        There the velocity holds all of the noise, of variance 1 in each dimension, and the output projection gives at
        most `d_model` dimensions of it.
        """
        return max(0.0, 1 - self.d_model / self.d_input)

    @property
    def warning(self) -> str | None:
        """What to say of it before it is trained."""
        if not self.floor:
            return None
        return (
            f"a denoiser of width {self.d_model} cannot give back noise in all {self.d_input} dimensions of the "
            f"activations: near noise level 1 its loss stays {self.floor:.2f} above what a wider one can reach"
        )

    def to_json(self) -> Json:
        """As a JSON object."""
        return asdict(self)


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding `(n, width)`: cosines first, then sines, a zero column if the width is odd."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) * exponents)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2))


@dataclass(frozen=True)
class Term:
    """A summand of the embedding that modulates the gates: of noise level, layer or condition.

    Attributes:
        embedding: `(m, d_model)`, one for each distinct value in the batch.
        index: `(n,)`, which of them each row has; None if there is one for all rows, or one for each.
    """

    embedding: Tensor
    index: Tensor | None = None

    def spread(self, projected: Tensor) -> Tensor:
        """Values computed from the embeddings, `(m, k)`, as one for each row (or one for all)."""
        return projected if self.index is None else embedding(self.index, projected)


class Block(nn.Module):
    """`x + down(silu(gate(LN x) * time(e)) * up(LN x))`."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.ln = _norm(d_model)
        self.up_proj = Linear(d_model, d_mlp)
        self.gate_proj = Linear(d_model, d_mlp)
        self.time_proj = Linear(d_model, d_mlp)
        self.down_proj = Linear(d_mlp, d_model)

    def modulation(self, terms: Sequence[Term]) -> Tensor:
        """`time(e)` of each row, `(n, d_mlp)`, or `(1, d_mlp)` for all: linear, so each term is projected by itself."""
        first, *others = terms
        total = first.spread(self.time_proj(first.embedding))
        for term in others:
            total = total + term.spread(self.time_proj.without_bias(term.embedding))
        return total

    def meta_neurons(self, h: Tensor, modulation: Tensor) -> Tensor:
        """The hidden units `(n, d_mlp)`, input of `down_proj`, in the number format of the matrices."""
        x = self.ln(h).to(self.up_proj.weight.dtype)
        gate: Tensor = self.gate_proj(x)
        if torch.is_grad_enabled():
            hidden: Tensor = silu(gate * modulation) * self.up_proj(x)
            return hidden
        return silu(gate.mul_(modulation), inplace=True).mul_(self.up_proj(x))  # no memory for what is not kept

    def in_format(self, dtype: torch.dtype) -> Block:
        """The block with its three large matrices in another number format; normalisation and time path are shared."""
        shared = (self.ln, self.time_proj)
        block = deepcopy(self, {id(module): module for module in shared})
        for matrix in (block.up_proj, block.gate_proj, block.down_proj):
            matrix.to(dtype)
        return block

    def forward(self, h: Tensor, terms: Sequence[Term]) -> Tensor:
        """The residual stream `(n, d_model)` after this block."""
        change: Tensor = self.down_proj(self.meta_neurons(h, self.modulation(terms)))
        return h + change


class Denoiser(nn.Module):
    """Predicts the velocity `eps - x` of normalised activations from their noisy version (paper, section 3).

    Attributes:
        recompute: compute the activations inside the blocks again in the backward pass rather than keep them
            (activation checkpointing): a third more time, a fraction of the memory.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self._formats: dict[torch.dtype, tuple[object, list[Block]]] = {}
        d = config.d_model
        self.in_proj = Linear(config.d_input, d)
        self.layers = nn.ModuleList(Block(d, config.d_mlp) for _ in range(config.n_layers))
        self.ln = _norm(d)
        self.out_proj = Linear(d, config.d_input)
        self.time_embed = _embed(d, d)
        if config.multi_layer_n_layers is not None:
            self.layer_embed = _embed(d, d)
        if config.d_condition is not None:
            self.condition_embed = _embed(config.d_condition, d)

    @classmethod
    def filled(cls, config: Json, tensors: dict[str, Tensor], where: str = "checkpoint") -> Self:
        """A denoiser with weights that are named as in the released checkpoints.

        Args:
            where: what a message calls them.

        Raises:
            InputError: weights that do not fit the config.
        """
        try:
            # On no device: nothing is drawn from a global generator, and a wrong shape takes no memory.
            with torch.device("meta"):
                denoiser = cls(DenoiserConfig(**config))
            # Copies, since a file's tensors may lie where products of matrices round otherwise.
            weights = {name.removeprefix("model."): t.to(torch.float32, copy=True) for name, t in tensors.items()}
            denoiser.load_state_dict(weights, assign=True)
        except (RuntimeError, TypeError, OverflowError) as error:
            pass_shortage(error)
            line = " ".join(str(error).split())[:300]
            raise InputError(f"{where}: weights do not fit the config ({line})") from None
        return denoiser

    def forward(
        self,
        z: Acts,
        sigma: float | Tensor,
        layer: int | Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Acts:
        """Velocity at normalised rows `z` `(n, d_input)`.

        Args:
            sigma: noise level, one for all rows or `(n,)`.
            layer: of the language model, likewise; for priors conditioned on it.
            condition: `(d_condition,)` or `(n, d_condition)`, for priors that take one; NaN, or None, for none.

        Raises:
            InputError: what the prior is not conditioned on, no layer where it is, or a layer out of range.
        """
        terms = self.terms(sigma, layer, condition, z.device)
        h = self.in_proj(z)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(block, h, terms, use_reentrant=False)
            else:
                h = block(h, terms)
        return self._output(h)

    def along(
        self,
        levels: Sequence[float],
        layer: int | Tensor | None,
        condition: Tensor | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> Callable[[Tensor, float], Tensor]:
        """`velocity(z, sigma)` for the noise levels of a grid, whose modulation is computed here once for all rows.

        The weights that compute it are over a quarter of a denoiser's, and would otherwise be read at every step.

        Args:
            dtype: number format of the products in the blocks, by default that of the weights; the stream between the
                blocks is in the weights' format in any case.
        """
        order = {level: i for i, level in enumerate(levels)}
        time, *others = self.terms(
            torch.tensor(list(order), dtype=torch.float32), layer, condition, device, distinct=False
        )
        blocks = self.blocks if dtype is None else self._blocks_in(dtype)
        grids = [block.modulation([time]) for block in blocks]
        rows = [sum(t.spread(b.time_proj.without_bias(t.embedding)) for t in others) for b in blocks]

        def velocity(z: Tensor, sigma: float) -> Tensor:
            at = order[sigma]
            h = self.in_proj(z)
            for block, grid, row in zip(blocks, grids, rows, strict=True):
                h = h + block.down_proj(block.meta_neurons(h, (grid[at] + row).to(block.up_proj.weight.dtype)))
            return self._output(h)

        return velocity

    def meta_neurons(
        self,
        z: Acts,
        sigma: float | Tensor,
        layer: int | Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """Hidden units of every block, `(n, n_layers * d_mlp)`, layer-major."""
        terms = self.terms(sigma, layer, condition, z.device)
        h = self.in_proj(z)
        hidden: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i:
                h = h + self.blocks[i - 1].down_proj(hidden[-1])  # of the last block it would be for nothing
            hidden.append(block.meta_neurons(h, block.modulation(terms)))
        return torch.cat(hidden, dim=1)

    def terms(
        self,
        sigma: float | Tensor,
        layer: int | Tensor | None,
        condition: Tensor | None,
        device: torch.device,
        *,
        distinct: bool = True,
    ) -> list[Term]:
        """Embeddings of noise level, layer and condition, to be added.

        Each is computed once for each of its values in the batch: of noise levels if `distinct`, of layers always.

        Raises:
            InputError: as `forward`.
        """
        width = self.config.d_model
        timestep = torch.as_tensor(sigma, dtype=torch.float32).to(device).reshape(-1) * 1000
        index = None
        if distinct and len(timestep) > 1:
            timestep, index = timestep.unique(return_inverse=True)
        terms = [Term(self.time_embed(sinusoidal(timestep, width)), index)]
        if (layers := self._layers(layer, device)) is not None:
            depth = self.config.multi_layer_n_layers or 1
            index = None
            if len(layers) > depth:
                layers, index = torch.arange(depth, device=device), layers
            terms.append(Term(self.layer_embed(sinusoidal(layers.float() / max(depth - 1, 1), width)), index))
        if (vectors := self._vectors(condition, device)) is not None:
            given = ~vectors.isnan().any(1, keepdim=True)
            terms.append(Term(self.condition_embed(vectors.nan_to_num()) * given))
        return terms

    def _output(self, h: Tensor) -> Acts:
        """Velocity of the residual stream after the last block."""
        velocity: Tensor = self.out_proj(self.ln(h))
        return velocity

    def _layers(self, layer: int | Tensor | None, device: torch.device) -> Tensor | None:
        depth = self.config.multi_layer_n_layers
        if depth is None:
            if layer is not None:
                raise InputError("this prior was trained on one layer: leave layer out")
            return None
        if layer is None:
            raise InputError(f"this prior is conditioned on the layer: pass layer=0..{depth - 1}")
        layers = torch.as_tensor(layer).to(device).reshape(-1).long()
        if len(strange := layers[(layers < 0) | (layers >= depth)]):
            raise InputError(f"layer must be in 0..{depth - 1}, got {int(strange[0])}")
        return layers

    def _vectors(self, condition: Tensor | None, device: torch.device) -> Tensor | None:
        width = self.config.d_condition
        if condition is None:
            return None
        if width is None:
            raise InputError("this prior was trained without a condition: leave condition out")
        if condition.ndim not in (1, 2) or condition.shape[-1] != width:
            raise InputError(f"expected a condition of shape ({width},) or (n, {width}), got {tuple(condition.shape)}")
        return condition.to(device).float().reshape(-1, width)

    def _blocks_in(self, dtype: torch.dtype) -> list[Block]:
        """The blocks with their matrices in a number format, made anew when the weights have changed."""
        weights = [p for block in self.blocks for p in block.parameters()]
        if all(p.dtype == dtype for p in weights):
            return self.blocks
        seen = None if any(p.is_inference() for p in weights) else [(p.data_ptr(), p._version) for p in weights]
        known, blocks = self._formats.get(dtype, (None, []))
        if seen is None or seen != known:
            blocks = [block.in_format(dtype) for block in self.blocks]
            self._formats[dtype] = (seen, blocks)
        return blocks

    @property
    def blocks(self) -> list[Block]:
        """The blocks, first to last."""
        return cast("list[Block]", list(self.layers))

    def flops_per_row(self, rows_per_sigma: float = 1) -> float:
        """Floating-point operations of one forward pass for one row, 2 a multiplication.

        Args:
            rows_per_sigma: rows that share a noise level, and the cost of its modulation.
        """
        matrices = {name: p.numel() for name, p in self.named_parameters() if p.ndim == 2}
        time_path = sum(size for name, size in matrices.items() if "time_" in name or "layer_embed" in name)
        return 2.0 * (sum(matrices.values()) - time_path + time_path / rows_per_sigma)


def _embed(d_in: int, d_model: int) -> nn.Sequential:
    return nn.Sequential(Linear(d_in, d_model), nn.SiLU(), Linear(d_model, d_model))
