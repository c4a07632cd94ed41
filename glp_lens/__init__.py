"""glp-lens: learn, test and use the distribution of a language model's activations.

    import glp_lens as gl

Names are imported when first used, so that importing the package, or asking the command line for help, is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glp_lens import corpus, evals, hooks, lm, models, report
    from glp_lens.activations import ActivationStore, ActivationStream, StoreDataset
    from glp_lens.activations.collect import Generation, collect
    from glp_lens.activations.merge import merge
    from glp_lens.errors import InputError
    from glp_lens.lm import open_model
    from glp_lens.models import load
    from glp_lens.models.gaussian import Gaussian
    from glp_lens.models.glp import GLP
    from glp_lens.models.neurons import Neurons
    from glp_lens.models.pca import PCA
    from glp_lens.models.random_features import RandomFeatures
    from glp_lens.models.raw import Raw
    from glp_lens.models.sae import SAE
    from glp_lens.training.config import RunOptions, TrainConfig, recipe

_HOMES = {
    "ActivationStore": "glp_lens.activations",
    "ActivationStream": "glp_lens.activations",
    "Generation": "glp_lens.activations",
    "StoreDataset": "glp_lens.activations",
    "collect": "glp_lens.activations",
    "merge": "glp_lens.activations",
    "InputError": "glp_lens.errors",
    "open_model": "glp_lens.lm",
    "load": "glp_lens.models",
    "GLP": "glp_lens.models.glp",
    "SAE": "glp_lens.models.sae",
    "PCA": "glp_lens.models.pca",
    "Gaussian": "glp_lens.models.gaussian",
    "Raw": "glp_lens.models.raw",
    "RandomFeatures": "glp_lens.models.random_features",
    "Neurons": "glp_lens.models.neurons",
    "RunOptions": "glp_lens.training.config",
    "TrainConfig": "glp_lens.training.config",
    "recipe": "glp_lens.training.config",
}
_MODULES = ("corpus", "evals", "hooks", "lm", "models", "report")

__all__ = [
    "GLP",
    "PCA",
    "SAE",
    "ActivationStore",
    "ActivationStream",
    "Gaussian",
    "Generation",
    "InputError",
    "Neurons",
    "RandomFeatures",
    "Raw",
    "RunOptions",
    "StoreDataset",
    "TrainConfig",
    "collect",
    "corpus",
    "evals",
    "hooks",
    "lm",
    "load",
    "merge",
    "models",
    "open_model",
    "recipe",
    "report",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
