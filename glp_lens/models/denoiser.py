"""The denoiser network of the released GLPs: residual SwiGLU blocks whose gate is modulated by the noise level.

The names of its parameters are those of the released checkpoints, after their `model.` prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from glp_lens.errors import InputError
from glp_lens.types import Acts, Json

_MAX_PERIOD = 10_000.0


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a denoiser.

    Attributes:
        d_input: width of the activations.
        d_model: width of the network's own residual stream; twice `d_input` in the paper.
        d_mlp: hidden width of each block, the number of meta-neurons in it; four times `d_input` in the paper.
        n_layers: number of blocks.
        multi_layer_n_layers: number of layers of the language model, for a prior conditioned on the layer.
    """

    d_input: int
    d_model: int
    d_mlp: int
    n_layers: int
    multi_layer_n_layers: int | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be built."""
        for name, value in asdict(self).items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"denoiser: {name} must be a positive integer, got {value!r}")

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
class Condition:
    """Embeddings of the distinct noise levels (and layers) of a batch.

    Attributes:
        embedding: `(m, d_model)`, one for each distinct level.
        index: `(n,)`, which of them each row has; None if there is one for all rows, or one for each.
    """

    embedding: Tensor
    index: Tensor | None

    def spread(self, projected: Tensor) -> Tensor:
        """Something computed of each embedding, `(m, k)`, as one for each row (or one for all)."""
        return projected if self.index is None else projected[self.index]


class Block(nn.Module):
    """`x + down(silu(gate(LN x) * time(e)) * up(LN x))`."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(d_model)
        self.up_proj = nn.Linear(d_model, d_mlp)
        self.gate_proj = nn.Linear(d_model, d_mlp)
        self.time_proj = nn.Linear(d_model, d_mlp)
        self.down_proj = nn.Linear(d_mlp, d_model)

    def meta_neurons(self, h: Tensor, condition: Condition) -> Tensor:
        """The hidden units `(n, d_mlp)`, input of `down_proj`."""
        x = self.ln(h)
        return silu(self.gate_proj(x) * condition.spread(self.time_proj(condition.embedding))) * self.up_proj(x)


class Denoiser(nn.Module):
    """Predicts the velocity `eps - x` of normalised activations from their noisy version (paper, section 3)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.in_proj = nn.Linear(config.d_input, d)
        self.layers = nn.ModuleList(Block(d, config.d_mlp) for _ in range(config.n_layers))
        self.ln = nn.LayerNorm(d)
        self.out_proj = nn.Linear(d, config.d_input)
        self.time_embed = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        if config.multi_layer_n_layers is not None:
            self.layer_embed = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))

    def condition(self, sigma: float | Tensor, layer: int | Tensor | None, device: torch.device) -> Condition:
        """Embeddings of noise level and layer.

        The time path is over a quarter of a denoiser's multiplications. It is computed once for each distinct
        noise level of a batch, so once where all rows share one.

        Raises:
            InputError: a layer for a prior of one layer, none for a prior of many, or one out of range.
        """
        config = self.config
        timestep = torch.as_tensor(sigma, dtype=torch.float32).to(device).reshape(-1) * 1000
        index = None
        if len(timestep) > 1 and not isinstance(layer, Tensor):
            timestep, index = timestep.unique(return_inverse=True)
        embedding = self.time_embed(sinusoidal(timestep, config.d_model))
        depth = config.multi_layer_n_layers
        if depth is None:
            if layer is not None:
                raise InputError("this prior was trained on one layer: leave layer out")
            return Condition(embedding, index)
        if layer is None:
            raise InputError(f"this prior is conditioned on the layer: pass layer=0..{depth - 1}")
        layers = torch.as_tensor(layer).to(device).reshape(-1)
        if bool(((layers < 0) | (layers >= depth)).any()):
            raise InputError(f"layer must be in 0..{depth - 1}, got {layer}")
        embedding = embedding + self.layer_embed(sinusoidal(layers / max(depth - 1, 1), config.d_model))
        return Condition(embedding, index)

    def forward(self, z: Acts, sigma: float | Tensor, layer: int | Tensor | None = None) -> Acts:
        """Velocity at normalised rows `z` `(n, d_input)`; `sigma` and `layer` are shared or `(n,)`."""
        condition = self.condition(sigma, layer, z.device)
        h = self.in_proj(z)
        for block in self._blocks():
            h = h + block.down_proj(block.meta_neurons(h, condition))
        return self.out_proj(self.ln(h))

    def meta_neurons(self, z: Acts, sigma: float | Tensor, layer: int | Tensor | None = None) -> Tensor:
        """Hidden units of every block, `(n, n_layers * d_mlp)`, layer-major."""
        condition = self.condition(sigma, layer, z.device)
        h = self.in_proj(z)
        found = []
        for block in self._blocks():
            hidden = block.meta_neurons(h, condition)
            found.append(hidden)
            h = h + block.down_proj(hidden)
        return torch.cat(found, dim=1)

    def _blocks(self) -> Iterator[Block]:
        return cast("Iterator[Block]", iter(self.layers))

    def flops_per_row(self, rows_per_sigma: int = 1) -> float:
        """Floating-point operations of one forward pass for one row, 2 a multiplication.

        Args:
            rows_per_sigma: rows that share a noise level, among which the time path is divided.
        """
        matrices = {name: p.numel() for name, p in self.named_parameters() if p.ndim == 2}
        time_path = sum(size for name, size in matrices.items() if "time_" in name or "layer_embed" in name)
        return 2.0 * (sum(matrices.values()) - time_path + time_path / rows_per_sigma)
