"""The registry of the kinds of models: one row each. Light to import: the classes are named, not imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from glp_lens.errors import InputError
from glp_lens.limits import MASSIVE
from glp_lens.settings import Settings, option
from glp_lens.training.config import DEFAULT_ROWS


def massive_rule(rule: str | float) -> float | Literal["gap"] | None:
    """`gap`, a multiple of the median norm, or None for 0: which rows count as massive activations.

    Raises:
        InputError: another text, or a number of medians that leaves out the usual rows, or none ever.
    """
    low, high = MASSIVE
    try:
        multiple = 0.0 if rule == "gap" else float(rule)
    except (ValueError, OverflowError):
        multiple = -1.0
    if multiple != 0 and not low < multiple < high:
        raise InputError(
            f"--massive takes 'gap', a number of median norms over {low:g} and under {high:g}, or 0, got {rule!r}"
        )
    return "gap" if rule == "gap" else multiple or None


@dataclass(frozen=True, kw_only=True)
class Fit(Settings):
    """Settings of training a kind of model: each field is a keyword argument of its class's `fit`."""


@dataclass(frozen=True, kw_only=True)
class GradientFit(Fit):
    """Settings of the kinds that are trained by gradient descent."""

    panel: ClassVar[str] = "Options"

    rows: int = option(DEFAULT_ROWS, min=1)
    """Activations that a GLP or SAE sees; more than the store holds means several epochs."""
    batch_size: int | None = option(None, min=1, memory=True)
    """Rows in each step; by default those of the recipe, and 512 for an SAE."""
    lr: float | None = option(None, min=0, max=1)
    """Peak learning rate; by default that of the recipe, and 2e-3 for an SAE."""
    validation: tuple[Path, ...] = option((), panel="GLP: curve and checkpoints")
    """Store of held-out activations, for the training curve of a GLP and the dead latents, L0 and error of an SAE; of
    several layers as in --store."""
    allow_mismatch: bool = option(False, panel="GLP: curve and checkpoints")
    """Accept a --validation store, or --finetune a GLP, of another hook point, language model or weight processing."""

    def __post_init__(self) -> None:
        """Check each setting.

        Raises:
            InputError: settings that no training can have.
        """
        super().__post_init__()
        if self.lr is not None and not 0 < self.lr < 1:
            raise InputError(f"lr must be between 0 and 1, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class GLPFit(GradientFit):
    """Settings of a generative latent prior: of its denoiser, of `TrainConfig`, and of `RunOptions`."""

    panel: ClassVar[str] = "GLP"

    recipe: Literal["paper", "small", "fast"] = "fast"
    """Settings of the training. 'fast': a given loss after the fewest rows (batch 256, lr 2e-3, or less for denoisers
    wider than 576); 'paper': those of the paper (lr 5e-5, batch 4096), for long runs; 'small': plain AdamW (lr 2e-3,
    batch 512)."""
    optimizer: Literal["adamw", "muon"] | None = None
    """AdamW for all weights, or Muon for the matrices inside the blocks; by default that of the recipe."""
    ema: float | None = None
    """Save an exponential moving average of the weights with this decay, such as 0.999."""
    d_model: int | None = option(None, min=1, flag="--width", memory=True)
    """Width of the denoiser; by default twice that of the activations."""
    d_mlp: int | None = option(None, min=1, flag="--mlp", memory=True)
    """Meta-neurons in each block; by default four times the width of the activations."""
    n_layers: int | None = option(None, min=1, flag="--layers", memory=True)
    """Blocks of the denoiser; by default 3."""
    finetune: str | None = None
    """Folder or Hub id of a GLP to train on from; its normaliser stays as it is."""
    checkpoint: str | None = None
    """Which checkpoint of --finetune; by default the last."""
    condition: str | None = None
    """Label of the store with the class of each row, to condition on."""
    massive: float | Literal["gap"] | None = option("gap", parse=massive_rule)
    """Which rows are massive activations, to be excluded: those beyond a gap in the norms ('gap'), or those with a norm
    over this many medians; 0 excludes none."""
    checkpoints: int = option(0, min=0, panel="GLP: curve and checkpoints")
    """Keep about this many intermediate models in OUT/checkpoints, at steps evenly spaced on a logarithmic scale."""
    logger: Literal["trackio", "wandb", "tensorboard"] | None = option(None, panel="GLP: curve and checkpoints")
    """Also send the training curve to this dashboard."""
    accumulate: int | None = option(None, min=1, panel="GLP: memory and machines")
    """Micro-batches that each step is computed in (gradient accumulation)."""
    recompute: bool = option(False, panel="GLP: memory and machines")
    """Compute activations again in the backward pass rather than keep them."""
    shard_weights: bool = option(False, panel="GLP: memory and machines")
    """Under torchrun, spread weights and optimiser states over the processes."""


@dataclass(frozen=True, kw_only=True)
class SAEFit(GradientFit):
    """Settings of a TopK sparse autoencoder."""

    panel: ClassVar[str] = "SAE"

    n_latents: int | None = option(None, min=1, flag="--latents", memory=True)
    """Dictionary size; by default four times the width of the activations."""
    k: int = option(32, min=1)
    """Latents active on each row."""


@dataclass(frozen=True, kw_only=True)
class PCAFit(Fit):
    """Settings of principal components."""

    panel: ClassVar[str] = "PCA"

    n_components: int | None = option(None, min=1, flag="--components")
    """Components kept; by default all."""
    standardize: bool = True
    """Scale each dimension to variance 1 first."""


@dataclass(frozen=True, kw_only=True)
class RandomFit(Fit):
    """Settings of random features."""

    panel: ClassVar[str] = "RANDOM"

    n_features: int | None = option(None, min=1, flag="--features", memory=True)
    """Number of random features; by default four times the width of the activations."""


@dataclass(frozen=True)
class Kind:
    """The registry's row of a kind of model.

    Attributes:
        model: `module:class`, imported when it is asked for.
        title: name in reports.
        color, marker: of its plots: one of Okabe and Ito's colours, which stay apart under the common colour
            blindnesses, and a matplotlib marker.
        card: first sentence of its model card, up to the width of the activations.
        fit: its settings; None if it needs no training.
        streams: whether it can be trained on a stream, which is read once.
    """

    model: str
    title: str
    color: str
    marker: str
    card: str
    fit: type[Fit] | None = Fit
    streams: bool = False


KINDS = {
    "glp": Kind(
        "glp_lens.models.glp:GLP",
        "GLP",
        "#d55e00",
        "o",
        "A generative latent prior ([Luo et al., 2026](https://arxiv.org/abs/2602.06964)), a diffusion model of a "
        "language model's activations",
        GLPFit,
        streams=True,
    ),
    "sae": Kind(
        "glp_lens.models.sae:SAE",
        "SAE",
        "#0072b2",
        "s",
        "A sparse autoencoder of a language model's activations",
        SAEFit,
        streams=True,
    ),
    "pca": Kind(
        "glp_lens.models.pca:PCA",
        "PCA",
        "#009e73",
        "^",
        "Principal components of a language model's activations",
        PCAFit,
    ),
    "gaussian": Kind(
        "glp_lens.models.gaussian:Gaussian",
        "Gaussian",
        "#cc79a7",
        "D",
        "A Gaussian fitted to a language model's activations",
    ),
    "raw": Kind(
        "glp_lens.models.raw:Raw",
        "raw activations",
        "#b09c00",
        "v",
        "Activations of a language model, kept as a baseline",
    ),
    "random": Kind(
        "glp_lens.models.random_features:RandomFeatures",
        "random features",
        "#8c8c8c",
        "X",
        "Random features of a language model's activations, a control",
        RandomFit,
    ),
    "neurons": Kind(
        "glp_lens.models.neurons:Neurons",
        "MLP neurons",
        "#8a63c4",
        "<",
        "The MLP neurons of a language model, a baseline",
        None,
    ),
}
"""Kinds by name, as `config.json` has it, in the order of reports."""


def kind_of(name: str) -> Kind:
    """The row of a kind.

    Raises:
        InputError: unknown kind.
    """
    if name not in KINDS:
        raise InputError(f"unknown kind of model {name!r}: expected one of {', '.join(KINDS)}")
    return KINDS[name]
