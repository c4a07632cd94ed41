"""Description of a language model for provenance: name, sizes, weight processing and a hash of its weights."""

from __future__ import annotations

import math
from typing import Any

import torch
import xxhash
from torch import Tensor

from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.lm.hook_points import outputs_of_blocks
from glp_lens.lm.protocol import Model, Parameters
from glp_lens.types import Json

_CENTRED = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest share of a row's norm that its mean has in a centred stream; 16-bit formats round to within 1e-2."""


@checked
def describe(model: Model) -> Json:
    """Name, class, depth, width, dtype and weight processing of a model, and the name of its list of blocks.

    `blocks` is what transformers calls the list of blocks (`transformer.h` in GPT-2), where that is known.
    """
    refuse_encoder_decoder(model)
    cfg = model.cfg
    about = {
        "name": name_of(model),
        "class": type(model).__name__,
        "n_layers": int(cfg.n_layers),
        "d_model": int(cfg.d_model),
        "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        "weight_processing": weight_processing(model),
    }
    blocks = blocks_name(model)
    return about if blocks is None else {**about, "blocks": blocks}


def refuse_encoder_decoder(model: Model) -> None:
    """Refuse a model whose decoder reads another text than its encoder, such as T5 and BART.

    Raises:
        InputError: it is one.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    if getattr(config, "is_encoder_decoder", False) or type(model).__name__ == "HookedEncoderDecoder":
        raise encoder_decoder(f"model {name_of(model)!r}")


def encoder_decoder(what: str) -> InputError:
    """The error for an encoder-decoder."""
    return InputError(
        f"{what} is an encoder-decoder, whose decoder reads another text than its encoder: open a decoder-only model, "
        "or an encoder such as BERT"
    )


def name_of(model: Model) -> str:
    """What the model was opened from: a Hub id or folder, and which copy of its weights."""
    cfg = model.cfg
    return str(getattr(cfg, "glp_lens_name", None) or getattr(cfg, "model_name", None) or "unnamed")


def blocks_name(model: Model) -> str | None:
    """What transformers calls the list of the model's blocks; None where that is not known."""
    if name := getattr(model.cfg, "glp_lens_blocks", None):
        return str(name)
    adapter = getattr(model, "adapter", None)
    if adapter is None and (architecture := getattr(model.cfg, "original_architecture", None)):
        from glp_lens.lm.opening import adapter_of

        adapter = adapter_of(architecture, model.cfg)  # a HookedTransformer that the user opened
    mapping = getattr(adapter, "component_mapping", None) or {}
    return getattr(mapping.get("blocks"), "name", None)


def weight_processing(model: Model) -> str:
    """`raw`, or what was done to the weights: `folded` layer norms, `centred` writing weights, or both.

    TransformerLens keeps no reliable record: a bridge says that it is in compatibility mode when nothing was processed,
    and nothing when it was. So this looks at what processing leaves behind. Folded norms have no weights of their own
    left, or the identity. Centred writing weights give a residual stream whose rows have mean 0, up to the rounding of
    its format; centring is for LayerNorm models, and leaves the stream of others as it is. Folding alone does not
    change the residual stream.
    """
    names = [name for name, is_done in (("folded", _folded(model)), ("centred", _centred(model))) if is_done]
    return "+".join(names) or "raw"


def _folded(model: Any) -> bool:
    if str(getattr(model.cfg, "normalization_type", "")).endswith("Pre"):  # of a HookedTransformer
        return True
    if not getattr(model, "_weights_processed", False):
        return False
    first = model.blocks[0]
    weights = [getattr(getattr(first, name, None), "weight", None) for name in ("ln1", "ln2")]
    gains = [weight for weight in weights if isinstance(weight, Tensor)]
    # An RMS norm that multiplies by 1 + weight has the identity at 0.
    return bool(gains) and all(bool((gain == 1).all() | (gain == 0).all()) for gain in gains)


@torch.no_grad()
def _centred(model: Model) -> bool:
    if str(getattr(model.cfg, "normalization_type", "")).startswith("RMS"):
        return False  # by no processing; a 16-bit stream that is nearly constant may have mean 0 by chance
    vocabulary = int(model.cfg.d_vocab)
    ids = torch.arange(16)[None] * max(1, vocabulary // 16) % vocabulary
    ids = ids[:, : int(getattr(model.cfg, "n_ctx", None) or 16)]
    stream = outputs_of_blocks(model, ids.to(model_device(model)), [0]).get(0)
    if stream is None or stream.ndim != 3:
        return False
    rows = stream[0].double()
    width = rows.shape[1]
    share = rows.sum(1).abs() / (math.sqrt(width) * rows.norm(dim=1).clamp(min=1e-30))
    # The rows of a stream that was not centred have a share of about 1 / sqrt(width) by chance alone.
    limit = min(_CENTRED.get(stream.dtype, 1e-2), 0.3 / math.sqrt(width))
    return float(share.square().mean().sqrt()) < limit


@checked
def identity(model: Model) -> Json:
    """What identifies a language model in provenance: `model` (see `describe`) and `weights`, the hash of its weights.

    Hashing reads all weights, seconds for a large model: compute it once and pass it to `collect` and `here`.
    """
    return {"model": describe(model), "weights": weights_hash(model)}


def weights_hash(model: Parameters) -> str:
    """Hash of all weights, since models of one name can differ in them."""
    digest = xxhash.xxh3_64()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_device(model: Parameters) -> torch.device:
    """The device the model's weights are on."""
    return next(iter(model.parameters())).device
