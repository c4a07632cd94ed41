"""What is specific to the meta-neurons of a prior: what they write, by noise level, and how steady they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu
from tqdm.auto import tqdm

from glp_lens import numerics
from glp_lens.features.directions import FEWEST, NONE
from glp_lens.features.sample import Sample, blocks, noise
from glp_lens.flow.path import interpolate
from glp_lens.models.denoiser import Block
from glp_lens.models.glp import GLP

if TYPE_CHECKING:
    import pandas as pd

SIGMAS = (0.05, 0.1, 0.3, 0.6)
"""Noise levels at which meta-neurons are described, besides that of the features."""
_ROWS = 1024
"""Rows, and pairs of a unit and a row, that go through the denoiser at once."""
_STABILITY_ROWS = 4096
"""Rows of the sample of which stability is estimated."""


@dataclass
class _Level:
    """Sums over the top rows of each unit at one noise level.

    Attributes:
        n: `(n_features,)`, rows so far.
        value, ablation, length: sums of the unit's value, of the relative change of the velocity without the unit, and
            of the lengths of the Jacobians.
        jacobian: `(n_features, d_in)`, sum of the Jacobians in activation units.
    """

    n: Tensor
    value: Tensor
    ablation: Tensor
    length: Tensor
    jacobian: Tensor

    @classmethod
    def empty(cls, n_features: int, d_in: int, device: torch.device) -> _Level:
        """Nothing summed yet."""
        n, value, ablation, length = torch.zeros(4, n_features, dtype=torch.float32, device=device)
        return cls(n, value, ablation, length, torch.zeros(n_features, d_in, dtype=torch.float32, device=device))

    def add(self, units: Tensor, value: Tensor, ablation: Tensor, jacobian: Tensor) -> None:
        """Add pairs of a unit and a row."""
        lengths = jacobian.norm(dim=1)
        for total, each in ((self.n, torch.ones_like(value)), (self.value, value), (self.ablation, ablation),
                            (self.length, lengths), (self.jacobian, jacobian)):  # fmt: skip
            total.index_add_(0, units, each)


@torch.no_grad()
@numerics.own()
def prior_effects(
    model: GLP, sample: Sample, top: Tensor, sigma: float, *, sigmas: Sequence[float] = SIGMAS, seed: int = 0
) -> tuple[pd.DataFrame, Tensor]:
    """The table `prior` of a GLP, and the direction that each unit writes at the noise level of its features.

    What a unit writes is the Jacobian of the denoised activation with respect to the unit: minus the derivative of the
    velocity times the standard deviations of the activations, through all later blocks of the denoiser. It is the mean
    over the eight top rows. The posterior mean changes by sigma times as much. The rows were chosen with noise of one
    seed and are noised with that of another, so that values are not large because the noise was.

    Args:
        model: a prior, bound to one layer.
        sample: rows of its hook point.
        top: rows in which each feature is largest; see `directions.top_rows`.
        sigma: noise level of the features.
        sigmas: other noise levels.
        seed: of the noise of the features.

    Returns:
        A row for each noise level and each unit with top rows, and the directions `(n_features, d_in)` in activation
        units for a change of the unit by 1, NaN without top rows.
    """
    import pandas as pd

    levels = [sigma, *sorted(set(sigmas) - {sigma})]
    pairs = _Pairs.of(top[:, :FEWEST])
    own: Tensor | None = None
    tables = []
    bar = tqdm(
        total=len(levels) * len(pairs.rows), desc="what units write", unit="pair", unit_scale=True, mininterval=2
    )
    with bar:
        for level in levels:
            sums = _Level.empty(model.n_features, model.d_in, model.device)
            for done in _measure(model, sample, pairs, level, seed + 1, sums):
                bar.update(done)
            jacobian = sums.jacobian / sums.n[:, None]  # NaN without rows
            own = jacobian if own is None else own
            columns = {
                "top_value": sums.value / sums.n,
                "stability": stability(model, sample, level, seed).to(sums.n.device),
                "ablation": sums.ablation / sums.n,
                "jacobian_norm": jacobian.norm(dim=1),
                "jacobian_agreement": sums.jacobian.norm(dim=1) / sums.length,
                "jacobian_cosine": torch.cosine_similarity(jacobian, own, dim=1),
            }
            table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
            table.insert(0, "feature", np.arange(model.n_features))
            table.insert(1, "sigma", level)
            tables.append(table[(sums.n > 0).cpu().numpy()])
    assert own is not None
    return pd.concat(tables).sort_values(["feature", "sigma"], ignore_index=True), own.cpu()


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a unit and one of its top rows, ordered by row, so that a row passes the denoiser once for all units."""

    units: Tensor
    rows: Tensor

    @classmethod
    def of(cls, top: Tensor) -> _Pairs:
        units, place = (top != NONE).nonzero(as_tuple=True)
        rows = top[units, place]
        order = rows.argsort(stable=True)
        return cls(units[order], rows[order])

    def chunks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Distinct rows, at most `_ROWS` at once, and of their pairs the units and the places among these rows."""
        distinct, owner = self.rows.unique_consecutive(return_inverse=True)
        for start in range(0, len(distinct), _ROWS):
            first, last = torch.searchsorted(owner, torch.tensor([start, start + _ROWS])).tolist()
            yield distinct[start : start + _ROWS], self.units[first:last], owner[first:last] - start


@dataclass(frozen=True)
class _Passed:
    """What one block of the denoiser computed for some rows: its stream before, the products of `hidden`, and after."""

    block: Block
    modulation: Tensor
    before: Tensor
    gate: Tensor
    up: Tensor
    after: Tensor

    @classmethod
    def of(cls, block: Block, modulation: Tensor, h: Tensor) -> _Passed:
        """Pass the stream `(n, d_model)` through a block."""
        x = block.ln(h)
        gate, up = block.gate_proj(x), block.up_proj(x)
        return cls(block, modulation, h, gate, up, h + block.down_proj(_units(gate, up, modulation)))

    def units(self, rows: Tensor, units: Tensor) -> Tensor:
        """Values of one unit for each of some rows."""
        return _units(self.gate[rows, units], self.up[rows, units], self.modulation[0, units])

    def forward(self, rows: Tensor, change: Tensor) -> Tensor:
        """The change of the stream after the block with that before it, each `(len(rows), d_model)`, to first order.

        Forward-mode differentiation of the parts that are not linear: of a product it would multiply three times.
        """
        block = self.block
        x: Tensor = torch.func.jvp(block.ln, (self.before[rows],), (change,))[1]
        products = (block.gate_proj.without_bias(x), block.up_proj.without_bias(x))
        units = partial(_units, modulation=self.modulation)
        hidden: Tensor = torch.func.jvp(units, (self.gate[rows], self.up[rows]), products)[1]
        return change + block.down_proj.without_bias(hidden)


def _units(gate: Tensor, up: Tensor, modulation: Tensor) -> Tensor:
    return silu(gate * modulation) * up


def _measure(model: GLP, sample: Sample, pairs: _Pairs, sigma: float, seed: int, sums: _Level) -> Iterator[int]:
    """Add all pairs at one noise level; yields the number of pairs done."""
    denoiser, std = model.denoiser, model.statistics(None, model.device)[1]
    width = denoiser.config.d_mlp
    terms = denoiser.terms(sigma, model.layer, None, model.device)
    modulations = [block.modulation(terms) for block in denoiser.blocks]
    for rows, units, place in pairs.chunks():
        index = rows.numpy()
        eps = noise(sample.keys[index], sample.positions[index], model.d_in, seed).to(model.device)
        h = denoiser.in_proj(interpolate(model.normalize(sample.rows[rows].to(model.device)), eps, sigma))
        passed: list[_Passed] = []
        for block, modulation in zip(denoiser.blocks, modulations, strict=True):
            passed.append(_Passed.of(block, modulation, h))
            h = passed[-1].after
        velocity = denoiser.out_proj(denoiser.ln(h))
        size = velocity.norm(dim=1)
        for b, own in enumerate(passed):
            for part in (units // width == b).nonzero()[:, 0].split(_ROWS):
                unit, at = units[part].to(model.device), place[part].to(model.device)
                within = unit - b * width
                change = own.block.down_proj.weight.T[within]
                value = own.units(at, within)
                without = own.after[at] - value[:, None] * change
                for later in passed[b + 1 :]:
                    change = later.forward(at, change)
                    hidden = later.block.meta_neurons(without, later.modulation)
                    without = without + later.block.down_proj(hidden)
                change = denoiser.out_proj.without_bias(torch.func.jvp(denoiser.ln, (h[at],), (change,))[1])
                without = denoiser.out_proj(denoiser.ln(without))
                sums.add(unit, value, (velocity[at] - without).norm(dim=1) / size[at], -change * std)
        yield len(units)


def stability(model: GLP, sample: Sample, sigma: float, seed: int = 0) -> Tensor:
    """Share of each unit's variance that is the row's and not the noise's, `(n_features,)` float32; NaN if constant.

    The intraclass correlation ICC(1) of one-way random effects (Shrout and Fleiss 1979) of two noise seeds, over at
    most 4,096 rows of the sample: 1 for a unit that does not depend on the noise, about 0 for one that depends on
    nothing else. It can be slightly negative.

    Args:
        model: a prior, bound to one layer.
        sample: rows of its hook point.
        sigma: noise level.
        seed: of the choice of rows, and with the next one of the noise.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(sample))[:_STABILITY_ROWS])
    rows = sample.rows[torch.from_numpy(chosen)]
    part = Sample(rows, sample.keys[chosen], sample.positions[chosen], sample.token_ids[chosen])
    n = len(part)
    total, squares, within = (torch.zeros(model.n_features, dtype=torch.float64) for _ in range(3))
    options = {"sigma": sigma}
    for (_, a), (_, b) in zip(blocks(model, options, part, seed), blocks(model, options, part, seed + 1), strict=True):
        mean = (a.double() + b) / 2
        total += mean.sum(0)
        squares += mean.square().sum(0)
        within += (a.double() - b).square().sum(0) / 2
    between = 2 * (squares - total.square() / n) / max(n - 1, 1)
    within /= n
    return ((between - within) / (between + within)).float()
