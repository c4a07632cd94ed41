"""What each suite compares: the trained models, each with the options it is run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.interface import Projector, Reconstructor
from glp_lens.models.glp import GLP
from glp_lens.models.pca import PCA
from glp_lens.models.random_features import RandomFeatures


def probing_entries(trained: dict[str, ActivationModel], sigmas: Sequence[float]) -> list[Entry]:
    """What probing compares: a GLP's meta-neurons, and every other model's features.

    A GLP stands at the first of the noise levels. More of them are a sweep, which also gives the features of all
    levels side by side; neither is in the pairwise comparisons.
    """
    found = []
    for label, model in trained.items():
        if label == "pca_raw":  # fidelity's second view of PCA
            continue
        if model.kind != "glp":
            found.append(Entry(label, model))
        elif len(sigmas) == 1:
            found.append(Entry(label, model, {"sigma": sigmas[0]}))
        else:
            found += [
                Entry(f"{label} sigma={sigma:g}", model, {"sigma": sigma}, main=sigma == sigmas[0]) for sigma in sigmas
            ]
            together = tuple(sorted(sigmas))
            name = "+".join(f"{sigma:g}" for sigma in together)
            found.append(Entry(f"{label} sigma={name}", model, {"sigma": together}, main=False))
    return found


def random_control(trained: Mapping[str, ActivationModel], *, seed: int = 0) -> RandomFeatures:
    """Random features of the scale and number of the first GLP's.

    Raises:
        InputError: there is no GLP among the models.
    """
    glp = next((model for model in trained.values() if isinstance(model, GLP)), None)
    if glp is None:
        raise InputError(
            "random features take their number and scale from a GLP, got none: add one, or a folder of "
            "'glp-lens train random'"
        )
    return RandomFeatures.draw(*glp.statistics(None, glp.device), glp.n_features, seed=seed)


def projector_entries(
    trained: dict[str, ActivationModel], u: float, sigma: float, ranks: dict[str, int], *, fast: bool = False
) -> list[Entry]:
    """What steering compares: each model that can put an edited activation back, a GLP at two noise levels."""
    found, pace = [], {"fast": True} if fast else {}
    for label, model in trained.items():
        if model.kind == "glp":
            found += [
                Entry(label, model, {"u": u, **pace}),
                Entry(f"{label} sigma={sigma:g}", model, {"sigma": sigma, **pace}),
            ]
        elif isinstance(model, Projector) and label not in ("raw", "pca_raw"):
            found.append(Entry(label, model, {"k": ranks[label]} if label in ranks else {}))
    return found


def reconstruction_entries(
    trained: dict[str, ActivationModel], u: float, ranks: dict[str, int], *, fast: bool = False
) -> list[Entry]:
    """What fidelity compares: a GLP at several noise levels, PCA at several ranks, any SAE."""
    found, pace = [], {"fast": True} if fast else {}
    for label, model in trained.items():
        if model.kind == "glp":
            found.append(Entry(label, model, {"u": u, **pace}))
            found += [Entry(f"{label} sigma={s:g}", model, {"sigma": s, **pace}) for s in (0.3, 0.2, 0.1)]
        elif isinstance(model, PCA):
            own = ranks.get(label, model.k)
            others = {max(1, own // 4), min(model.n_features, own * 7 // 5)}
            found += [Entry(label if k == own else f"{label} k={k}", model, {"k": k}) for k in sorted({own, *others})]
        elif isinstance(model, Reconstructor) and model.kind != "raw":
            found.append(Entry(label, model))
    return found


def matched_ranks(trained: dict[str, ActivationModel], rows: Tensor) -> dict[str, int]:
    """For each PCA the rank whose squared error on `rows` comes nearest below the SAE's; empty without an SAE.

    PCA's error can be set to anything by its rank, so it is compared at the distortion the SAE happens to have.
    """
    sae = next((m for m in trained.values() if m.kind == "sae" and isinstance(m, Reconstructor)), None)
    if sae is None:
        return {}
    limit = float((rows - sae.reconstruct(rows)).square().sum())
    found = {}
    for label, model in trained.items():
        if isinstance(model, PCA):
            low, high = 1, model.n_features
            while low < high:
                middle = (low + high) // 2
                if float((rows - model.reconstruct(rows, k=middle)).square().sum()) <= limit:
                    high = middle
                else:
                    low = middle + 1
            found[label] = low
    return found
