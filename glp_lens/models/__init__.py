"""Models of activations behind one interface, and loading any of them by its folder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from glp_lens import hub
from glp_lens.arguments import checked
from glp_lens.artifacts import CONFIG, CONFIG_FILE, ActivationModel
from glp_lens.errors import InputError
from glp_lens.files import read_json
from glp_lens.kinds import KINDS, kind_of

_RELEASED = "config.yaml"
"""What a folder in the format of the released GLPs holds instead of `config.json`."""
_SAE_LENS = ("cfg.json", "sae_weights.safetensors")
"""What a folder that sae-lens saved holds."""
_PUBLISHED = "sae-lens:"
"""How the name of an autoencoder that sae-lens knows begins."""


def model_class(kind: str) -> type[ActivationModel]:
    """The class of models of a kind.

    Raises:
        InputError: unknown kind.
    """
    module, name = kind_of(kind).model.split(":")
    cls: type[ActivationModel] = getattr(import_module(module), name)
    return cls


@checked
def load(folder: str | Path, *, revision: str | None = None) -> ActivationModel:
    """Load a saved model of whatever kind, including GLPs in the released format and autoencoders of sae-lens.

    Args:
        folder: a folder, or the id of a Hub repository; `sae-lens:RELEASE:SAE_ID` is an autoencoder that
            `sae_lens.SAE.from_pretrained` can load.
        revision: branch, tag or commit of the repository.

    Raises:
        InputError: nothing there, an unknown kind, damaged files, or no network.
    """
    if str(folder).startswith(_PUBLISHED):
        return _published(str(folder), revision)
    path = hub.fetch(folder, [CONFIG, _RELEASED, _SAE_LENS[0]], revision=revision)
    if not (path / CONFIG).exists():
        if (path / _RELEASED).exists():
            return model_class("glp").from_pretrained(folder, revision=revision)
        if (path / _SAE_LENS[0]).exists():
            from glp_lens.models.sae import SAE

            return SAE.from_sae_lens(hub.fetch(folder, _SAE_LENS, revision=revision))
    kind = read_json(path / CONFIG, CONFIG_FILE).get("kind")
    if not isinstance(kind, str):
        raise InputError(f"{folder}: {CONFIG} names no kind of model: expected one of {', '.join(KINDS)}")
    return model_class(kind).from_pretrained(folder, revision=revision)


def _published(name: str, revision: str | None) -> ActivationModel:
    """The autoencoder that `sae-lens:RELEASE:SAE_ID` names."""
    from glp_lens.models.sae import SAE

    release, _, sae_id = name.removeprefix(_PUBLISHED).partition(":")
    if not release or not sae_id:
        raise InputError(f"expected sae-lens:RELEASE:SAE_ID, got {name!r}")
    if revision is not None:
        raise InputError(f"sae-lens loads no revision of its releases, got {revision!r}: leave it out")
    return SAE.from_sae_lens(release, sae_id)
