"""Saving, loading and publishing trained models: a folder of `config.json`, safetensors, and where they came from."""

from __future__ import annotations

import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import xxhash
from torch import Tensor

from glp_lens import hub, numerics
from glp_lens.errors import InputError
from glp_lens.files import read_json, read_tensors, versions, write_json, write_tensors
from glp_lens.types import Json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def check_provenance(value: Any, where: str) -> Json:
    """Provenance as a file has it, none as an empty one.

    Raises:
        InputError: it, or what it says of the store or the training, is no JSON object.
    """
    found = value or {}
    if not isinstance(found, dict) or any(not isinstance(found.get(k) or {}, dict) for k in ("store", "training")):
        raise InputError(f"{where} is damaged: expected objects as provenance and its store and training")
    return found


class ActivationModel(ABC):
    """A trained model of activations: what every kind has in common.

    Attributes:
        d_in: width of the activations.
        provenance: JSON-like; `store` says which rows of which corpus through which language model and
            hook point the model saw, `training` how much compute it got.
    """

    kind: ClassVar[str]
    d_in: int
    provenance: Json

    @property
    def hook(self) -> str | None:
        """The hook point that the training activations came from."""
        return (self.provenance.get("store") or {}).get("hook")

    @property
    def hook_names(self) -> list[str]:
        """All names of that hook point in the language model that it was collected from, where they are known."""
        names = (self.provenance.get("store") or {}).get("hook_names") or ()
        return list(names) if self.hook in names else []

    @property
    def max_norm(self) -> float | None:
        """Norm above which rows were left out of the training store as massive activations."""
        return (self.provenance.get("store") or {}).get("max_norm")

    @abstractmethod
    def _config(self) -> Json:
        """What `_restore` needs besides the weights."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The weights."""

    @classmethod
    @abstractmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        """The model of `_config()` and `_tensors()`; KeyError, ValueError or TypeError if they do not fit."""

    @numerics.own()
    def to(self, device: str | torch.device) -> Self:
        """Move the weights to a device, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor | torch.nn.Module):
                setattr(self, name, value.to(device))
        return self

    def fingerprint(self) -> str:
        """Hash of kind, settings, provenance and weights: of all that the model's results depend on."""
        about = [self.kind, self.hook, self._config(), self.provenance]
        digest = xxhash.xxh3_128(json.dumps(about, default=str).encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model to `folder`, replacing a model saved there before."""
        folder = Path(folder)
        write_tensors(folder / WEIGHTS, self._tensors())
        write_json(folder / CONFIG, self._about())
        return folder

    @classmethod
    @numerics.own()
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> Self:
        """Load a model that `save_pretrained` or `push_to_hub` wrote.

        Args:
            folder: a folder, or the id of a Hub repository.
            revision: branch, tag or commit of the repository.

        Raises:
            InputError: nothing there, another kind of model, damaged files, or no network.
        """
        path = hub.fetch(folder, [CONFIG, WEIGHTS], revision=revision)
        config = read_json(path / CONFIG, "model config")
        if config.get("kind") != cls.kind:
            raise InputError(f"{folder} holds a model of kind {config.get('kind')!r}, expected {cls.kind!r}")
        try:
            model = cls._restore(config["model"], read_tensors(path / WEIGHTS))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{folder}: config and weights do not fit together ({error})") from None
        model.provenance = check_provenance(config.get("provenance"), f"{folder}: {CONFIG}")
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        license: str | None = None,
        format: str = "own",
        layer_prefix: str | None = None,
    ) -> str:
        """Publish the model with a model card in a Hub repository, in place of one pushed there before.

        Args:
            repo_id: `owner/name`, or a name of your own; created if it is not there.
            private: whether a new repository is private.
            revision: branch to push to, created if it is not there.
            token: by default that of `hf auth login` or HF_TOKEN.
            license: for the card, a name of the Hub's list such as `mit`.
            format: `own`; for a GLP also `released`, which the released GLP code reads.
            layer_prefix: of `released`, as in `GLP.save_released`.

        Returns:
            Address of the commit.

        Raises:
            InputError: malformed id, a format that is unknown or has no place for the model, no network, or no right
                to write.
        """
        hub.check_id(repo_id)
        writers = self._writers()
        if format not in writers:
            raise InputError(f"format of a {self.kind} must be one of {', '.join(writers)}, got {format!r}")
        if layer_prefix is not None and format != "released":
            raise InputError(f"layer_prefix is of the released format, got format {format!r}: leave it out")
        options = {} if layer_prefix is None else {"layer_prefix": layer_prefix}
        with tempfile.TemporaryDirectory() as folder:
            writers[format](Path(folder), **options)
            card = hub.card(self._about(), repo_id, license=license, released=format == "released")
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return hub.push(
                Path(folder),
                repo_id,
                private=private,
                revision=revision,
                token=token,
                message=commit_message or f"Upload {self.kind} with glp-lens",
                # Files of the other format would be what is loaded.
                replaced=["*.safetensors", "config.json", "config.yaml", "rep_statistics.pt", "final"],
            )

    def _writers(self) -> dict[str, Callable[..., Path]]:
        """What writes the model to a folder, by the name of the format."""
        return {"own": self.save_pretrained}

    def _about(self) -> Json:
        """The content of `config.json`."""
        return {
            "format": 1,
            "kind": self.kind,
            "d_in": self.d_in,
            "model": self._config(),
            "provenance": self.provenance,
            "versions": versions(),
        }
