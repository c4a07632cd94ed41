"""Settings and metadata of sae-lens autoencoders: which are refused, and what becomes provenance.

docs/probing.md has a table of all fields. Nothing here imports sae_lens.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from glp_lens import provenance
from glp_lens.errors import InputError
from glp_lens.types import Json

ROW_WISE: Final = ("standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit")
"""Architectures of sae-lens that map each row to latents and back by itself."""
_TO_FOLD = ("expected_average_only_in", "covariance_whitening")
"""Normalisations that sae-lens applies in training and folds into the weights afterwards, and never at run time."""
BY_ROW: Final = ("layer_norm", "constant_norm_rescale")
"""Normalisations by numbers of each row, which sae-lens keeps from the last rows encoded and undoes when decoding.

Its declared type lacks the second, which it runs all the same.
"""
_WITHIN_ATTENTION = ("fold_value_biases", "refactor_factored_attn_matrices")
"""Arguments of `from_pretrained_no_processing` that change queries, keys, values and outputs of heads, nothing else."""
_OTHER_WEIGHTS = ("revision", "checkpoint_index", "checkpoint_value", "checkpoint_label", "load_in_4bit",
                  "load_in_8bit", "quantization_config")  # fmt: skip
"""Arguments that load other weights under the same name."""


def check(cfg: Any) -> None:
    """Refuse a `sae_lens.SAEConfig` whose autoencoder is not one of whole rows at one hook point.

    Raises:
        InputError: normalisation that is not folded, a transcoder, one head only, or a language model whose weights
            were processed in a way that cannot be told from the model at hand.
    """
    if cfg.normalize_activations in _TO_FOLD:
        raise InputError(
            f"this autoencoder expects activations normalised by {cfg.normalize_activations!r}, with numbers "
            "of its training: fold them into its weights by fold_activation_norm_scaling_factor, as sae-lens's trainer "
            "does when it ends, and save it again"
        )
    about = cfg.metadata.to_dict()
    outputs = {key: value for key, value in about.items() if key.endswith("_out") and value is not None}
    if hasattr(cfg, "d_out") or any(value != about.get(key.removesuffix("_out")) for key, value in outputs.items()):
        raise InputError(
            f"this is a transcoder, from {about.get('hook_name')} to {about.get('hook_name_out')}: it predicts one "
            "activation from another and reconstructs none; expected an autoencoder of one hook point"
        )
    if (head := about.get("hook_head_index")) is not None:
        raise InputError(
            f"this autoencoder is of head {head} of {about.get('hook_name')} only, and hook points are read whole "
            "here: use one that was trained on all heads"
        )
    if not isinstance(about.get("model_from_pretrained_kwargs") or {}, dict):
        raise InputError("this autoencoder's model_from_pretrained_kwargs are damaged: expected an object")
    asked = [key for key in _WITHIN_ATTENTION if (about.get("model_from_pretrained_kwargs") or {}).get(key)]
    if asked and ".attn." in str(about.get("hook_name")):
        raise InputError(
            f"this autoencoder was trained at {about['hook_name']} with {asked[0]}, which changes that hook point and "
            "which a language model keeps no record of: use one that was trained without it"
        )


def check_types(cfg: Any) -> None:
    """ValueError if a setting, as an edited file may have it, is not of the type that sae-lens declares."""
    declared = get_type_hints(type(cfg))
    for known in fields(cfg):
        value, kind = getattr(cfg, known.name), declared[known.name]
        if kind in (bool, int, float, str):
            fits = isinstance(value, int | float if kind is float else kind) and (kind is bool) == (type(value) is bool)
        else:
            undeclared = BY_ROW if known.name == "normalize_activations" else ()
            fits = get_origin(kind) is not Literal or value in (*get_args(kind), *undeclared)
        if not fits:
            raise ValueError(f"its {known.name} is {str(value)[:60]!r}")
    if not 1 <= getattr(cfg, "k", 1) <= cfg.d_sae:
        raise ValueError(f"its k is {cfg.k}, and it has {cfg.d_sae} latents")


def store(cfg: Any) -> Json:
    """Origin of its training activations as the provenance of a store; entries that are not known are left out.

    Empty if the metadata name neither hook point nor language model, as for those trained here. Weight processing is
    known if the metadata have `model_from_pretrained_kwargs`, even if empty; without them it may be any, since older
    versions of sae-lens did not record it.
    """
    about = cfg.metadata
    if not about.hook_name and not about.model_name:
        return {}
    asked: Json | None = about.model_from_pretrained_kwargs
    model: Json = {"name": about.model_name}
    if asked is not None:
        model["weight_processing"] = provenance.weight_processing(asked)
    given = {key: (asked or {}).get(key) for key in _OTHER_WEIGHTS}
    other = [f"{key} {value}" for key, value in given.items() if value is not None and value is not False]
    if other and about.model_name:
        model["name"] = f"{about.model_name} ({', '.join(other)})"
    cautions = [f"was trained on {part} of its language model: open the model so" for part in other]
    if about.prepend_bos is False:
        cautions.append("was trained on texts without a BOS in front, here each has one")
    known = {
        "hook": about.hook_name,
        "context": about.context_size,
        "prepend_bos": about.prepend_bos,
        "positions": about.seqpos_slice,
        "excluded_tokens": about.exclude_special_tokens,
        "corpus": {"name": about.dataset_path} if about.dataset_path else None,
        "opened_with": asked,
        "cautions": cautions or None,
    }
    return {"model": model, "d_in": int(cfg.d_in)} | {key: value for key, value in known.items() if value is not None}
