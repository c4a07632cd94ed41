"""glp-lens: learn, test and use the distribution of a language model's activations.

    import glp_lens as gl

Names are imported when first used, so that importing the package, or asking the command line for help, is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens import corpus, directions, evals, hooks, lm, models, pipeline, report
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
    "directions",
    "evals",
    "hooks",
    "lm",
    "load",
    "merge",
    "models",
    "open_model",
    "pipeline",
    "recipe",
    "report",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "activations": ("ActivationStore", "ActivationStream", "Generation", "StoreDataset", "collect", "merge"),
        "corpus": (),
        "directions": (),
        "errors": ("InputError",),
        "evals": (),
        "hooks": (),
        "lm": ("open_model",),
        "models": ("load",),
        "models.gaussian": ("Gaussian",),
        "models.glp": ("GLP",),
        "models.neurons": ("Neurons",),
        "models.pca": ("PCA",),
        "models.random_features": ("RandomFeatures",),
        "models.raw": ("Raw",),
        "models.sae": ("SAE",),
        "pipeline": (),
        "report": (),
        "training.config": ("RunOptions", "TrainConfig", "recipe"),
    },
)
