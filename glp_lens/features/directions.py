"""Directions of features in activation space: those that a model was given or learnt, and means of activations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from glp_lens import lm, numerics
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.features.folder import Way
from glp_lens.interface import Decoder, Featurizer
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.neurons import Neurons
from glp_lens.models.pca import PCA
from glp_lens.models.random_features import RandomFeatures
from glp_lens.models.sae import SAE
from glp_lens.types import Acts, Features

FEWEST = 8
"""Top rows that a feature has at least, if it is on in so many."""
NONE = -1
"""In place of a row where a feature has fewer top rows."""
_BLOCK = 512
"""Features that are decoded at once."""


@numerics.own()
def learned(model: ActivationModel, language_model: lm.Model | None) -> tuple[Way, Tensor] | None:
    """Directions `(n_features, d)` that a model consists of, in activation units; None for a model without any.

    By kind of model:

    - SAE, and any other linear decoder: its rows.
    - PCA and Gaussian: principal components, of standardised activations brought back to activation units.
    - random features: the change of the activations that lies along the weights in the standardised space, in which
      the features read; they write nothing.
    - neurons: rows of the MLP's output matrix, in the residual stream; None without the language model.

    Raises:
        InputError: the language model has no such matrix at the neurons' hook point.
    """
    way: Way = "decoder"
    vectors: Tensor | None = None
    if isinstance(model, SAE):
        vectors = model.sae.W_dec.detach()  # one that standardises each row cannot decode latents alone
    elif isinstance(model, Decoder):
        way, vectors = "component" if isinstance(model, PCA) else "decoder", _rows(model)
    elif isinstance(model, Gaussian):
        axes = torch.eye(model.d_in, dtype=torch.float32) if model.eigenvectors is None else model.eigenvectors.T
        way, vectors = "component", axes.to(model.std.device) * model.std * model.eigenvalues.sqrt()[:, None]
    elif isinstance(model, RandomFeatures):
        way, vectors = "input weights", model.weights * model.std
    elif isinstance(model, Neurons) and language_model is not None:
        way, vectors = "output weights", _output_weights(language_model, model)
    return None if vectors is None else (way, vectors.float().cpu())


def _rows(model: Decoder) -> Tensor:
    """What each feature adds to the row that a decoder gives, `(n_features, d)`."""
    assert isinstance(model, Featurizer)
    n, rows = model.n_features, []
    for index in torch.arange(n).split(_BLOCK):
        one = torch.zeros(len(index), n, dtype=torch.float32)
        rows.append(model.decode(one.scatter(1, index[:, None], 1.0)) - model.decode(one[:1]))
    return torch.cat(rows)


def _output_weights(language_model: lm.Model, neurons: Neurons) -> Tensor:
    """`(d_mlp, d_model)` of the MLP whose neurons these are."""
    block = re.match(r"blocks\.(\d+)\.", neurons.hook or "")
    parts: Any = language_model
    weights: Tensor | None = getattr(parts.blocks[int(block[1])].mlp, "W_out", None) if block else None
    if weights is None or weights.shape != (neurons.n_features, language_model.cfg.d_model):
        raise InputError(
            f"the language model has no output weights of {neurons.n_features} neurons at {neurons.hook}: leave out "
            "--neurons"
        )
    return weights.detach().float()


def top_rows(blocks: Iterable[tuple[slice, Features]], n_rows: int, n_features: int, *, signed: bool) -> Tensor:
    """The rows of a sample in which each feature is largest, `(n_features, k)`, the largest first.

    k is one in a hundred rows, 8 at least. A feature that is never negative has only rows in which it is on, others are
    `NONE`; one that is constant has none.

    Args:
        blocks: of the features, and which rows they are of; see `sample.blocks`.
        n_rows: of the sample.
        n_features: number of features.
        signed: whether features take both signs.
    """
    k = min(max(FEWEST, -(-n_rows // 100)), n_rows)
    values, rows = torch.empty(n_features, 0, dtype=torch.float32), torch.empty(n_features, 0, dtype=torch.int64)
    low = torch.full((n_features,), torch.inf, dtype=torch.float32)
    high = -low
    for part, block in blocks:
        own = torch.arange(part.start, part.stop).expand(n_features, -1)
        both = torch.cat([values, block.T], dim=1)
        values, found = both.topk(min(k, both.shape[1]), dim=1)
        rows = torch.cat([rows, own], dim=1).gather(1, found)
        low, high = torch.minimum(low, block.amin(0)), torch.maximum(high, block.amax(0))
    kept = (low < high)[:, None] & (values > 0 if not signed else torch.ones_like(values, dtype=torch.bool))
    return rows.where(kept, torch.tensor(NONE))


def class_means(rows: Acts, top: Tensor) -> Tensor:
    """The mean of each feature's top rows less that of all rows, `(n_features, d)`; NaN without top rows.

    Args:
        rows: `(n, d)`.
        top: `(n_features, k)`; see `top_rows`.
    """
    counted = top != NONE
    share = counted.float() / counted.sum(1, keepdim=True)  # NaN without any
    means = embedding_bag(top.clamp(min=0), rows.float(), per_sample_weights=share, mode="sum")
    return means - rows.double().mean(0).float()
