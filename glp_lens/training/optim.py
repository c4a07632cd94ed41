"""Optimisers by name, and the running average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from glp_lens.errors import InputError
from glp_lens.training import distributed
from glp_lens.training.config import TrainConfig
from glp_lens.training.mixed_precision import Linear, MixedAdamW
from glp_lens.types import Json

_EMBEDDING = "time_embed."
"""How the names of parameters begin that embed the noise level."""


def optimizers(module: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """The optimisers of a module; each parameter belongs to one of them.

    Raises:
        InputError: the installed torch has no such optimiser.
    """
    options: Json = {"lr": config.lr, "betas": (0.9, config.beta2)}
    adamw: Callable[..., Optimizer] = partial(AdamW, **options, fused=True)
    embeds = [p for name, p in module.named_parameters() if config.embed_rows and name.startswith(_EMBEDDING)]
    if config.optimizer == "adamw":
        groups = _groups(module.parameters(), embeds)
        return [MixedAdamW(module, groups, clip=config.clip, **options) if _mixed(module, config) else adamw(groups)]
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"optimizer 'muon' needs torch 2.9 or later, this is {torch.__version__}: use 'adamw'")
    inner = {name for name, p in module.named_parameters() if p.ndim == 2 and name.startswith("layers.")}
    hidden = [p for name, p in module.named_parameters() if name in inner]
    others = [p for name, p in module.named_parameters() if name not in inner]
    # Scaled to the size of AdamW's updates, so that one learning rate serves both.
    muon = torch.optim.Muon(hidden, lr=config.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(_groups(others, embeds))]


def set_rates(optimizer: Optimizer, config: TrainConfig, step: int) -> None:
    """Give an optimiser the learning rates of a step (0-based)."""
    for group, share in zip(optimizer.param_groups, (1.0, config.embed_share(step)), strict=False):
        group["lr"] = config.lr_at(step) * share


def _groups(parameters: Iterable[nn.Parameter], embeds: Sequence[nn.Parameter]) -> list[Json]:
    """Groups of an optimiser: all else, and the embedding of noise levels where it has a rate of its own."""
    own = {id(p) for p in embeds}
    groups: list[Json] = [{"params": [p for p in parameters if id(p) not in own]}]
    return [*groups, {"params": list(embeds)}] if embeds else groups


def _mixed(module: nn.Module, config: TrainConfig) -> bool:
    """Whether weights are kept in bfloat16 too: on a processor, where casting them costs as much as using them.

    Several processes exchange gradients that they find in the parameters, and parts of a batch are added in float32.
    """
    device = next(module.parameters()).device
    alone = device.type == "cpu" and not distributed.running() and config.accumulate == 1
    return config.autocast and alone and any(isinstance(layer, Linear) for layer in module.modules())


class Average:
    """Exponential moving average of a module's parameters.

    Attributes:
        values: by the name of the parameter.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}
        self._decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update the average after step `step` (0-based); the decay starts small, to forget the first weights."""
        decay = min(self._decay, (1 + step) / (10 + step))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.values.values()), list(module.parameters()), step)

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """Context in which the module has the average as weights."""
        self.swap(module)
        try:
            yield
        finally:
            self.swap(module)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the weights and the average."""
        for name, parameter in module.named_parameters():
            kept: Tensor = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name] = kept
