"""How far two trainings that differ in their seed find the same features.

    python benchmarks/seed_stability.py --store acts_heldout glp1,glp2 sae1,sae2 glp1,random1

For each feature of the first model of a pair, the largest absolute correlation with any feature of the second, over
rows that neither was trained on. Features that are never negative count if they are on in eight rows.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import glp_lens as gl
from glp_lens.features.sample import Sample, encode
from glp_lens.types import Json

FEWEST = 8
BLOCK = 512


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", help="folders of two models, with a comma between")
    parser.add_argument("--store", type=Path, required=True, help="held-out activations")
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--sigma", type=float, default=0.1, help="noise level of meta-neurons")
    return parser.parse_args()


def rows(store: gl.ActivationStore, n: int) -> Sample:
    """Rows drawn at random; their numbers stand for texts, so that each has noise of its own."""
    x = store.sample(min(n, len(store)), seed=0).float()
    number = np.arange(len(x))
    zeros = np.zeros(len(x), dtype=np.int64)
    return Sample(x, number.astype(np.uint64), zeros, zeros)


def standardised(features: Tensor) -> Tensor:
    """Columns that vary, and are on in enough rows, less their mean and of length 1."""
    varies = features.amin(0) < features.amax(0)
    signed = features.amin(0) < 0
    some = features[:, varies & (signed | ((features > 0).sum(0) >= FEWEST))]
    return torch.nn.functional.normalize(some - some.mean(0), dim=0)


def best(one: Tensor, other: Tensor) -> np.ndarray:
    """The largest absolute correlation of each column of the first with a column of the second."""
    a, b = standardised(one), standardised(other)
    return np.concatenate([(part.T @ b).abs().amax(1).numpy() for part in a.split(BLOCK, dim=1)])


def main() -> None:
    options = arguments()
    sample = rows(gl.ActivationStore.open(options.store), options.rows)
    known: dict[str, Tensor] = {}

    def features(folder: str) -> Tensor:
        if folder not in known:
            model = gl.load(folder)
            chosen: Json = {"sigma": options.sigma} if model.kind == "glp" else {}
            known[folder] = encode(model, chosen, sample, 0)
        return known[folder]

    for pair in options.pairs:
        one, _, other = pair.partition(",")
        found = best(features(one), features(other))
        half = 1.96 * found.std(ddof=1) / len(found) ** 0.5
        print(json.dumps({
            "pair": pair, "features": len(found), "mean": round(float(found.mean()), 3), "half": round(float(half), 3),
            "median": round(float(np.median(found)), 3), "over .7": round(float((found > 0.7).mean()), 3),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
