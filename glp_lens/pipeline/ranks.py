"""The ranks at which PCA is compared with an SAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore
    from glp_lens.artifacts import ActivationModel


def matched_ranks(trained: Mapping[str, ActivationModel], store: ActivationStore) -> dict[str, int]:
    """For each PCA the rank whose squared error on training rows comes nearest below the SAE's; empty without an SAE.

    PCA's error can be set to anything by its rank, so it is compared at the distortion the SAE happens to have.
    """
    from glp_lens.interface import Reconstructor

    sae = next((m for m in trained.values() if m.kind == "sae" and isinstance(m, Reconstructor)), None)
    if sae is None:
        return {}
    rows = store.sample(2048, seed=0)
    limit = float((rows - sae.reconstruct(rows)).square().sum())
    ranks = {}
    for label, model in trained.items():
        if model.kind == "pca":
            pca: Any = model
            low, high = 1, pca.n_features
            while low < high:
                middle = (low + high) // 2
                if float((rows - pca.reconstruct(rows, k=middle)).square().sum()) <= limit:
                    high = middle
                else:
                    low = middle + 1
            ranks[label] = low
    return ranks
