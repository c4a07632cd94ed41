"""Checkpoints in the format of the released GLPs: a folder of `config.yaml`, `rep_statistics.pt` and safetensors.

What the released code takes from it: `glp_kwargs` of the YAML, after `rep_statistic` at the top is replaced by the
folder's own path and all `${...}` are filled in; mean and variance of each dimension, `(d)` or `(layers, d)`; and
weights by the names of its modules, in `final.safetensors` or `checkpoints/epoch_XXXX.safetensors`.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from glp_lens.artifacts import CONFIG as OWN_CONFIG
from glp_lens.artifacts import check_provenance, read_tensors, versions, write_atomic, write_tensors
from glp_lens.errors import InputError
from glp_lens.types import Json

CONFIG = "config.yaml"
STATISTICS = "rep_statistics.pt"
_CHECKPOINT = re.compile(r"[A-Za-z0-9_-]+")
_SHAPE = ("d_input", "d_model", "d_mlp", "n_layers", "multi_layer_n_layers")
_BLOCK_ENDS = {"hook_resid_post": "output", "hook_out": "output", "hook_resid_pre": "input", "hook_in": "input"}
"""Hook points that are the output or input of a whole block, which is a module under every architecture."""


def check_checkpoint(name: str) -> str:
    """The name without the folder that the released code wants in front of it.

    Raises:
        InputError: no plain name, which could lead out of the folder.
    """
    plain = name.removeprefix("checkpoints/")
    if not _CHECKPOINT.fullmatch(plain):
        raise InputError(f"checkpoint must be a plain name such as 'final' or 'epoch_0012', got {name!r}")
    return plain


def files(checkpoint: str) -> list[str]:
    """Names of the files that make up a checkpoint, of which one of the weights is there."""
    return [CONFIG, STATISTICS, f"{checkpoint}.safetensors", f"checkpoints/{checkpoint}.safetensors"]


def read(folder: Path, checkpoint: str) -> tuple[Json, dict[str, Tensor], Tensor, Tensor, Json]:
    """Denoiser config, weights, mean, variance, and provenance of a released checkpoint.

    The YAML's `${...}` interpolations are left as they are: what they point to is not read here.

    Raises:
        InputError: files missing or not in the released format.
    """
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        denoiser = dict(config["glp_kwargs"]["denoiser_config"])
        trace = dict(config["glp_kwargs"].get("tracedict_config") or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} is not the config of a released GLP ({error!r})") from None
    weights = folder / f"{checkpoint}.safetensors"
    if checkpoint != "final" and not weights.is_file():
        weights = folder / "checkpoints" / f"{checkpoint}.safetensors"
    if not weights.is_file():
        there = sorted(path.stem for path in _weights(folder))
        known = f": there are {', '.join(there)}" if there else ""
        raise InputError(f"checkpoint {checkpoint!r} is not in {folder}{known}")
    mean, var = _statistics(folder / STATISTICS)
    shape = {name: denoiser[name] for name in _SHAPE if name in denoiser}
    if shape.get("multi_layer_n_layers") is None and mean.ndim == 2 and len(mean) == 1:
        mean, var = mean[0], var[0]
    return shape, read_tensors(weights), mean, var, _provenance(config, trace)


def _weights(folder: Path) -> list[Path]:
    """The weights of all checkpoints in a folder."""
    return [*folder.glob("*.safetensors"), *folder.glob("checkpoints/*.safetensors")]


def _statistics(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and variance; NaN only in whole rows of both, layers that a prior was not trained on."""
    try:
        statistics = torch.load(path, map_location="cpu", weights_only=True)
        mean, var = statistics["mean"].float(), statistics["var"].float()
    except Exception as error:  # damaged bytes fail in the reader of archives, of pickles or of text, each in its way
        line = str(error).splitlines()[0] if str(error) else repr(error)
        raise InputError(f"{path} does not hold a mean and a var ({line})") from None
    usable = mean.isfinite() & var.isfinite() & (var >= 0) if mean.shape == var.shape else torch.tensor(True)
    absent = (mean.isnan() & var.isnan()).all(-1, keepdim=True) if mean.ndim == 2 == var.ndim else False
    if not bool((usable | absent).all()):
        raise InputError(f"{path} is damaged: expected finite means, and finite variances of at least 0")
    return mean, var


def write(
    folder: Path,
    checkpoint: str,
    denoiser: Json,
    tensors: dict[str, Tensor],
    mean: Tensor,
    var: Tensor,
    provenance: Json,
    layer_prefix: str,
) -> None:
    """Write a checkpoint that the released code reads, beside others of the same prior.

    Args:
        denoiser: shape of the network.
        tensors: its weights, with `model.` before each name.
        provenance: kept under a key of its own, which the released code passes over.
        layer_prefix: what the list of blocks is called in the language model as transformers has it.

    Raises:
        InputError: a prior that the format has no place for, or a folder with a model in the other format or with
            checkpoints of another prior.
    """
    if denoiser.get("d_condition") is not None:
        raise InputError(
            "the released format has no place for a prior conditioned on a vector: use save_pretrained, or train "
            "without a condition"
        )
    store = provenance.get("store") or {}
    processing = (store.get("model") or {}).get("weight_processing")
    if processing not in (None, "raw"):
        raise InputError(
            f"the released format is for the language model's raw weights, this prior was trained with {processing} "
            "ones: use save_pretrained"
        )
    if (folder / OWN_CONFIG).exists():
        raise InputError(f"{folder} holds a model in this library's own format: choose another folder")
    kwargs: Json = {
        "normalizer_config": {"rep_statistic": "${rep_statistic}"},
        "denoiser_config": {name: denoiser.get(name) for name in _SHAPE},
    }
    if hooks := [store["hook"]] if store.get("hook") else list(store.get("hooks") or ()):
        kwargs["tracedict_config"] = _trace(hooks, layer_prefix)
    config = {
        "model_name": str((store.get("model") or {}).get("name") or "").partition(" (")[0],
        "rep_statistic": STATISTICS,
        "glp_kwargs": kwargs,
        "glp_lens": {"provenance": provenance, "versions": versions()},
    }
    statistics = io.BytesIO()
    torch.save({"mean": mean.detach().cpu().clone(), "var": var.detach().cpu().clone()}, statistics)
    weights = folder / ("final.safetensors" if checkpoint == "final" else f"checkpoints/{checkpoint}.safetensors")
    others = [path for path in _weights(folder) if path != weights]
    if others and (folder / STATISTICS).exists():
        pairs = zip(_statistics(folder / STATISTICS), (mean.cpu(), var.cpu()), strict=True)
        if not all(old.numel() == new.numel() and old.allclose(new.view_as(old), equal_nan=True) for old, new in pairs):
            raise InputError(f"{folder} holds {others[0].name} of a prior of other data: choose another folder")
    write_tensors(weights, tensors)
    write_atomic(folder / STATISTICS, statistics.getvalue())
    write_atomic(folder / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _trace(hooks: list[str], layer_prefix: str) -> Json:
    """Hook points as modules of the language model in transformers, and which end of them is meant."""
    found = [re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook) for hook in hooks]
    ends = {_BLOCK_ENDS.get(match[2]) if match else None for match in found}
    if len(ends) != 1 or None in ends:
        raise InputError(
            "the released format has the inputs or the outputs of whole blocks, such as blocks.7.hook_resid_post, got "
            f"{', '.join(hooks)}: use save_pretrained"
        )
    return {"layer_prefix": layer_prefix, "layers": [int(match[1]) for match in found if match], "retain": ends.pop()}


def _provenance(config: Json, trace: Json) -> Json:
    """What this library wrote down, or else what the config says of the data in the terms of a store's provenance."""
    own = config.get("glp_lens")
    if isinstance(own, dict) and own.get("provenance"):
        return check_provenance(own.get("provenance"), CONFIG)
    prefix, layers = trace.get("layer_prefix"), trace.get("layers") or []
    names = [f"{prefix}.{layer}" if prefix else str(layer) for layer in layers] if isinstance(layers, list) else []
    blocks = [re.fullmatch(r"(?:\w+\.)*(\d+)", name) for name in names]
    end = {"output": "hook_resid_post", "input": "hook_resid_pre"}.get(str(trace.get("retain", "output")))
    origin: Json = {"model": {"name": config.get("model_name"), "weight_processing": "raw"}}
    hooks: list[Any] = [f"blocks.{block[1]}.{end}" for block in blocks if block and end]
    if len(hooks) == len(names) == 1:
        origin["hook"] = hooks[0]
    elif hooks and len(hooks) == len(names):
        origin["hooks"] = {hook: {} for hook in hooks}
    return {"store": origin}
