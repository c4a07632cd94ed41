"""Check that an opened language model computes what transformers' own model does, once for each model."""

from __future__ import annotations

import json
import math
import os
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glp_lens.errors import InputError, one_line, pass_shortage
from glp_lens.lm.description import encoder_decoder
from glp_lens.lm.hook_points import outputs_of_blocks
from glp_lens.lm.protocol import Model

_VERSION = 1
_LARGEST = 1_000_000_000
"""Parameters up to which models are compared by default: two copies of a model of that size in float32 take 8 GB."""
_TOLERANCE = 1e-3
"""Relative difference in float32 that rounding may make; another convention of rotary positions makes one of 0.05."""
_TOKENS = (2, 12)
_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")
"""Ends of the names of classes in transformers that give logits of tokens."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "intermediate_size", "vocab_size")
"""What configs of transformers call numbers of layers, and widths."""


def refuse_encoder_decoder(folder: str, name: str) -> None:
    """Raises InputError if a model's folder says that it is an encoder-decoder."""
    if _config(folder).get("is_encoder_decoder"):
        raise encoder_decoder(f"model {name!r}")


def refuse_absurd(folder: str, name: str) -> None:
    """Raises InputError if a model's folder declares more than its weights hold, which is built before they are read.

    Every layer has a tensor at least, and every width is a dimension of one.
    """
    tensors, numbers = _held(Path(folder))
    config = _config(folder)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for keys, most, what in ((_DEPTHS, tensors, "tensors"), (_WIDTHS, numbers, "numbers")):
            for key in keys:
                if tensors and isinstance(size := part.get(key), int) and size > most:
                    raise InputError(f"model {name!r} declares {key}={size}, and its weights are {most:,} {what}")


def should_compare(folder: str, name: str, backend: str, check: bool | None, cache: Path) -> bool:
    """Whether to compare a model now: not if it was before, nor if it is large and the caller did not ask for it."""
    if check is None and (setting := os.environ.get("GLP_LENS_CHECK", "")):
        if setting not in ("0", "1"):
            raise InputError(f"GLP_LENS_CHECK must be 0 or 1, got {setting!r}")
        check = setting == "1"
    if check is False or _marker(folder, backend, cache).is_file():
        return False
    size = _held(Path(folder))[1] if check is None else 0
    if size > _LARGEST:
        warnings.warn(
            f"{name} was not compared with transformers' own model, being large ({size / 1e9:.1f}B parameters): open "
            "it with check=True (GLP_LENS_CHECK=1), or with check=False (GLP_LENS_CHECK=0) for no such line",
            stacklevel=5,
        )
        return False
    return True


def compare(model: Model, folder: str, name: str, backend: str, cache: Path) -> None:
    """Compare logits and the residual stream after each block with those of transformers' own model.

    Args:
        model: opened from the folder in float32, on the CPU, with raw weights.
        folder: the model in the Hugging Face layout.
        name: as the user gave it.
        backend: the TransformerLens class.
        cache: folder where agreement is recorded.

    Raises:
        InputError: they differ.
    """
    texts, length = _TOKENS
    shape = (texts, min(length, int(model.cfg.n_ctx)))
    ids = torch.randint(int(model.cfg.d_vocab), shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        try:
            want, logits = _reference(folder, int(model.cfg.n_layers), ids)
        except Exception as error:  # of remote code, missing kernels, or an architecture that transformers cannot run
            pass_shortage(error)
            warnings.warn(
                f"{name} was not compared with transformers' own model, which cannot run ({one_line(error)})",
                stacklevel=5,
            )
            return
        try:
            outputs = outputs_of_blocks(model, ids, list(want))
            own = model(ids, return_type="logits")
        except Exception as error:  # whatever a wrapped architecture runs into
            pass_shortage(error)
            line = f"model {name!r}, opened with backend={backend!r}, cannot run ({one_line(error)})"
            raise InputError(line) from error
        differences = {f"after block {i}": _difference(outputs[i], want[i]) for i in want if i in outputs}
        if logits is None:
            warnings.warn(f"{name} holds no weights of a language-model head: its activations are right, what it "
                          "generates and its loss are not", stacklevel=5)  # fmt: skip
        else:
            differences["of the logits"] = _difference(own, logits)
    # Not `>`: a NaN is a difference too.
    if wrong := [where for where, difference in differences.items() if not difference <= _TOLERANCE]:
        raise InputError(
            f"model {name!r}, opened with backend={backend!r}, computes something else than transformers does: a "
            f"relative difference {wrong[0]} of {differences[wrong[0]]:.2g}, found with transformer-lens "
            f"{metadata.version('transformer-lens')} and transformers {metadata.version('transformers')}: use the "
            "other backend or other versions, or check=False to go on all the same"
        )
    marker = _marker(folder, backend, cache)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps({"model": name, "largest difference": max(differences.values(), default=0.0)}))
    except OSError:
        return  # compared again next time


def _reference(folder: str, n_layers: int, ids: Tensor) -> tuple[dict[int, Tensor], Tensor | None]:
    """Transformers' own outputs of each block, and logits; None without weights of a head."""
    import transformers

    architectures = _config(folder).get("architectures")
    named = str(architectures[0]) if architectures and isinstance(architectures, list) else ""
    kind = getattr(transformers, named, None) if named.endswith(_HEADS) else None
    if kind is None:
        kind = transformers.AutoModelForMaskedLM if named.startswith("Bert") else transformers.AutoModelForCausalLM
    opened: Any = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    hf, loaded = opened
    hf.eval()
    lists = [m for m in hf.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n_layers]
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            outputs[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    for layer, block in enumerate(lists[0] if lists else []):
        block.register_forward_hook(keep(layer))
    logits = hf(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return outputs, None if loaded["missing_keys"] else logits


def _held(folder: Path) -> tuple[int, int]:
    """Tensors and numbers in a folder's safetensors files; 0 if they cannot be read, which opening will report."""
    shapes: list[list[int]] = []
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                shapes += [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0, 0
    return len(shapes), sum(map(math.prod, shapes))


def _difference(ours: Tensor, want: Tensor) -> float:
    """Distance between two sets of rows over the spread of the second, infinite if the shapes differ."""
    if ours.shape != want.shape:
        return float("inf")
    ours, want = ours.double().flatten(0, -2), want.double().flatten(0, -2)
    return float((ours - want).norm() / (want - want.mean(0)).norm().clamp(min=1e-30))


def _marker(folder: str, backend: str, cache: Path) -> Path:
    """The file that records agreement of these model files under these versions of the libraries."""
    root = Path(folder)
    files = sorted([root / "config.json", *root.glob("*.safetensors"), *root.glob("*.bin")])
    about: list[object] = [_VERSION, str(root.resolve()), backend]
    about += [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about += [metadata.version(package) for package in ("torch", "transformers", "transformer-lens")]
    return cache / "checked" / f"{xxhash.xxh3_128_hexdigest(json.dumps(about).encode())}.json"


def _config(folder: str) -> dict[str, Any]:
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder}: config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{folder}: config.json holds {type(config).__name__}, expected a JSON object")
    return config
