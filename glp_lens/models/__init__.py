"""Models of activations behind one interface, and the registry that knows each kind by its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from glp_lens.artifacts import CONFIG, ActivationModel, read_json
from glp_lens.errors import InputError

KINDS = {
    "glp": "glp_lens.models.glp:GLP",
    "sae": "glp_lens.models.sae:SAE",
    "pca": "glp_lens.models.pca:PCA",
    "gaussian": "glp_lens.models.gaussian:Gaussian",
    "raw": "glp_lens.models.raw:Raw",
}
"""Kind, as `config.json` writes it, to `module:class`; a module is imported when its kind is asked for."""

_RELEASED = ("config.yaml", "final.safetensors")
"""What a folder holds in the format of the released GLPs."""


def model_class(kind: str) -> type[ActivationModel]:
    """The class of models of a kind.

    Raises:
        InputError: unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of model {kind!r}: expected one of {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    return getattr(import_module(module), name)


def load(folder: str | Path) -> ActivationModel:
    """Load a saved model of whatever kind, including a folder in the released GLP format.

    Raises:
        InputError: nothing there, an unknown kind, or damaged files.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists() and all((folder / name).exists() for name in _RELEASED):
        return model_class("glp").from_pretrained(folder)
    kind = read_json(folder / CONFIG, "model config").get("kind")
    if not isinstance(kind, str):
        raise InputError(f"{folder / CONFIG} names no kind of model: expected one of {', '.join(KINDS)}")
    return model_class(kind).from_pretrained(folder)
