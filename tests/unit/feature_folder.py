"""A small folder of features with everything in it, made without models or texts."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from glp_lens.features import BANDS, TABLES, About, FeatureFolder, ModelAbout, Way

WORDS = ["the", " cat", " sat", " on", " a", " mat", ",", " while", " rain", " fell", "\n", " <b>", " $x$", " Ünï", "."]
WINDOW, TOP, WIDTH = 7, 5, 6
GLP = ModelAbout("glp", "glp", "glp", "blocks.1.hook_resid_post", 24, 2, True, 0.1, "models/glp", "f1")
SAE = ModelAbout("my sae", "my-sae", "sae", "blocks.1.hook_resid_post", 30, 1, False, None, "models/sae", "f2")
DEAD = 4
"""A feature of each model that is never on."""


def write_features(path: Path, models: tuple[ModelAbout, ...] = (GLP, SAE), seed: int = 0) -> FeatureFolder:
    """Write one, with `DEAD` a dead feature of each model, and open it."""
    folder, rng = FeatureFolder(path), np.random.default_rng(seed)
    for model in models:
        folder.write_table(model, "features", _features(model, rng))
        folder.write_table(model, "examples", _examples(model, rng))
        ways: tuple[Way, ...] = ("jacobian", "class mean") if model.kind == "glp" else ("decoder", "class mean")
        for way in ways:
            vectors = torch.from_numpy(rng.normal(size=(model.n_features, WIDTH)))
            vectors[DEAD] = float("nan")
            folder.write_directions(model, way, vectors)
        alive = [i for i in range(model.n_features) if i != DEAD]
        folder.write_table(model, "writes", _writes(alive, ways, rng))
        folder.write_table(model, "neighbours", _neighbours(alive, models, rng))
        folder.write_table(model, "tasks", _tasks(alive[:3]))
        folder.write_table(model, "labels", _labels(alive, rng))
        if model.kind == "glp":
            folder.write_table(model, "prior", _prior(alive, rng))
            folder.write_table(model, "steered", _steered(alive[:2]))
    about = About(
        models, {"model": {"name": "toy"}}, 40, 400, "toy texts", {"seed": seed}, {"glp-lens": "0"}, ("A note.",)
    )
    folder.finish(about)
    return FeatureFolder.open(path)


def write_many(path: Path, times: int, tables: Iterable[str] = TABLES) -> FeatureFolder:
    """A folder of one model that has the features of the small one's GLP so many times, in some tables."""
    small = write_features(path / "small")
    label, n = GLP.label, GLP.n_features
    model = replace(GLP, n_features=times * n, blocks=1)
    folder = FeatureFolder(path / "many")
    for table in (name for name in tables if small.has(label, name)):
        frame = small.table(label, table)
        features = (np.arange(times)[:, None] * n + frame["feature"].to_numpy()).ravel()
        frame = frame.iloc[np.tile(np.arange(len(frame)), times)].reset_index(drop=True).assign(feature=features)
        folder.write_table(model, table, frame)
    folder.finish(replace(small.about, models=(model,)))
    return FeatureFolder.open(path / "many")


def _features(model: ModelAbout, rng: np.random.Generator) -> pd.DataFrame:
    n, width = model.n_features, model.n_features // model.blocks
    index, high = np.arange(n), np.round(rng.uniform(1, 9, n), 3)
    low = -high / 2 if model.signed else np.zeros(n)
    density = np.round(rng.uniform(0.001, 0.4, n), 4)
    high[DEAD] = low[DEAD] = density[DEAD] = 0
    counts = [rng.integers(0, 50, 20).tolist() for _ in range(n)]
    return pd.DataFrame(
        {
            "feature": index, "block": index // width, "unit": index % width, "mean": high / 9, "std": high / 4,
            "kurtosis": rng.uniform(0, 60, n), "min": low, "max": high, "density": density, "dead": index == DEAD,
            "dense": density > 0.1, "histogram_low": low, "histogram_high": high, "histogram": counts,
        }
    )[list(TABLES["features"])]  # fmt: skip


def _examples(model: ModelAbout, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    groups = ["top", *(["bottom"] if model.signed else []), *(f"band {i}" for i in range(len(BANDS)))]
    for feature in range(model.n_features):
        for group in groups if feature != DEAD else []:
            for rank in range(TOP if group in ("top", "bottom") else 2):
                ids, peak = rng.integers(0, len(WORDS), WINDOW), int(rng.integers(0, WINDOW))
                values = np.round(rng.uniform(0, 1, WINDOW), 3)
                values[peak] = 5 - rank if group != "bottom" else rank - 5
                rows.append(
                    (feature, group, rank, int(rng.integers(1 << 62)), peak + 1, peak, float(values[peak]),
                     ids.tolist(), [WORDS[i] for i in ids], values.tolist())
                )  # fmt: skip
    return pd.DataFrame(rows, columns=list(TABLES["examples"]))


def _writes(alive: list[int], ways: tuple[Way, ...], rng: np.random.Generator) -> pd.DataFrame:
    rows = [
        (feature, way, side, rng.choice(WORDS, 4, replace=False).tolist(), [sign * v for v in (4.0, 3.0, 2.5, 1.0)])
        for feature in alive
        for way in ways
        for side, sign in (("top", 1), ("bottom", -1))
    ]
    return pd.DataFrame(rows, columns=list(TABLES["writes"]))


def _neighbours(alive: list[int], models: tuple[ModelAbout, ...], rng: np.random.Generator) -> pd.DataFrame:
    rows = [
        (feature, by, other.label, int(rng.integers(other.n_features)), round(0.9 - rank / 10, 2))
        for feature in alive
        for by in ("direction", "activation")
        for other in models
        for rank in range(2)
    ]
    return pd.DataFrame(rows, columns=list(TABLES["neighbours"]))


def _tasks(won: list[int]) -> pd.DataFrame:
    rows = [(feature, f"task_{feature}", 0.9, 0.85, 0.94, 1 if feature % 2 else -1) for feature in won]
    return pd.DataFrame(rows, columns=list(TABLES["tasks"]))


def _labels(alive: list[int], rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for feature in alive:
        words = rng.choice(WORDS[:10], 3, replace=False).tolist()
        label = ", ".join(word.strip() for word in words)
        rows.append((feature, label, words, [3.0, 2.0, 1.0], words[:1], [1.5]))
    return pd.DataFrame(rows, columns=list(TABLES["labels"]))


def _prior(alive: list[int], rng: np.random.Generator) -> pd.DataFrame:
    rows = [
        (feature, sigma, 4 - 3 * sigma, 1 - sigma, *rng.uniform(0, (0.1, 2.0, 1.0)).tolist(), 1 - sigma / 2)
        for feature in alive
        for sigma in (0.05, 0.1, 0.3, 0.6)
    ]
    return pd.DataFrame(rows, columns=list(TABLES["prior"]))


def _steered(features: list[int]) -> pd.DataFrame:
    rows = [(f, "jacobian", s, "I think", f" of {f} at {s}") for f in features for s in (0.5, 1.0, 2.0)]
    return pd.DataFrame(rows, columns=list(TABLES["steered"]))
