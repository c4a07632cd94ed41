"""Which features of each model are further above their usual value on one text, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from glp_lens import lm
from glp_lens.artifacts import ActivationModel
from glp_lens.corpus import Document
from glp_lens.errors import InputError
from glp_lens.features.folder import FeatureFolder, name_of
from glp_lens.features.sample import Sample, blocks, options_of

COLUMNS = ("model", "feature", "name", "position", "token", "value", "usual", "z", "density", "label")


@dataclass(frozen=True, eq=False)
class Reading:
    """One text as the language model reads it, without BOS.

    Attributes:
        tokens: the text of each token.
        at: its activations by hook point, with their places; a massive one is in none.
        cut: number of tokens beyond the context.
    """

    tokens: list[str]
    at: dict[str, Sample]
    cut: int


def read(
    model: lm.Model, text: str, hooks: Sequence[str], context: int, limits: Mapping[str, float] | None = None
) -> Reading:
    """Run a text through the language model.

    Args:
        model: the language model.
        text: at most `context - 1` tokens of it are read.
        hooks: where activations are read.
        context: longest sequence, BOS included.
        limits: norm by hook point above which an activation is massive.

    Raises:
        InputError: a text without a token, or a hook point that never runs.
    """
    [ids] = lm.to_ids(model, [text], 2**40)
    row = ids[:context]
    if len(row) < 2:
        raise InputError("the text has no token: pass one that is not empty")
    tokens, mask = lm.pad([row])
    rows = lm.activations(model, tokens, mask, list(dict.fromkeys(hooks)))
    tokenizer = lm.tokenizer_of(model)
    key = Document.of(text).id
    at = {}
    for hook, found in rows.items():
        inner, limit = found[0, 1:].float().cpu(), (limits or {}).get(hook)
        kept = np.arange(len(inner)) if limit is None else np.flatnonzero((inner.norm(dim=1) <= limit).numpy())
        at[hook] = Sample(
            inner[torch.from_numpy(kept)], np.full(len(kept), key, np.uint64), kept + 1, np.array(row)[kept + 1]
        )
    return Reading([str(tokenizer.decode([token])) for token in row[1:]], at, len(ids) - len(row))


def top(folder: FeatureFolder, trained: Mapping[str, ActivationModel], reading: Reading, *, k: int = 5) -> pd.DataFrame:
    """The `k` features of each model that are furthest above their mean at each token, in their standard deviations.

    Mean and standard deviation are those over the texts of the folder. A feature that takes both signs counts by its
    distance, whether above or below. Constant features are left out. A model's noise at a token is that with which the
    same text was read when the features were built.

    Args:
        folder: of the features.
        trained: its models by label, at their hook points.
        reading: the text.
        k: features at each token.

    Returns:
        Rows by model, position and distance: `model`, `feature`, `name`, `position` (BOS 0), `token`, `value`, `usual`
        (the mean), `z` (standard deviations from it), `density`, and the automatic `label`, empty without one.

    Raises:
        InputError: features that are not in the folder.
    """
    found = []
    for label, model in trained.items():
        about = folder.model(label)
        known = folder.table(label, "features").sort_values("feature")
        mean, std = (torch.from_numpy(known[name].to_numpy(np.float64, copy=True)) for name in ("mean", "std"))
        labels = _labels(folder, label)
        sample, seed = reading.at[about.hook], int(folder.about.settings.get("seed", 0))
        for part, values in blocks(model, options_of(about), sample, seed):
            z = (values.double() - mean) / std
            z[:, ~(std > 0)] = 0
            for i, features in enumerate(_furthest(z, about.signed, k)):
                position = int(sample.positions[part][i])
                token = reading.tokens[position - 1]
                found += [
                    (label, f, name_of(about, f), position, token, float(values[i, f]), float(mean[f]), float(z[i, f]),
                     float(known["density"].iloc[f]), labels.get(f, ""))
                    for f in features
                ]  # fmt: skip
    return pd.DataFrame(found, columns=list(COLUMNS))


def over_text(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    """The `k` features of each model that are furthest from their mean at some token, each where it is furthest.

    Args:
        frame: of `top`, with as many features at each token at least.
        k: features of each model.
    """
    ranked = frame.iloc[np.argsort(-frame["z"].abs().to_numpy(), kind="stable")]
    once = ranked.drop_duplicates(["model", "feature"]).groupby("model", sort=False).head(k)
    order = {label: i for i, label in enumerate(dict.fromkeys(frame["model"]))}
    return once.sort_values("model", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def _furthest(z: Tensor, signed: bool, k: int) -> Iterator[list[int]]:
    """Of each row the features that are furthest above 0, or from it, those above 0 only."""
    distance = z.abs() if signed else z
    values, indices = distance.topk(min(k, distance.shape[1]), dim=1)
    for row, own in zip(indices.tolist(), (values > 0).tolist(), strict=True):
        yield [index for index, above in zip(row, own, strict=True) if above]


def _labels(folder: FeatureFolder, label: str) -> dict[int, str]:
    if not folder.has(label, "labels"):
        return {}
    table = folder.table(label, "labels")
    return dict(zip(table["feature"].tolist(), table["label"].tolist(), strict=True))
