"""Summaries of stores."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
import xxhash

from glp_lens.activations.manifest import MANIFEST, Manifest
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.writer import being_written
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.types import Json

LEVELS: Final = (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
"""Quantiles of the norm in a summary."""
_MASSIVE = 10


@checked
def describe_store(store: ActivationStore) -> Json:
    """Summary of a store: provenance, size, exclusions, norms, dead and massive dimensions.

    A dimension is dead if its variance is 0, and massive if the size of its mean or its standard deviation is over ten
    times the median of that over all dimensions that are not dead.

    Returns:
        JSON-like. The manifest's part is there for every store; `mean_norm`, `median_norm`, `norm_quantiles`,
        `dead_dims` and `massive_dims` come from the rows.
    """
    live = store.stats.var > 0
    massive = torch.zeros_like(live)
    if live.any():
        for size in (store.stats.var.sqrt(), store.stats.mean.abs()):
            massive |= live & (size > _MASSIVE * size[live].median())
    quantiles = np.quantile(store.column("norm").astype(np.float64), LEVELS).tolist()
    return {
        **_describe_manifest(store.path, store.manifest),
        "mean_norm": store.stats.mean_norm,
        "median_norm": quantiles[LEVELS.index(0.5)],
        "norm_quantiles": {f"{level:g}": q for level, q in zip(LEVELS, quantiles, strict=True)},
        "dead_dims": torch.where(~live)[0].tolist(),
        "massive_dims": torch.where(massive)[0].tolist(),
    }


def describe_folder(folder: str | Path) -> Json:
    """`describe_store` for a store in any state: complete, interrupted, a part, or a stream.

    For a stream, whose shards may be gone, and a store without rows, only what the manifest says.

    Raises:
        InputError: no store there, or it is foreign or damaged.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"no activation store at {folder}: expected a folder with {MANIFEST}")
    manifest = Manifest.read(folder)
    if manifest.window is not None or not manifest.files:
        about = _describe_manifest(folder, manifest)
    else:
        about = describe_store(ActivationStore.open(folder, partial=True))
    return {**about, "being_written": being_written(folder)}


def stores_in(folder: str | Path) -> list[Path]:
    """The folder itself if it is a store; otherwise the stores below it: of several hook points, or parts.

    Raises:
        InputError: none.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        return [folder]
    # out/HOOK, out/parts/0000-of-0002 and out/parts/0000-of-0002/HOOK are where `collect` writes.
    levels = ("*", "parts/*", "parts/*/*")
    stores = [file.parent for level in levels for file in sorted(folder.glob(f"{level}/{MANIFEST}"))]
    if not stores:
        raise InputError(f"no activation store at {folder}: expected a folder with {MANIFEST}")
    return stores


def _describe_manifest(folder: Path, manifest: Manifest) -> Json:
    source = manifest.source
    return {
        "path": str(folder),
        "complete": manifest.complete,
        "part": manifest.part,
        "window": manifest.window,
        "model": source.get("model", {}),
        "weights": source.get("weights"),
        "tokenizer": source.get("tokenizer"),
        "hook": manifest.hook,
        "rows": manifest.rows,
        "d_in": manifest.d_in,
        "dtype": manifest.dtype,
        "bytes": sum(shard.bytes for shard in manifest.files),
        "shards": len(manifest.files),
        "dropped": list(manifest.dropped),
        "labels": dict(manifest.labels),
        "excluded": manifest.excluded,
        "max_norm": manifest.max_norm,
        "settings": source.get("settings", {}),
        "imported": source.get("imported"),
        "corpus": {**source.get("corpus", {}), "documents": manifest.documents, "hash": manifest.corpus_hash},
        "examples": list(manifest.examples),
        "versions": manifest.versions,
        "manifest_hash": xxhash.xxh3_128_hexdigest((folder / MANIFEST).read_bytes()),
    }
