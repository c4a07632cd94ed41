"""Checkpoints in the format of the released GLPs: a folder of `config.yaml`, `rep_statistics.pt` and safetensors.

The released code reads: `glp_kwargs` of the YAML, after `rep_statistic` at the top is replaced by the folder's path and
all `${...}` are interpolated; mean and variance of each dimension, `(d)` or `(layers, d)`; and weights by the names of
its modules, in `final.safetensors` or `checkpoints/epoch_XXXX.safetensors`. It takes the path for a Hub id unless the
folder has a file with the checkpoint's bare name (`final`), so one is written.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from glp_lens.artifacts import CONFIG as OWN_CONFIG
from glp_lens.artifacts import CONFIG_FILE, WEIGHTS_FILE, check_provenance, plain_texts
from glp_lens.errors import InputError, first_line, pass_shortage
from glp_lens.files import ENTRY, check, check_archive, read_tensors, sealed, versions, write_atomic, write_tensors
from glp_lens.types import Json
from glp_lens.yaml_files import read_yaml, to_yaml

CONFIG = "config.yaml"
STATISTICS = "rep_statistics.pt"
_CHECKPOINT = re.compile(r"[A-Za-z0-9_-]+")
_SHAPE = ("d_input", "d_model", "d_mlp", "n_layers", "multi_layer_n_layers")
_NORMALIZER = ("rep_statistic",)
_ENTRY = "The released GLP code looks for this file before it asks the Hub. The weights are in {}.\n"
_BLOCK_ENDS = {"hook_resid_post": "output", "hook_out": "output", "hook_resid_pre": "input", "hook_in": "input"}
"""Hook points that are the output or input of a whole block, which is a module under every architecture."""


def check_checkpoint(name: str) -> str:
    """The name without the folder that the released code expects in front of it.

    Raises:
        InputError: no plain name, which could point outside of the folder.
    """
    plain = name.removeprefix("checkpoints/")
    if not _CHECKPOINT.fullmatch(plain):
        raise InputError(f"checkpoint must be a plain name such as 'final' or 'epoch_0012', got {name!r}")
    return plain


def files(checkpoint: str) -> list[str]:
    """Names of the files of a checkpoint; the weights are in one of the last two."""
    return [CONFIG, STATISTICS, f"{checkpoint}.safetensors", f"checkpoints/{checkpoint}.safetensors"]


def read(folder: Path, checkpoint: str) -> tuple[Json, dict[str, Tensor], Tensor, Tensor, Json, Json]:
    """Denoiser config, weights, mean, variance, provenance, and versions that wrote it, of a released checkpoint.

    The YAML's `${...}` interpolations are left as they are: what they point to is not read here.

    Raises:
        InputError: files missing or not in the released format.
    """
    config = read_yaml(folder / CONFIG, "config of a released GLP", tags=True)
    try:
        denoiser = dict(config["glp_kwargs"]["denoiser_config"])
        normalizer = dict(config["glp_kwargs"].get("normalizer_config") or {})
        trace = dict(config["glp_kwargs"].get("tracedict_config") or {})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"{folder / CONFIG} is not the config of a released GLP ({line})") from None
    if strange := [*(denoiser.keys() - set(_SHAPE)), *(normalizer.keys() - set(_NORMALIZER))]:
        raise InputError(
            f"{folder / CONFIG} sets {strange[0]!r}, which the released code does not know and refuses too"
        )
    weights = _weights_of(folder, checkpoint)
    if not weights.is_file():
        there = sorted(path.stem for path in _weights(folder))
        known = f": there are {', '.join(there)}" if there else ""
        raise InputError(f"checkpoint {checkpoint!r} is not in {folder}{known}")
    mean, var = _statistics(folder / STATISTICS, _check(folder / CONFIG, config))
    depth = denoiser.get("multi_layer_n_layers")
    if depth is None and mean.ndim == 2 and len(mean) == 1:
        mean, var = mean[0], var[0]
    if depth == 1 and ENTRY not in config:
        raise InputError(f"{folder / CONFIG} has multi_layer_n_layers 1, for which the released code gives NaN")
    own = config.get(ENTRY)
    saved_with = plain_texts(own.get("versions") if isinstance(own, dict) else None)
    return denoiser, read_tensors(weights, WEIGHTS_FILE), mean, var, _provenance(config, trace), saved_with


def _weights_of(folder: Path, checkpoint: str) -> Path:
    """Path of a checkpoint's weights; the released code saves checkpoints named by steps beside `final`."""
    beside = folder / f"{checkpoint}.safetensors"
    if checkpoint == "final" or beside.is_file():
        return beside
    return folder / "checkpoints" / beside.name


def _weights(folder: Path) -> list[Path]:
    """The weights of all checkpoints in a folder."""
    return [*folder.glob("*.safetensors"), *folder.glob("checkpoints/*.safetensors")]


def _check(path: Path, config: Json) -> str | None:
    """Check the digest of a config that this library wrote; gives that of the statistics, if it says one."""
    own = config.get(ENTRY)
    entry: Json = own if isinstance(own, dict) else {}
    # Configs of other programs never have one.
    check(path, path.read_bytes(), entry if "digest" in entry else None, CONFIG_FILE if entry else None)
    return entry.get("key")


def _statistics(path: Path, digest: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance; NaN only in whole rows of both: layers that a prior was not trained on."""
    if not path.exists():
        raise InputError(
            f"{path} is missing: a released GLP is a folder of {CONFIG}, {STATISTICS} (mean and variance of the "
            f"activations) and weights; put the file of the same prior there, or fetch the whole repository again"
        )
    try:
        content = path.read_bytes()
        if digest is not None and xxhash.xxh3_128_hexdigest(content) != digest:
            raise InputError(f"{path} is damaged, or was written with another {CONFIG}: {CONFIG_FILE.remedy}")
        check_archive(path)
        statistics = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        mean, var = statistics["mean"], statistics["var"]
        if any(part.numel() > part.untyped_storage().nbytes() for part in (mean, var)):
            raise ValueError("it declares more numbers than it holds")  # a stride of 0 repeats one for ever
        mean, var = mean.float(), var.float()
    except InputError:
        raise
    except Exception as error:  # damaged bytes fail in the reader of archives, of pickles or of text, each in its way
        pass_shortage(error)
        line = first_line(error)
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
    layer_prefix: str | None,
) -> None:
    """Write a checkpoint that the released code reads, beside others of the same prior.

    Args:
        denoiser: shape of the network.
        tensors: its weights, with `model.` before each name.
        provenance: kept under a key of its own, which the released code ignores.
        layer_prefix: name of the list of blocks in the language model's transformers class; by default the name that
            was recorded when its activations were collected.

    Raises:
        InputError: a prior that the format has no place for, a prefix that is no name of a module, or a folder with a
            model in the other format or with checkpoints of another prior.
    """
    if denoiser.get("d_condition") is not None:
        raise InputError(
            "the released format has no place for a prior conditioned on a vector: use save_pretrained, or train "
            "without a condition"
        )
    if denoiser.get("multi_layer_n_layers") == 1:
        raise InputError(
            "the released code divides by the number of layers minus one, and gives NaN for a prior of one layer that "
            "is conditioned on it: use save_pretrained, or fit it without lm_layers"
        )
    store = provenance.get("store") or {}
    model = store.get("model") or {}
    processing = model.get("weight_processing")
    if processing not in (None, "raw"):
        raise InputError(
            f"the released format is for the language model's raw weights, this prior was trained with {processing} "
            "ones: use save_pretrained"
        )
    weights = _weights_of(folder, checkpoint)
    if any((place / OWN_CONFIG).exists() for place in (folder, folder / "checkpoints" / checkpoint)):
        raise InputError(f"{folder} holds a model in this library's own format: choose another folder")
    kwargs: Json = {
        "normalizer_config": {"rep_statistic": "${rep_statistic}"},
        "denoiser_config": {name: denoiser.get(name) for name in _SHAPE},
    }
    if hooks := [store["hook"]] if store.get("hook") else list(store.get("hooks") or ()):
        kwargs["tracedict_config"] = _trace(hooks, model.get("blocks") if layer_prefix is None else layer_prefix)
    name = str(model.get("name") or "").partition(" (")[0]
    own: Json = {"provenance": _sealed(provenance), "versions": versions()}
    config = {
        "model_name": "" if "${" in name else name,  # it would be filled in
        "rep_statistic": STATISTICS,
        "glp_kwargs": kwargs,
        ENTRY: own,
    }
    var = _divisible(var.detach().cpu())
    statistics = io.BytesIO()
    torch.save({"mean": mean.detach().cpu().clone(), "var": var.clone()}, statistics)
    others = [path for path in _weights(folder) if path != weights]
    if others and (folder / STATISTICS).exists():
        old_mean, old_var = _statistics(folder / STATISTICS)
        pairs = (old_mean, mean.cpu()), (_divisible(old_var), var)
        if not all(old.numel() == new.numel() and old.allclose(new.view_as(old), equal_nan=True) for old, new in pairs):
            raise InputError(f"{folder} holds {others[0].name} of a prior of other data: choose another folder")
    own |= CONFIG_FILE.entry(xxhash.xxh3_128_hexdigest(statistics.getvalue()))
    write_tensors(weights, tensors, WEIGHTS_FILE)
    write_atomic(folder / STATISTICS, statistics.getvalue())
    write_atomic(folder / CONFIG, sealed(to_yaml(config).encode()))
    if not (entry := weights.with_suffix("")).exists():
        write_atomic(entry, _ENTRY.format(weights.name))


def _divisible(var: Tensor) -> Tensor:
    """Variances that the released code can divide by: 1 for constant dimensions, as in this library."""
    return torch.where(var == 0, 1.0, var)


def _sealed(provenance: Json) -> str:
    """Provenance as JSON text without `$`, so that the released code's YAML reader interpolates nothing.

    A `${...}` in any text that it cannot parse, even escaped, makes the whole file unreadable for it.
    """
    return json.dumps(provenance).replace("$", r"\u0024")


def _trace(hooks: list[str], layer_prefix: str | None) -> Json:
    """Hook points as modules of the language model's transformers class, and whether their input or output is meant."""
    blocks = [re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook) for hook in hooks]
    ends = {_BLOCK_ENDS.get(match[2]) if match else None for match in blocks}
    if len(ends) != 1 or None in ends:
        raise InputError(
            "the released format has the inputs or the outputs of whole blocks, such as blocks.7.hook_resid_post, got "
            f"{', '.join(hooks)}: use save_pretrained"
        )
    if layer_prefix is None:
        layer_prefix = "model.layers"
        warnings.warn(
            "the store does not say what transformers calls the language model's blocks: 'model.layers' is written; "
            "pass layer_prefix if it is another name, such as 'transformer.h' for GPT-2",
            stacklevel=5,
        )
    if not re.fullmatch(r"\w+(\.\w+)*", layer_prefix):
        raise InputError(f"layer_prefix must be the name of a module, such as 'transformer.h', got {layer_prefix!r}")
    return {"layer_prefix": layer_prefix, "layers": [int(match[1]) for match in blocks if match], "retain": ends.pop()}


def _provenance(config: Json, trace: Json) -> Json:
    """Provenance that this library wrote, or else that of a store as far as the released config tells it."""
    own = config.get(ENTRY)
    if isinstance(own, dict) and (said := own.get("provenance")):
        try:
            return check_provenance(json.loads(said) if isinstance(said, str) else said, CONFIG)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{CONFIG} is damaged: its provenance is no JSON ({error})") from None
    prefix, layers = trace.get("layer_prefix"), trace.get("layers") or []
    names = [f"{prefix}.{layer}" if prefix else str(layer) for layer in layers] if isinstance(layers, list) else []
    blocks = [re.fullmatch(r"(?:(\w+(?:\.\w+)*)\.)?(\d+)", name) for name in names]
    end = {"output": "hook_resid_post", "input": "hook_resid_pre"}.get(str(trace.get("retain", "output")))
    name = config.get("model_name")
    origin: Json = {"model": {"name": name if isinstance(name, str) else None, "weight_processing": "raw"}}
    if len(lists := {block[1] for block in blocks if block}) == 1 and None not in lists:
        origin["model"]["blocks"] = lists.pop()
    hooks: list[Any] = [f"blocks.{block[2]}.{end}" for block in blocks if block and end]
    if len(hooks) == len(names) == 1:
        origin["hook"] = hooks[0]
    elif hooks and len(hooks) == len(names):
        origin["hooks"] = {hook: {} for hook in hooks}
    return {"store": origin}
