"""What a pass has collected, as the tables of a folder of features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from glp_lens.artifacts import ActivationModel
from glp_lens.features.accumulate import Histograms
from glp_lens.features.examples import ON, groups_of
from glp_lens.features.folder import TABLES, FeatureFolder, ModelAbout, folder_names
from glp_lens.features.passes import Measured, Tracked
from glp_lens.features.sample import Sample, blocks, sample_path
from glp_lens.interface import Featurizer

if TYPE_CHECKING:
    import pandas as pd

BINS = 40
"""Of histograms."""
DENSE = 0.1
"""A feature that is on in a larger share of tokens is dense."""
Decode = Callable[[int], str]
"""A token id to its text."""


def write(
    measured: Measured, folder: Path, *, names: dict[str, str], decode: Decode, seed: int
) -> tuple[ModelAbout, ...]:
    """Write the samples of rows, and each model's tables `features` and `examples`.

    Args:
        measured: what a pass has collected.
        folder: of features.
        names: what each model was opened from, by label.
        decode: a token's text.
        seed: of the pass.

    Returns:
        What features.json says of the models.
    """
    out = FeatureFolder(folder)
    samples: dict[str, Sample] = {}
    for hook in dict.fromkeys(each.hook for each in measured.tracked):
        samples[hook] = measured.rows.sample(hook)
        samples[hook].write(sample_path(folder, hook))
    abouts = []
    places = folder_names([each.entry.label for each in measured.tracked])
    texts = _Texts(decode)
    for each, place in zip(measured.tracked, places, strict=True):
        about = _about(each, place, names.get(each.entry.label, ""))
        out.write_table(about, "features", _features(each, about, samples[each.hook], seed))
        out.write_table(about, "examples", _examples(each, texts))
        abouts.append(about)
    return tuple(abouts)


def _about(each: Tracked, place: str, name: str) -> ModelAbout:
    model = each.entry.model
    assert isinstance(model, Featurizer)
    assert isinstance(model, ActivationModel)
    signed = bool(each.moments.signed.any())
    return ModelAbout(
        label=each.entry.label, folder=place, kind=model.kind, hook=each.hook, n_features=model.n_features,
        blocks=model.feature_layers, signed=signed, sigma=each.entry.options.get("sigma"), name=name,
        fingerprint=model.fingerprint(),
    )  # fmt: skip


def _features(each: Tracked, about: ModelAbout, sample: Sample, seed: int) -> pd.DataFrame:
    import pandas as pd

    moments = each.moments
    least = torch.where(moments.signed, ON * moments.largest, 0.0)
    histograms = Histograms(moments.low, moments.high, least, BINS)
    for _, block in blocks(each.entry.model, each.entry.options, sample, seed):
        histograms.update(block)
    mean, std, kurtosis = moments.summary()
    # Of a feature that takes both signs the largest size is known at the end only, so the sample tells how often it
    # is on; of others every token was counted.
    density = torch.where(moments.signed, histograms.on / histograms.rows, moments.positive / moments.count)
    dead = moments.low == moments.high
    density = density.masked_fill(dead, 0)
    index = np.arange(about.n_features)
    width = about.n_features // about.blocks
    columns: dict[str, Any] = {
        "feature": index, "block": index // width, "unit": index % width, "mean": mean.numpy(), "std": std.numpy(),
        "kurtosis": kurtosis.numpy(), "min": moments.low.double().numpy(), "max": moments.high.double().numpy(),
        "density": density.numpy(), "dead": dead.numpy(), "dense": (density > DENSE).numpy(),
        "histogram_low": moments.low.double().numpy(), "histogram_high": moments.high.double().numpy(),
        "histogram": list(histograms.counts.view(-1, BINS).numpy()),
    }  # fmt: skip
    return pd.DataFrame(columns)


def _examples(each: Tracked, texts: _Texts) -> pd.DataFrame:
    import pandas as pd

    parts = []
    for number, (group, passages, order) in enumerate(groups_of(each.highest, each.bands)):
        feature, rank = (order >= 0).nonzero(as_tuple=True)
        slot = order[feature, rank]
        ids, values = passages.token_ids[feature, slot].numpy(), passages.values[feature, slot].numpy()
        inside = ids >= 0
        columns: dict[str, Any] = {
            "feature": feature.numpy(), "group": group, "number": number, "rank": rank.numpy(),
            "key": passages.key[feature, slot].numpy().view(np.uint64),
            "position": passages.position[feature, slot].numpy(), "peak": inside[:, : passages.before].sum(1),
            "value": passages.value[feature, slot].double().numpy(),
            "token_ids": list(_trimmed(ids, inside)), "tokens": list(_trimmed(texts(ids), inside)),
            "values": list(_trimmed(values, inside)),
        }  # fmt: skip
        parts.append(pd.DataFrame(columns))
    frame = pd.concat(parts, ignore_index=True).sort_values(["feature", "number", "rank"], ignore_index=True)
    return frame[list(TABLES["examples"])]


def _trimmed(values: np.ndarray, inside: np.ndarray) -> Iterator[np.ndarray]:
    """The part of each window that is inside its text, which is in one piece."""
    first = inside.argmax(1)
    stop = first + inside.sum(1)
    return (row[a:b] for row, a, b in zip(values, first.tolist(), stop.tolist(), strict=True))


class _Texts:
    """The texts of token ids, each decoded once."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.known = np.array([""], dtype=object)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Of each id its text, empty for -1."""
        used = np.unique(ids[ids >= 0])
        if len(used) and used[-1] >= len(self.known) - 1:
            more = np.full(int(used[-1]) + 2 - len(self.known), None, dtype=object)
            self.known = np.concatenate([self.known[:-1], more, self.known[-1:]])
        for token in used[[each is None for each in self.known[used]]].tolist():
            self.known[token] = self.decode(token)
        found: np.ndarray = self.known[ids]
        return found
