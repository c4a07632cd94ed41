"""Which features are alike, within a model and across models: by direction, and by activation on a sample of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import numerics
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing import features
from glp_lens.features.directions import FEWEST
from glp_lens.features.folder import FeatureFolder, ModelAbout
from glp_lens.features.sample import Sample, noise, options_of

if TYPE_CHECKING:
    import pandas as pd

NEIGHBOURS = 5
"""Neighbours of a feature in each model."""
_BLOCK = 1024
"""Features of a model that are compared at once with as many others."""
_IN_MEMORY = 2**28
"""Bytes of a model's features of the sample above which they go to a file without a name in the folder."""


@dataclass(frozen=True)
class Vectors:
    """A vector for each feature of one model: `block(part)` gives `(width, len)` of length 1, or 0 for none."""

    n: int
    width: int
    block: Callable[[slice], Tensor]

    def parts(self) -> list[slice]:
        """Slices of bounded size of all features."""
        return [slice(i, min(i + _BLOCK, self.n)) for i in range(0, self.n, _BLOCK)]


class _Best:
    """The nearest so far of each feature: values and indices `(n, NEIGHBOURS)`, the value 0 for none."""

    def __init__(self, n: int) -> None:
        self.values = torch.zeros(n, NEIGHBOURS, dtype=torch.float32)
        self.others = torch.zeros(n, NEIGHBOURS, dtype=torch.int64)

    def update(self, part: slice, values: Tensor, others: slice) -> None:
        """Take in values `(len(part), len(others))`."""
        index = torch.arange(others.start, others.stop).expand(len(values), -1)
        both = torch.cat([self.values[part], values], dim=1)
        found = both.abs().topk(NEIGHBOURS, dim=1).indices
        self.values[part] = both.gather(1, found)
        self.others[part] = torch.cat([self.others[part], index], dim=1).gather(1, found)


@torch.no_grad()
@numerics.own()
def nearest(sets: Sequence[Vectors], *, say: str = "neighbours") -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """The features of each model that are nearest to each feature of each model, itself aside.

    Nearest are those with the largest absolute product of their vectors.

    Args:
        sets: of each model, all of one width.
        say: what the progress bar says.

    Returns:
        For each pair of models, by index, the others `(n, NEIGHBOURS)` and the products with them, which are 0 where
        there are fewer.
    """
    best = {(a, b): _Best(each.n) for a, each in enumerate(sets) for b in range(len(sets))}
    pairs = list(combinations_with_replacement(range(len(sets)), 2))
    total = sum(len(sets[a].parts()) * len(sets[b].parts()) for a, b in pairs)
    with tqdm(total=total, desc=say, unit="block", mininterval=2, delay=2) as bar:
        for a, b in pairs:
            for i in sets[a].parts():
                left = sets[a].block(i)
                for j in sets[b].parts():
                    bar.update()
                    if a == b and j.start < i.start:
                        continue  # the same products
                    products = left.T @ (left if (a, i) == (b, j) else sets[b].block(j))
                    if (a, i) == (b, j):
                        products.fill_diagonal_(0)
                    best[a, b].update(i, products, j)
                    if (a, i) != (b, j):
                        best[b, a].update(j, products.T, i)
    return {pair: (each.others, each.values) for pair, each in best.items()}


def neighbours(
    folder: FeatureFolder,
    models: Sequence[tuple[ModelAbout, ActivationModel]],
    samples: Mapping[str, Sample],
    *,
    seed: int = 0,
) -> None:
    """Write the table `neighbours` of each model: the five nearest features in each model, itself included.

    `direction` is the cosine of the directions that the models consist of, not of class means, among models whose
    directions have one width, that of the first; `activation` is the correlation over the rows of the sample. Both are
    ranked by absolute value. A feature that is never negative is compared by activation only if it is on in eight rows
    of the sample, as two that are on in one row have a correlation of 1.

    Args:
        folder: with the directions of all models.
        models: with what describes them.
        samples: by hook point, of the same tokens.
        seed: of the noise of the features.

    Raises:
        InputError: samples of other tokens.
    """
    import pandas as pd

    _check_aligned([samples[about.hook] for about, _ in models])
    activations = [_activations(folder, about, model, samples[about.hook], seed) for about, model in models]
    found = {"activation": nearest(activations, say="correlations")}
    del activations
    directions = [(i, own) for i, (about, _) in enumerate(models) if (own := _directions(folder, about)) is not None]
    alike = [(i, own) for i, own in directions if own.width == directions[0][1].width]
    cosines = nearest([own for _, own in alike], say="cosines")
    found["direction"] = {(alike[a][0], alike[b][0]): pair for (a, b), pair in cosines.items()}
    for i, (about, _) in enumerate(models):
        tables = [
            _table(by, other.label, *found[by][i, j])
            for by in ("direction", "activation")
            for j, (other, _) in enumerate(models)
            if (i, j) in found[by]
        ]
        frame = pd.concat(tables).sort_values("feature", kind="stable", ignore_index=True)
        folder.write_table(about, "neighbours", frame)


def _table(by: str, label: str, others: Tensor, values: Tensor) -> pd.DataFrame:
    """Rows of the table `neighbours`, in the order of features."""
    import pandas as pd

    feature = np.repeat(np.arange(len(values)), NEIGHBOURS)
    columns = {"other": others.reshape(-1).numpy(), "value": values.reshape(-1).numpy()}
    return pd.DataFrame({"feature": feature, "by": by, "model": label, **columns}).query("value != 0")


def _check_aligned(samples: Sequence[Sample]) -> None:
    first = samples[0]
    for each in samples:
        if not (np.array_equal(each.keys, first.keys) and np.array_equal(each.positions, first.positions)):
            raise InputError("the samples of the hook points are not of the same tokens: build the features again")


def _activations(
    folder: FeatureFolder, about: ModelAbout, model: ActivationModel, sample: Sample, seed: int
) -> Vectors:
    """Features of the sample, centred and scaled to length 1."""
    eps = noise(sample.keys, sample.positions, sample.rows.shape[1], seed) if about.kind == "glp" else None
    entry = Entry(about.label, model, options_of(about))
    matrix = features.encode(entry, sample.rows, eps, folder.path, in_memory=_IN_MEMORY)

    means, scales = torch.zeros(2, about.n_features, dtype=torch.float32)

    def block(part: slice) -> Tensor:
        centred: Tensor = torch.from_numpy(matrix[:, part]) - means[part]
        return centred.mul_(scales[part])

    vectors = Vectors(about.n_features, len(sample), block)
    for part in vectors.parts():
        values = torch.from_numpy(matrix[:, part])
        means[part] = values.double().mean(0).float()
        counted = values.amin(0) < values.amax(0)
        if not about.signed:
            counted &= (values > 0).sum(0) >= FEWEST
        scale = (1 / (values.double() - means[part]).norm(dim=0)).float()  # squares of tiny values are 0 in float32
        scales[part] = torch.where(counted & scale.isfinite(), scale, 0)
    return vectors


def _directions(folder: FeatureFolder, about: ModelAbout) -> Vectors | None:
    """Directions in the model's own way; None for a model that has only class means."""
    own = next((way for way in folder.ways(about) if way != "class mean"), None)
    if own is None:
        return None
    columns = folder.directions(about, own)[0].nan_to_num().T
    return Vectors(about.n_features, len(columns), lambda part: columns[:, part])
