"""Reading checkpoints in the format of the released GLPs, from a folder or the Hugging Face Hub."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from glp_lens.artifacts import WEIGHTS, read_tensors
from glp_lens.errors import InputError
from glp_lens.types import Json

CONFIG = "config.yaml"
STATISTICS = "rep_statistics.pt"
_CHECKPOINT = re.compile(r"[A-Za-z0-9_-]+")
_SHAPE = ("d_input", "d_model", "d_mlp", "n_layers", "multi_layer_n_layers")


def fetch(name: str, checkpoint: str) -> Path:
    """The folder of that name, or of the Hub repository of that id, with one checkpoint downloaded.

    Raises:
        InputError: neither is there, or a checkpoint name that is no plain name.
    """
    if not _CHECKPOINT.fullmatch(checkpoint):
        raise InputError(f"checkpoint must be a plain name such as 'final' or 'epoch_0012', got {checkpoint!r}")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"model folder {name!r} does not exist")
    from huggingface_hub import snapshot_download

    weights = [WEIGHTS, f"{checkpoint}.safetensors", f"checkpoints/{checkpoint}.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=["*.yaml", "*.json", STATISTICS, *weights], etag_timeout=10))
    except Exception as error:  # a missing network, a proxy and the Hub each fail with errors of their own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{name!r} is no folder and cannot be fetched from the Hub ({reason})") from None


def read(folder: Path, checkpoint: str) -> tuple[Json, dict[str, Tensor], Tensor, Tensor, Json]:
    """Denoiser config, weights, mean, variance, and origin of a released checkpoint.

    The YAML's `${...}` interpolations are left as they are: only `glp_kwargs` matters here.

    Raises:
        InputError: files missing or not in the released format.
    """
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        denoiser = dict(config["glp_kwargs"]["denoiser_config"])
        trace = config["glp_kwargs"].get("tracedict_config") or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / CONFIG} is not the config of a released GLP ({error!r})") from None
    weights = folder / f"{checkpoint}.safetensors"
    if checkpoint != "final" and not weights.is_file():
        weights = folder / "checkpoints" / f"{checkpoint}.safetensors"
    if not weights.is_file():
        there = sorted(p.stem for p in [*folder.glob("*.safetensors"), *folder.glob("checkpoints/*.safetensors")])
        raise InputError(f"checkpoint {checkpoint!r} is not in {folder}: there are {', '.join(there) or 'none'}")
    try:
        statistics = torch.load(folder / STATISTICS, map_location="cpu", weights_only=True)
        mean, var = statistics["mean"].float(), statistics["var"].float()
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        line = str(error).splitlines()[0] if str(error) else repr(error)
        raise InputError(f"{folder / STATISTICS} does not hold a mean and a var ({line})") from None
    shape = {name: denoiser[name] for name in _SHAPE if name in denoiser}
    if shape.get("multi_layer_n_layers") is None and mean.ndim == 2 and len(mean) == 1:
        mean, var = mean[0], var[0]
    return shape, read_tensors(weights), mean, var, _origin(config, trace)


def _origin(config: Json, trace: Json) -> Json:
    """What the config says of the data, in the terms of a store's provenance."""
    layers: list[Any] = list(trace.get("layers") or [])
    origin: Json = {"model": {"name": config.get("model_name"), "weight_processing": "raw"}}
    if len(layers) == 1 and trace.get("retain", "output") == "output":
        origin["hook"] = f"blocks.{layers[0]}.hook_resid_post"
    return origin
