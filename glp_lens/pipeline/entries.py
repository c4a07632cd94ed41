"""What each suite compares: the trained models, each at the settings it is run with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glp_lens.errors import InputError
from glp_lens.evals.entries import Entry
from glp_lens.evals.fidelity.settings import FidelitySettings
from glp_lens.evals.steering.settings import SteeringSettings
from glp_lens.interface import Projector, Reconstructor
from glp_lens.models.glp import GLP
from glp_lens.models.pca import PCA
from glp_lens.models.random_features import RandomFeatures
from glp_lens.models.raw import Raw

if TYPE_CHECKING:
    from glp_lens.activations import ActivationStore
    from glp_lens.artifacts import ActivationModel

Trained = Mapping[str, "ActivationModel"]


def probing_entries(trained: Trained, sigmas: Sequence[float]) -> list[Entry]:
    """What probing compares: a GLP's meta-neurons, and every other model's features.

    A GLP stands at the first of the noise levels. More of them are a sweep, which also gives the features of all
    levels side by side; neither is in the pairwise comparisons.
    """
    entries = []
    for label, model in trained.items():
        if model.kind != "glp":
            entries.append(Entry(label, model))
        elif len(sigmas) == 1:
            entries.append(Entry(label, model, {"sigma": sigmas[0]}))
        else:
            entries += [
                Entry(f"{label} sigma={sigma:g}", model, {"sigma": sigma}, main=sigma == sigmas[0]) for sigma in sigmas
            ]
            together = tuple(sorted(sigmas))
            name = "+".join(f"{sigma:g}" for sigma in together)
            entries.append(Entry(f"{label} sigma={name}", model, {"sigma": together}, main=False))
    return entries


def random_control(trained: Trained, *, seed: int = 0) -> RandomFeatures:
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


def projector_entries(trained: Trained, settings: SteeringSettings, ranks: Mapping[str, int]) -> list[Entry]:
    """What steering compares: each model that can put an edited activation back, a GLP at two noise levels.

    Raw activations would leave it as it is, which is steering without repair.
    """
    entries, pace = [], _pace(fast=settings.fast)
    for label, model in trained.items():
        if model.kind == "glp":
            sigma = settings.project_sigma
            entries += [
                Entry(label, model, {"u": settings.project_u, **pace}),
                Entry(f"{label} sigma={sigma:g}", model, {"sigma": sigma, **pace}),
            ]
        elif isinstance(model, Projector) and not isinstance(model, Raw):
            entries.append(Entry(label, model, {"k": ranks[label]} if label in ranks else {}))
    return entries


def reconstruction_entries(trained: Trained, settings: FidelitySettings, ranks: Mapping[str, int]) -> list[Entry]:
    """What fidelity compares: a GLP at several noise levels, PCA at several ranks, any SAE."""
    entries, pace = [], _pace(fast=settings.fast)
    for label, model in trained.items():
        if model.kind == "glp":
            entries.append(Entry(label, model, {"u": settings.project_u, **pace}))
            entries += [Entry(f"{label} sigma={s:g}", model, {"sigma": s, **pace}) for s in (0.3, 0.2, 0.1)]
        elif isinstance(model, PCA):
            own = ranks.get(label, model.k)
            others = {max(1, own // 4), min(model.n_features, own * 7 // 5)}
            entries += [Entry(label if k == own else f"{label} k={k}", model, {"k": k}) for k in sorted({own, *others})]
        elif isinstance(model, Reconstructor) and not isinstance(model, Raw):
            entries.append(Entry(label, model))
    return entries


def _pace(*, fast: bool) -> dict[str, Any]:
    return {"fast": True} if fast else {}


def matched_ranks(trained: Trained, store: ActivationStore) -> dict[str, int]:
    """For each PCA the rank whose squared error on training rows comes nearest below the SAE's; empty without an SAE.

    PCA's error can be set to anything by its rank, so it is compared at the distortion the SAE happens to have.
    """
    sae = next((m for m in trained.values() if m.kind == "sae" and isinstance(m, Reconstructor)), None)
    if sae is None:
        return {}
    rows = store.sample(2048, seed=0)
    limit = float((rows - sae.reconstruct(rows)).square().sum())
    ranks = {}
    for label, model in trained.items():
        if isinstance(model, PCA):
            low, high = 1, model.n_features
            while low < high:
                middle = (low + high) // 2
                if float((rows - model.reconstruct(rows, k=middle)).square().sum()) <= limit:
                    high = middle
                else:
                    low = middle + 1
            ranks[label] = low
    return ranks
