"""A page on which a person looks at features: one file that fetches nothing, with all its data inside, compressed.

What is listed, sorted and filtered is in one piece; what one feature shows is in pieces of `TOGETHER` features, which
the page unpacks when they are looked at or searched.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from glp_lens.defaults import DEFAULT_PASSAGES
from glp_lens.features.folder import FeatureFolder, ModelAbout
from glp_lens.files import write_atomic
from glp_lens.kinds import kind_of
from glp_lens.types import Json

PAGE = "index.html"
_TEMPLATE = "page.html"
_SCRIPTS = ("page_data.js", "page_feature.js", "page_reader.js", "page_app.js")
TOGETHER = 40
"""Features in one piece."""
_SEPARATOR, _SHOWN = "\x1f", "\u241f"
"""Stands between the tokens of a passage; a token that holds it gets its picture instead."""
_KEY = 12
"""Hexadecimal digits of a text's key: two of 100,000 texts share them in one of 50,000 pages."""
_COLUMNS = {
    "writes": ("way", "side", "tokens", "logits"),
    "neighbours": ("by", "model", "other", "value"),
    "prior": ("sigma", "top_value", "stability", "ablation", "jacobian_norm", "jacobian_agreement", "jacobian_cosine"),
    "tasks": ("task", "auc", "ci_low", "ci_high", "sign"),
    "steered": ("way", "strength", "prompt", "text"),
    "labels": ("label", "tokens", "log_odds", "context", "context_log_odds"),
    "explanations": (
        "explanation", "n", "detection", "detection_low", "detection_high", "neighbours", "neighbours_low",
        "neighbours_high", "fuzzing", "fuzzing_low", "fuzzing_high",
    ),
}  # fmt: skip
"""Of the tables that may be missing, as any of these columns may."""
_TASKS = 20
"""Tasks shown of a feature, its best."""

Details = dict[int, list[list[Any]]]
"""Rows of a table by feature, without that column."""


def write_page(
    folder: FeatureFolder, path: Path | None = None, *, features: int | None = None, examples: int = DEFAULT_PASSAGES
) -> Path:
    """Write the page of a folder of features, and return its path.

    Texts are put into it as text only, whatever markup they contain, and no script runs in it but its own.

    Args:
        folder: of features, complete.
        path: of the page; by default index.html in the folder.
        features: at most so many of each model: evenly spaced over the numbers of those that are not dead; by default
            all features.
        examples: passages of each group, the first ones; of the parts of a feature's range a fifth of it.

    Raises:
        InputError: a table that is missing or damaged.
    """
    models: list[Json] = []
    pieces: list[str] = []
    notes = list(folder.about.notes)
    for model in folder.about.models:
        index, details = _model(folder, model, features, examples)
        models.append(index | {"piece": len(pieces)})
        pieces += [_packed(details[i : i + TOGETHER]) for i in range(0, len(details), TOGETHER)]
    if features is not None and any(len(each["feature"]) < each["n_features"] for each in models):
        notes.append(
            f"This page shows at most {features:,} features of each model: evenly spaced over the numbers of those "
            "that are not dead, whatever they are on."
        )
    index = {"together": TOGETHER, "models": models, "about": _about(folder, notes)}
    path = path or folder.path / PAGE
    write_atomic(path, _filled([("index", _packed(index)), *((f"piece-{i}", each) for i, each in enumerate(pieces))]))
    return path


def _filled(elements: Sequence[tuple[str, str]]) -> str:
    """The page with data elements, which no browser runs, and the hash of the only script that it may run."""
    files = resources.files(__package__)
    page, *scripts = (files.joinpath(name).read_text(encoding="utf-8") for name in (_TEMPLATE, *_SCRIPTS))
    script = "".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head, rest = page.replace("@HASH@", f"sha256-{digest}").split("@DATA@")
    before, after = rest.split("@SCRIPT@")
    data = [f'<script type="application/octet-stream" id="{name}">{text}</script>\n' for name, text in elements]
    return "".join([head, *data, before, script, after])


def _packed(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode("ascii")


def _about(folder: FeatureFolder, notes: Sequence[str]) -> Json:
    about = folder.about
    name = (about.language_model.get("model") or {}).get("name") or "unnamed"
    return {
        "texts": about.texts, "tokens": about.tokens, "corpus": about.corpus, "language_model": str(name),
        "notes": list(notes),
    }  # fmt: skip


def _model(
    folder: FeatureFolder, model: ModelAbout, most: int | None, examples: int
) -> tuple[Json, list[dict[str, Any]]]:
    """What is listed of a model's features, and the details of each."""
    frame = folder.table(model.label, "features").sort_values("feature", ignore_index=True)
    if most is not None:
        frame = frame.iloc[_evenly(frame["dead"].to_numpy(bool), most)].reset_index(drop=True)
    chosen = frame["feature"].tolist()
    wanted = None if most is None else chosen
    passages = _passages(folder.table(model.label, "examples", wanted), examples)
    labels = _rows(folder, model, "labels", wanted)
    explanations = _rows(folder, model, "explanations", wanted)
    tasks = _rows(folder, model, "tasks", wanted)
    others = {name: _rows(folder, model, name, wanted) for name in ("neighbours", "prior", "steered")}
    writes = _writes(_rows(folder, model, "writes", wanted))
    number = {each.label: i for i, each in enumerate(folder.about.models)}
    columns = {name: _listed(frame[name].to_numpy()) for name in frame.columns}
    details = []
    best: list[list[Any]] = []
    for i, feature in enumerate(chosen):
        own: dict[str, list[list[Any]]] = {name: found[feature] for name, found in others.items()}
        own["tasks"] = sorted(tasks[feature], key=lambda each: -(each[1] or 0))[:_TASKS]
        own["neighbours"] = [[by, number[name], *rest] for by, name, *rest in own["neighbours"] if name in number]
        best.append(own["tasks"][0] if own["tasks"] else [None, None])
        _, *words = next(iter(labels[feature]), [""])
        details.append(
            {
                "mean": columns["mean"][i], "std": columns["std"][i], "low": columns["histogram_low"][i],
                "high": columns["histogram_high"][i], "histogram": columns["histogram"][i],
                "examples": passages[feature], "writes": writes[feature],
                "label": words,
                "explanation": next(iter(explanations[feature]), None), **own,
            }
        )  # fmt: skip
    index = {
        "label": model.label, "title": kind_of(model.kind).title, "hook": model.hook, "n_features": model.n_features,
        "blocks": model.blocks, "signed": model.signed, "sigma": model.sigma, "feature": chosen,
        **{name: columns[name] for name in ("density", "kurtosis", "min", "max")},
        **{name: np.flatnonzero(frame[name].to_numpy(bool)).tolist() for name in ("dead", "dense")},
        "task": [task for task, *_ in best], "auc": [auc for _, auc, *_ in best],
        "tokens": [_peaks(passages[feature]) for feature in chosen],
        "labels": [next((label for label, *_ in labels[feature]), "") for feature in chosen],
        "explanations": [next((text for text, *_ in explanations[feature]), "") for feature in chosen],
    }  # fmt: skip
    return index, details


def _evenly(dead: np.ndarray, most: int) -> np.ndarray:
    """Places of at most so many features that are not dead, evenly spaced."""
    alive = np.flatnonzero(~dead)
    return alive[(np.arange(min(most, len(alive))) * len(alive)) // min(most, max(len(alive), 1))]


def _rows(folder: FeatureFolder, model: ModelAbout, table: str, wanted: Sequence[int] | None) -> Details:
    """The `_COLUMNS` of a table as JSON, by feature; None of a column that is missing, nothing of such a table."""
    found: Details = defaultdict(list)
    if folder.has(model.label, table):
        frame = folder.table(model.label, table, wanted)
        known = (frame[name].to_numpy() if name in frame else np.full(len(frame), None) for name in _COLUMNS[table])
        for feature, *row in zip(frame["feature"].tolist(), *map(_listed, known), strict=True):
            found[feature].append(row)
    return found


def _passages(frame: pd.DataFrame, most: int) -> Details:
    """The groups of each feature with their passages.

    A passage is its text's key, position and place of its token, the value there, the largest absolute value in it,
    its tokens, and the values of all tokens in hundredths of that largest one.
    """
    kept = frame[frame["rank"] < np.where(frame["group"].str.startswith("band"), max(1, most // 5), most)]
    place = kept["group"].map({"top": 0, "bottom": 1}).fillna(2)
    kept = kept.assign(place=place).sort_values(["feature", "place", "group", "rank"], kind="stable")
    lengths = [len(values) for values in kept["values"]]
    ends = np.cumsum(lengths)
    flat = np.concatenate([np.empty(0, np.float64), *kept["values"]]).astype(np.float64)
    flat[~np.isfinite(flat)] = 0
    owner = np.repeat(np.arange(len(kept)), lengths)
    scales = np.zeros(len(kept), np.float64)
    np.maximum.at(scales, owner, np.abs(flat))
    shares = np.rint(100 * flat / np.where(scales > 0, scales, 1)[owner]).astype(int).tolist()
    names = ("feature", "group", "key", "position", "peak", "value", "tokens")
    columns = [_listed(kept[name].to_numpy()) for name in names]
    groups: dict[tuple[int, str], list[Any]] = defaultdict(list)
    for (feature, group, key, position, peak, value, tokens), scale, n, end in zip(
        zip(*columns, strict=True), _listed(scales), lengths, ends.tolist(), strict=True
    ):
        text = _SEPARATOR.join([token.replace(_SEPARATOR, _SHOWN) for token in tokens])
        name = f"{key % 2**64:016x}"[:_KEY]
        groups[feature, group].append([name, position, peak, value, scale, text, shares[end - n : end]])
    found: Details = defaultdict(list)
    for (feature, group), passages in groups.items():
        found[feature].append([group, passages])
    return found


def _writes(rows: Details) -> Details:
    """For each way the tokens and logits at the top, then those at the bottom."""
    found: Details = defaultdict(list)
    for feature, own in rows.items():
        ways = dict.fromkeys(way for way, *_ in own)
        for way in ways:
            ends = {side: [tokens, logits] for other, side, tokens, logits in own if other == way}
            found[feature].append([way, *ends.get("top", [[], []]), *ends.get("bottom", [[], []])])
    return found


def _peaks(groups: Sequence[Sequence[Any]]) -> str:
    """The different tokens that the highest and lowest passages are shown for."""
    tokens = [
        text.split(_SEPARATOR)[peak]
        for group, passages in groups
        if group in ("top", "bottom")
        for _, _, peak, _, _, text, _ in passages
    ]
    return _SEPARATOR.join(dict.fromkeys(tokens))


def _listed(values: np.ndarray) -> list[Any]:
    """Values of a column as JSON has them: numbers in four digits, None for what is no finite number."""
    if len(values) and isinstance(values[0], np.ndarray):
        flat = _listed(np.concatenate(values))
        ends = np.cumsum([len(each) for each in values]).tolist()
        return [flat[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    if values.dtype.kind != "f":
        plain: list[Any] = values.tolist()
        return plain
    finite = np.isfinite(values) & (np.abs(values) > 1e-290)
    known = np.where(finite, values, 1).astype(np.float64)
    digits = 3 - np.floor(np.log10(np.abs(known)))
    up, down = 10.0 ** np.maximum(digits, 0), 10.0 ** np.maximum(-digits, 0)  # both exact in the usual range
    rounded = np.where(finite, np.rint(known * up / down) * down / up, 0).tolist()
    return [each if here else None for each, here in zip(rounded, np.isfinite(values).tolist(), strict=True)]
