"""Passages that explanations of features are made of and tested on, from a folder and from texts that it has not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from glp_lens.features.explain import Case, Passage
from glp_lens.features.folder import BANDS, FeatureFolder
from glp_lens.features.passages import Passages, Watched, active, end, of_end

Ints = NDArray[np.int64]
_NEIGHBOURS = 3
"""Nearest ones of each kind, whose passages a feature is told apart from."""


def neighbours(folder: FeatureFolder, label: str, features: Sequence[int]) -> dict[int, list[tuple[str, int]]]:
    """Features that are most like each of some features, with the labels of their models; none without the table."""
    found: dict[int, list[tuple[str, int]]] = {feature: [] for feature in features}
    if folder.has(label, "neighbours"):
        table = folder.table(label, "neighbours", features)
        table = table[(table["model"] != label) | (table["other"] != table["feature"])]
        near = table.sort_values("value", ascending=False, kind="stable").groupby(["feature", "by"]).head(_NEIGHBOURS)
        for row in near.itertuples():
            if (each := (str(row.model), int(row.other))) not in found[int(row.feature)]:
                found[int(row.feature)].append(each)
    return found


def shown(folder: FeatureFolder, label: str, features: Sequence[int], most: int) -> list[list[Passage]]:
    """Passages of each feature that an explanation is made of: examples of even rank, the highest first."""
    signs, ends = _ends(folder, label, features)
    return [
        _passages(_even(ends[ends["feature"] == feature], most), sign)
        for feature, sign in zip(features, signs, strict=True)
    ]


def cases(
    folder: FeatureFolder,
    label: str,
    features: Sequence[int],
    watched: Mapping[str, Watched],
    passages: Passages,
    spell: Callable[[Ints], list[str]],
    *,
    most_shown: int,
    tested: int,
    seed: int,
) -> list[Case]:
    """What explanations of features of one model are tested on.

    A feature is active in its examples of odd rank, and in those from the upper four fifths of its range, of other
    texts than those shown. It is not in passages where it stays under the median of its peaks.

    Args:
        folder: with examples, and neighbours if there are any.
        label: of the model.
        features: which.
        watched: these and their neighbours, by the label of their model.
        passages: of texts that no example is of.
        spell: the texts of token ids.
        most_shown: passages that an explanation was made of.
        tested: passages of each kind that it is tested on.
        seed: of the choice.
    """
    signs, ends = _ends(folder, label, features)
    bands = folder.table(label, "examples", features)
    bands = bands[bands["group"].isin([f"band {i}" for i in range(1, len(BANDS))])]
    near = neighbours(folder, label, features)
    made = []
    for feature, sign in zip(features, signs, strict=True):
        rng = np.random.default_rng([seed, feature])
        top = ends[ends["feature"] == feature]
        rest = bands[(bands["feature"] == feature) & (bands["value"] * sign > 0)]
        odd, half = top[top["rank"] % 2 == 1], (tested + 1) // 2
        held = pd.concat([odd.head(half), rest.iloc[rng.permutation(len(rest))], odd.iloc[half:]])
        held = held[~held["key"].isin(_even(top, most_shown)["key"])].drop_duplicates("key").head(tested)
        peaks = passages.peaks[label][0, :, np.searchsorted(watched[label].features, feature)]
        low = (peaks <= np.median(peaks)) & np.isfinite(peaks)
        high = np.zeros(len(passages), dtype=bool)
        for name, other in near[feature]:
            if name in watched and other in watched[name].features:
                at = np.searchsorted(watched[name].features, [other])
                high |= active(passages.peaks[name][0][:, at], watched[name].on[at], "tenth")[:, 0]
        lengths = held["token_ids"].str.len().tolist()
        texts = []
        for among in (low, low & high):
            chosen = rng.permutation(np.flatnonzero(among))[:tested].tolist() if lengths else []
            texts.append(["".join(spell(passages.token_ids[i][: rng.choice(lengths)])) for i in chosen])
        made.append(Case(feature, _passages(held, sign), *texts))
    return made


def _ends(folder: FeatureFolder, label: str, features: Sequence[int]) -> tuple[list[float], pd.DataFrame]:
    """By which end each feature is read, and the examples of that end by rank."""
    known = folder.table(label, "features", features).set_index("feature").loc[list(features)]
    signs = end(known)
    examples = folder.table(label, "examples", features)
    return signs.tolist(), of_end(examples, np.asarray(features), signs).sort_values(["feature", "rank"])


def _even(top: pd.DataFrame, most: int) -> pd.DataFrame:
    return top[top["rank"] % 2 == 0].head(most)


def _passages(rows: pd.DataFrame, sign: float) -> list[Passage]:
    return [
        Passage(list(tokens), sign * np.asarray(values, dtype=np.float64))
        for tokens, values in zip(rows["tokens"], rows["values"], strict=True)
    ]
