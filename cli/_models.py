"""The trained models and the language model that the suites' commands are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens_cli._app import split

if TYPE_CHECKING:
    from glp_lens import lm
    from glp_lens.artifacts import ActivationModel


def load(models: str, device: str) -> dict[str, ActivationModel]:
    """Trained models by label: the name given, or the name of the folder."""
    from glp_lens import models as registry
    from glp_lens.errors import InputError
    from glp_lens.lm import check_device

    check_device(device)
    found: dict[str, ActivationModel] = {}
    for item in split(models):
        name, _, folder = item.rpartition("=")
        label = name or Path(folder).name
        if label in found:
            raise InputError(f"two models are called {label!r}: name them, --models a=folder1,b=folder2")
        found[label] = registry.load(folder).to(device)
    if not found:
        raise InputError("--models needs at least one folder of a trained model")
    return found


def bound(trained: dict[str, ActivationModel], hook: str) -> dict[str, ActivationModel]:
    """The models as they are used at a hook point: of multi-layer priors, the layer."""
    from glp_lens import provenance

    return {label: provenance.bound(model, hook) for label, model in trained.items()}


def open_lm(
    name: str, hook: str | None, backend: str, dtype: str, device: str, trained: dict[str, ActivationModel]
) -> tuple[lm.Model, str]:
    """The language model, and the hook point: the one asked for, else the one the models were trained at."""
    from glp_lens import lm

    model = lm.open_model(name, device=device, dtype=dtype, backend=backend)  # type: ignore[arg-type]
    known = [m.hook for m in trained.values() if m.hook]
    return model, lm.check_hook(model, hook or (known[0] if known else lm.default_hook(model)))
