"""Passages of texts, and how high features rise in each: what predictions about features are tested on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import lm
from glp_lens.activations import forward
from glp_lens.artifacts import ActivationModel
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.features.folder import FeatureFolder, ModelAbout
from glp_lens.features.sample import Sample, blocks, options_of
from glp_lens.interface import Featurizer

Values = NDArray[np.float32]
Flags = NDArray[np.bool_]
Ints = NDArray[np.int64]
ACTIVE = ("tenth", "on")
"""What counts as active: the tenth of passages where a feature rises highest, if it does; or those where it is on."""
_BATCH_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Watched:
    """Some features of a model.

    Attributes:
        about: the model in the folder of features.
        model: the model itself, at its hook point.
        features: `(n,)`, which of them, rising and different.
        sign: `(n,)`, 1 for a feature that is read as it is, -1 for one whose low end is read.
        on: `(n,)`, the value, times the sign, above which each is on.
    """

    about: ModelAbout
    model: ActivationModel
    features: Ints
    sign: Values
    on: Values

    @classmethod
    def of(cls, folder: FeatureFolder, label: str, model: ActivationModel, features: Ints) -> Watched:
        """Features of a model of a folder, each by the end that reaches further from 0."""
        about, known = folder.model(label), folder.table(label, "features").set_index("feature").loc[features]
        low, high = (known[name].to_numpy(np.float32) for name in ("min", "max"))
        on = np.where(low < 0, np.maximum(high, -low) / 10, 0).astype(np.float32)
        return cls(about, model, features, end(known), on)


@dataclass(frozen=True, eq=False)
class Passages:
    """Passages, text by text.

    Attributes:
        document: `(n,)`, number of the text, from 0.
        token_ids: the tokens of each passage.
        peaks: `(seeds, n, n_watched)` of each model by its label: the largest value, times the sign, of each feature in
            each passage, for each noise seed; of a model without noise, for one. -inf where no token could be read.
    """

    document: Ints
    token_ids: list[Ints]
    peaks: Mapping[str, Values]

    def __len__(self) -> int:
        return len(self.document)


def read(
    model: lm.Model,
    documents: Sequence[Document],
    watched: Mapping[str, Watched],
    *,
    context: int,
    length: int,
    seeds: Sequence[int],
) -> Passages:
    """Read texts, cut into passages of equal length; what is left at the end of a text is no passage.

    Massive activations, beyond the norm that a model was trained up to, are left out. Memory grows with the passages
    times the features watched.

    Args:
        model: the language model.
        documents: the texts.
        watched: the features, by the label of their model.
        context: most tokens of a text, BOS included.
        length: tokens of a passage.
        seeds: of the noise of models that take any.

    Raises:
        InputError: no text has `length` tokens, or a hook point never runs.
    """
    ids = lm.to_ids(model, [document.text for document in documents], context)
    counts = np.array([(len(row) - 1) // length for row in ids], dtype=np.int64)
    first = np.cumsum(counts) - counts
    kept = [i for i, count in enumerate(counts) if count]
    if not kept:
        raise InputError(f"no text has {length} tokens: pass longer ones, or more")
    used = {label: seeds if _stochastic(each) else seeds[:1] for label, each in watched.items()}
    peaks = {
        label: np.full((len(used[label]), int(counts.sum()), len(each.features)), -np.inf, dtype=np.float32)
        for label, each in watched.items()
    }
    hooks = list(dict.fromkeys(each.about.hook for each in watched.values()))
    cut = [ids[i][: 1 + counts[i] * length] for i in kept]
    keys = np.array([documents[i].id for i in kept], dtype=np.uint64)
    with tqdm(total=sum(map(len, cut)), desc="read texts", unit="tok", unit_scale=True, mininterval=2) as bar:
        for batch in forward.read(model, cut, hooks, _BATCH_TOKENS):
            inner = batch.mask.clone()
            inner[:, 0] = False
            text, position = (each.numpy() for each in inner.nonzero(as_tuple=True))
            owner = np.asarray(batch.texts)[text]
            passage = first[np.asarray(kept)[owner]] + (position - 1) // length
            tokens = batch.ids[inner].numpy()
            for hook in hooks:
                rows = batch.rows[hook][inner.to(batch.rows[hook].device)].float().cpu()
                sample = Sample(rows, keys[owner], position, tokens)
                for label, each in watched.items():
                    if each.about.hook == hook:
                        for seed, out in zip(used[label], peaks[label], strict=True):
                            _raise_to(out, each, sample, passage, seed)
            bar.update(int(batch.mask.sum()))
    windows = [np.asarray(row[1:]).reshape(-1, length) for row in cut]
    token_ids = [window for rows in windows for window in rows]
    return Passages(np.repeat(np.arange(len(documents)), counts), token_ids, peaks)


def end(known: pd.DataFrame) -> Values:
    """By which end features are read, from rows of the table `features`: -1 where the low one is further from 0."""
    return np.where(-known["min"] > known["max"], -1, 1).astype(np.float32)


def of_end(examples: pd.DataFrame, features: Ints, sign: Values) -> pd.DataFrame:
    """Of `top` and `bottom` examples those of the end by which each feature is read."""
    low = examples["feature"].isin(features[sign < 0])
    return examples[examples["group"] == np.where(low, "bottom", "top")]


def active(peaks: Values, on: Values, how: str) -> Flags:
    """Where features are active, from their peaks in passages `(n, n_features)` and values above which they are on."""
    if how == "on":
        return np.asarray(peaks > on)
    return np.asarray(peaks > np.quantile(peaks, 0.9, axis=0, method="higher"))


def _stochastic(watched: Watched) -> bool:
    assert isinstance(watched.model, Featurizer)
    return watched.model.stochastic


def _raise_to(out: Values, watched: Watched, sample: Sample, passage: Ints, seed: int) -> None:
    """Raise the peaks `(n_passages, n_watched)` to the values of rows in them, where these are higher."""
    limit = getattr(watched.model, "max_norm", None)
    usual = torch.ones(len(sample), dtype=torch.bool)
    if limit is not None:
        usual = sample.rows.norm(dim=1) <= limit
    sample = Sample(sample.rows[usual], *(each[usual.numpy()] for each in _columns(sample)))
    passage = passage[usual.numpy()]
    chosen, sign = torch.from_numpy(watched.features), torch.from_numpy(watched.sign)
    target = torch.from_numpy(out)
    for part, values in blocks(watched.model, options_of(watched.about), sample, seed):
        own: Tensor = values[:, chosen] * sign
        index = torch.from_numpy(passage[part])[:, None].expand_as(own)
        target.scatter_reduce_(0, index, own, "amax")


def _columns(sample: Sample) -> tuple[NDArray[np.uint64], Ints, Ints]:
    return sample.keys, sample.positions, sample.token_ids
