"""The base class of models: saving, loading and publishing a folder of `config.json` and safetensors."""

from __future__ import annotations

import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import xxhash
from torch import Tensor

from glp_lens import hub, numerics
from glp_lens.arguments import checked
from glp_lens.errors import InputError, one_line, pass_shortage
from glp_lens.files import Kind, is_number, read_json, read_tensors, versions, write_json, write_tensors
from glp_lens.types import Json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CONFIG_FILE = Kind("model config", "save, copy or download the model again")
WEIGHTS_FILE = Kind("weights", "save, copy or download the model again", quiet=True)
"""Of weights of earlier versions it is the config beside them that is said to be unchecked."""

_STORE = {
    "hook": "text", "hook_names": "texts", "cautions": "texts", "hooks": "object", "model": "object",
    "corpus": "object", "excluded": "counts", "opened_with": "object", "max_norm": "number", "d_in": "number",
    "rows": "number",
}  # fmt: skip
_MODEL = {"name": "text", "weight_processing": "text", "blocks": "text", "n_layers": "number", "d_model": "number"}
_TRAINING = dict.fromkeys(("rows_seen", "rows_distinct", "parameters", "flops", "seconds", "seed"), "number")
"""What the entries of provenance that the code reads are, where they are known."""


def check_provenance(value: Any, where: str) -> Json:
    """Provenance that was read from a file; an empty one if there is none.

    Raises:
        InputError: it, its parts or their entries are not of the types that they were written with.
    """
    value = value or {}
    if not isinstance(value, dict) or any(not isinstance(value.get(k) or {}, dict) for k in ("store", "training")):
        raise InputError(f"{where} is damaged: expected objects as provenance and its store and training")
    store, training = value.get("store") or {}, value.get("training") or {}
    hooks = store.get("hooks") or {}
    for known in [store, *(hooks.values() if isinstance(hooks, dict) else [hooks])]:
        strange = _strange(known, _STORE) if isinstance(known, dict) else "its hooks are no objects"
        strange = strange or _strange(known.get("model") or {}, _MODEL) or _strange(training, _TRAINING)
        if strange:
            raise InputError(f"the provenance in {where} is damaged: {strange}")
    return value


def _strange(known: Json, entries: Mapping[str, str]) -> str:
    """The first entry that is known and not what it must be, in words; empty if there is none."""
    for name, what in entries.items():
        value = known.get(name)
        fits = {
            "text": isinstance(value, str),
            "texts": isinstance(value, list) and all(isinstance(text, str) for text in value),
            "object": isinstance(value, dict),
            "counts": isinstance(value, dict) and all(map(is_number, value.values())),
            "number": is_number(value),
        }
        if value is not None and not fits[what]:
            return f"its {name} is {str(value)[:60]!r}"
    return ""


def plain_texts(value: object) -> dict[str, str]:
    """The texts of a mapping that a file gives, by name; nothing of another value."""
    known = value.items() if isinstance(value, dict) else ()
    return {str(name): text for name, text in known if isinstance(text, str)}


def check_shapes(tensors: Mapping[Any, Tensor], shapes: Mapping[Any, tuple[int | None, ...]]) -> None:
    """ValueError if a tensor, where it is there, has another shape."""
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)}, expected {shape}")


class ActivationModel(ABC):
    """A trained model of activations: what every kind has in common.

    Attributes:
        kind: name of the kind in the registry, `glp_lens.kinds.KINDS`.
        d_in: width of the activations.
        provenance: JSON-like; `store` is where the training activations came from (corpus, language model, hook
            point), `training` how many rows the model saw and what that cost.
        saved_with: versions of the packages that wrote the files it was loaded from, empty where they do not say; None
            of a model that was trained or made here.
    """

    kind: ClassVar[str]
    d_in: int
    provenance: Json
    saved_with: Json | None = None

    def __repr__(self) -> str:
        about = (self.provenance.get("store") or {}).get("model") or {}
        known = {"d_in": self.d_in, "hook": self.hook, "model": about.get("name")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in known.items() if v is not None)})"

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
        """Norm above which activations count as massive and were left out of training."""
        return (self.provenance.get("store") or {}).get("max_norm")

    @abstractmethod
    def _config(self) -> Json:
        """What `_restore` needs besides the weights, as JSON."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """The weights."""

    @classmethod
    @abstractmethod
    def _restore(cls, config: Json, tensors: dict[str, Tensor]) -> Self:
        """The model of `_config()` and `_tensors()`; KeyError, ValueError or TypeError if they do not fit."""

    def _record_fit(
        self, store: Json, *, rows: int, flops: float, began: float, seed: int, parameters: int | None = None
    ) -> Self:
        """Write the provenance of a fit in closed form; gives the model.

        Args:
            store: provenance of the store.
            rows: that were read, each once.
            flops: floating-point operations.
            began: `time.perf_counter()` at the start.
            parameters: by default the numbers in `_tensors`.
        """
        if parameters is None:
            parameters = sum(tensor.numel() for tensor in self._tensors().values())
        training = {"rows_seen": rows, "rows_distinct": rows, "parameters": parameters, "flops": flops}
        training |= {"seconds": time.perf_counter() - began, "seed": seed}
        self.provenance = {"store": store, "training": training}
        return self

    @numerics.own()
    @checked
    def to(self, device: str | torch.device) -> Self:
        """Move the weights to a device, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor | torch.nn.Module):
                setattr(self, name, value.to(device))
        return self

    def fingerprint(self) -> str:
        """Hash of everything that the model's results depend on: kind, settings, provenance and weights."""
        # Two layers of a prior that knows no hook points differ in nothing else.
        layer = getattr(self, "layer", None)
        about = [self.kind, layer if self.hook is None else self.hook, self._config(), self.provenance]
        return self._hash(json.dumps(about, default=str))

    def weights_hash(self) -> str:
        """Hash of kind and weights alone: that of a training that is repeated to the same numbers is the same."""
        return self._hash(self.kind)

    def _hash(self, about: str) -> str:
        digest = xxhash.xxh3_128(about.encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @checked
    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model to `folder`, replacing a model saved there before."""
        folder = Path(folder)
        digest = write_tensors(folder / WEIGHTS, self._tensors(), WEIGHTS_FILE)
        write_json(folder / CONFIG, {**self._about(), "weights": digest}, CONFIG_FILE)
        return folder

    @classmethod
    @numerics.own()
    @checked
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> Self:
        """Load a model that `save_pretrained` or `push_to_hub` wrote.

        Args:
            folder: a folder, or the id of a Hub repository.
            revision: branch, tag or commit of the repository.

        Raises:
            InputError: nothing there, another kind of model, damaged files, or no network.
        """
        path = hub.fetch(folder, [CONFIG, WEIGHTS], revision=revision)
        config = read_json(path / CONFIG, CONFIG_FILE)
        if config.get("kind") != cls.kind:
            raise InputError(f"{folder} holds a model of kind {config.get('kind')!r}, expected {cls.kind!r}")
        try:
            model = cls._restore(config["model"], read_tensors(path / WEIGHTS, WEIGHTS_FILE, config.get("weights")))
        except InputError:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
            pass_shortage(e)
            raise InputError(f"{folder}: config and weights do not fit together ({one_line(e)})") from None
        model.provenance = check_provenance(config.get("provenance"), f"{folder}: {CONFIG}")
        model.saved_with = plain_texts(config.get("versions"))
        return model

    @checked
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
        sections: Mapping[str, str] | None = None,
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
            sections: further sections of the card, such as `glp_lens.pipeline.card_sections` makes of results.

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
            card = self.card(repo_id, license=license, released=format == "released", sections=sections)
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

    def card(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        released: bool = False,
        sections: Mapping[str, str] | None = None,
    ) -> str:
        """The model card, as `push_to_hub` publishes it: Markdown under a header that the Hub reads.

        Args:
            repo_id: what its example loads: an id on the Hub, or a folder.
            license: a name of the Hub's list such as `mit`.
            released: whether the files are in the format of the released GLPs.
            sections: what else is told, Markdown by title.
        """
        about = self._about()
        if self.saved_with is not None:  # what is installed where the card is written made nothing of the model
            about["versions"] = self.saved_with
        return hub.card(about, repo_id, license=license, released=released, sections=sections)

    def _writers(self) -> dict[str, Callable[..., Path]]:
        """Functions that write the model to a folder, by the name of the format."""
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
