"""Directions of features to steer along, and what a language model writes along them at rising strength."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import hooks, lm, provenance
from glp_lens.directions import Direction
from glp_lens.errors import InputError
from glp_lens.features.folder import TABLES, FeatureFolder, ModelAbout, Way, name_of
from glp_lens.features.sample import Sample, sample_path

STRENGTHS = (0.3, 0.6, 1.0)
"""By default, in median distances of the activations from their mean."""
PROMPT = "The first thing I noticed"
_BATCH = 256
"""Texts that are written at once."""
_MLP = re.compile(r"(blocks\.\d+\.)mlp\.hook_post")


def steer(
    folder: FeatureFolder,
    model: ModelAbout,
    features: Sequence[int],
    language_model: lm.Model,
    *,
    way: Way | None = None,
    strengths: Sequence[float] = STRENGTHS,
    prompt: str = PROMPT,
    new_tokens: int = 24,
    keep: bool = False,
    allow_mismatch: bool = False,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Continue a prompt along the direction of each feature, greedily, and put the texts into the table `steered`.

    A strength is how many median distances of the activations from their mean are added at the last position of each
    step, as in `steer` and `generate`. Strength 0 is the unsteered text, which is always there.

    Args:
        folder: of the features, with the sample of the hook point.
        model: which of its models.
        features: which of its features; those without a direction are left out.
        language_model: to write with.
        way: which of their directions; by default the first that there is.
        strengths: positive ones go with the feature.
        prompt: to continue.
        new_tokens: tokens of each text.
        keep: leave out features whose texts for this way, prompt and strengths are there, as after an interrupted call:
            the table is saved batch by batch.
        allow_mismatch: steer where an edit may not reach the residual stream.
        say: prints a line.

    Returns:
        The rows of these features: `feature`, `way`, `strength`, `prompt`, `text`.

    Raises:
        InputError: no such directions, no sample, or a hook point that cannot be steered at.
    """
    way = check_way(folder, model, way)
    vectors, _ = folder.directions(model.label, way)
    hook = stream_hook(folder, model, vectors.shape[1])
    for note in provenance.check_edit(language_model, hook, allow_mismatch=allow_mismatch):
        say(f"note: {note}")
    unit = _unit(Sample.read(sample_path(folder.path, hook)).rows)
    usable = [each for each in dict.fromkeys(features) if bool(vectors[each].isfinite().all())]
    if left_out := len(set(features)) - len(usable):
        say(f"note: {left_out} of these features of {model.label} have no direction to steer along")
    alphas = (0.0, *dict.fromkeys(alpha for alpha in strengths if alpha))
    table = _table(folder, model)

    def of(wanted: Sequence[int]) -> pd.Series:
        same = (table["way"] == way) & (table["prompt"] == prompt) & table["strength"].isin(alphas)
        return same & table["feature"].isin(wanted)

    there = table[of(usable)].groupby("feature")["strength"].nunique().to_dict() if keep else {}
    missing = [each for each in usable if there.get(each, 0) < len(alphas)]
    [ids] = lm.to_ids(language_model, [prompt], 1024)
    size = max(1, _BATCH // len(alphas))
    for start in tqdm(range(0, len(missing), size), desc=f"steer {model.label}", unit="batch", leave=False):
        batch = missing[start : start + size]
        texts = _written(language_model, hook, unit * vectors[batch], alphas, ids, new_tokens, allow_mismatch)
        rows = [(f, way, alpha, prompt, text) for (f, alpha), text in zip(product(batch, alphas), texts, strict=True)]
        made = pd.DataFrame(rows, columns=list(TABLES["steered"]))
        table = pd.concat([each for each in (table[~of(batch)], made) if len(each)])
        table = table.sort_values(["feature", "way", "prompt", "strength"], kind="stable", ignore_index=True)
        folder.write_table(model, "steered", table)
    return table[of(usable)].reset_index(drop=True)


def evenly(folder: FeatureFolder, model: ModelAbout, n: int) -> list[int]:
    """`n` features of a model, or all if there are no more, evenly spaced among those neither dead nor dense."""
    table = folder.table(model.label, "features")
    able = table.loc[~(table["dead"] | table["dense"]), "feature"].to_numpy()
    return [int(able[i]) for i in np.unique(np.linspace(0, len(able) - 1, min(n, len(able))).round().astype(int))]


def directions_of(
    folder: FeatureFolder, model: ModelAbout, features: Sequence[int], way: Way | None = None
) -> list[Direction]:
    """The directions of features, with their lengths and where they come from.

    Args:
        folder: of the features.
        model: which of its models.
        features: which of its features.
        way: how they were found; by default the first that there is.

    Raises:
        InputError: no directions of that way, or none of one of these features.
    """
    way = check_way(folder, model, way)
    vectors, norms = folder.directions(model.label, way)
    hook, made = stream_hook(folder, model, vectors.shape[1]), []
    for feature in features:
        name = f"{model.label}/{name_of(model, feature)}"
        if not bool(vectors[feature].isfinite().all()):
            raise InputError(f"feature {name} has no direction of the way {way!r}: it is dead, or writes nothing")
        about = {
            **folder.about.language_model, "hook": hook,
            "feature": {"name": name, "index": feature, "way": way, "model": model.name, "weights": model.fingerprint},
        }  # fmt: skip
        vector = vectors[feature].double() * norms[feature].double()
        made.append(Direction.of(vector, hook, name=name, method=f"feature, {way}", provenance=about))
    return made


def check_way(folder: FeatureFolder, model: ModelAbout, way: Way | None) -> Way:
    """The way asked for, or the first that there is: a model's own directions before class means.

    Raises:
        InputError: the folder has no directions of that way, or none at all.
    """
    ways = folder.ways(model.label)
    if not ways or (way is not None and way not in ways):
        known = f"there are {', '.join(ways)}" if ways else "there are none: build the features again"
        raise InputError(f"no directions {'' if way is None else f'of the way {way!r} '}of {model.label}: {known}")
    return way or ways[0]


def stream_hook(folder: FeatureFolder, model: ModelAbout, width: int) -> str:
    """Where directions of a width act: at the model's hook point, or in the stream after the block of MLP neurons."""
    found = _MLP.fullmatch(model.hook)
    if found and width == (folder.about.language_model.get("model") or {}).get("d_model", width):
        return f"{found[1]}hook_resid_post"
    return model.hook


def _unit(rows: Tensor) -> float:
    """Median distance of rows `(n, d)` from their mean."""
    exact = rows.double()
    return float((exact - exact.mean(0)).norm(dim=1).median())


def _table(folder: FeatureFolder, model: ModelAbout) -> pd.DataFrame:
    columns = list(TABLES["steered"])
    if folder.has(model.label, "steered"):
        return folder.table(model.label, "steered")[columns]
    kinds = ("int64", "object", "float64", "object", "object")
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in zip(columns, kinds, strict=True)})


def _written(
    model: lm.Model,
    hook: str,
    pushes: Tensor,
    alphas: Sequence[float],
    ids: Sequence[int],
    new_tokens: int,
    allow_mismatch: bool,
) -> list[str]:
    """Texts along each of several pushes `(k, d)` at each strength, in that order, from one batch of generation."""
    strengths = torch.zeros(len(pushes) * len(alphas), len(pushes), dtype=torch.float32)
    for row, (i, alpha) in enumerate(product(range(len(pushes)), alphas)):
        strengths[row, i] = alpha
    edit = hooks.steer(pushes, strengths, None, "last", model=model, allow_mismatch=allow_mismatch)
    tokens = torch.tensor([list(ids)] * len(strengths))
    made = lm.generate(model, tokens, new_tokens, hooks=[(hook, edit)])[:, len(ids) :]
    return [lm.decode(model, row) for row in made.tolist()]
