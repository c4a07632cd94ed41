"""Models of activations behind one interface, and the registry that knows each kind by its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from glp_lens import hub
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

_RELEASED = "config.yaml"
"""What a folder in the format of the released GLPs holds instead of `config.json`."""


def model_class(kind: str) -> type[ActivationModel]:
    """The class of models of a kind.

    Raises:
        InputError: unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of model {kind!r}: expected one of {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    return getattr(import_module(module), name)


def load(folder: str | Path, *, revision: str | None = None) -> ActivationModel:
    """Load a saved model of whatever kind, including one in the released GLP format.

    Args:
        folder: a folder, or the id of a Hub repository.
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: nothing there, an unknown kind, damaged files, or no network.
    """
    path = hub.fetch(folder, [CONFIG, _RELEASED], revision=revision)
    if not (path / CONFIG).exists() and (path / _RELEASED).exists():
        return model_class("glp").from_pretrained(folder, revision=revision)
    kind = read_json(path / CONFIG, "model config").get("kind")
    if not isinstance(kind, str):
        raise InputError(f"{folder}: {CONFIG} names no kind of model: expected one of {', '.join(KINDS)}")
    return model_class(kind).from_pretrained(folder, revision=revision)
