"""Open a language model as a TransformerLens model, check it, and run it.

Everything here is duck-typed on what `HookedTransformer` and `TransformerBridge` share, so any model a user has opened
works too.
"""

from glp_lens.defaults import DEFAULT_MODEL, Backend
from glp_lens.lm.description import describe, identity, model_device, name_of, weight_processing, weights_hash
from glp_lens.lm.forward import (
    Hooks,
    Way,
    activations,
    divergence,
    keeping,
    log_probabilities,
    next_logits,
    nll,
    token_nll,
    way_of_reading,
)
from glp_lens.lm.generating import caches_keys_and_values, generate
from glp_lens.lm.gguf_models import PACKAGED_SECOND, cache_folder, packaged, packaged_models
from glp_lens.lm.hook_points import (
    RESIDUAL,
    check_edit,
    check_hook,
    default_hook,
    is_mid_stream,
    mid_stream_edits_work,
    names_of,
    off_stream_error,
    rows_at,
    same_point,
)
from glp_lens.lm.opening import check_device, open_model
from glp_lens.lm.protocol import Model, Tokenizer
from glp_lens.lm.tokens import batches_of_one_length, bos_id, chat_ids, decode, pad, to_ids, tokenizer_of

__all__ = [
    "DEFAULT_MODEL",
    "PACKAGED_SECOND",
    "RESIDUAL",
    "Backend",
    "Hooks",
    "Model",
    "Tokenizer",
    "Way",
    "activations",
    "batches_of_one_length",
    "bos_id",
    "cache_folder",
    "caches_keys_and_values",
    "chat_ids",
    "check_device",
    "check_edit",
    "check_hook",
    "decode",
    "default_hook",
    "describe",
    "divergence",
    "generate",
    "identity",
    "is_mid_stream",
    "keeping",
    "log_probabilities",
    "mid_stream_edits_work",
    "model_device",
    "name_of",
    "names_of",
    "next_logits",
    "nll",
    "off_stream_error",
    "open_model",
    "packaged",
    "packaged_models",
    "pad",
    "rows_at",
    "same_point",
    "to_ids",
    "token_nll",
    "tokenizer_of",
    "way_of_reading",
    "weight_processing",
    "weights_hash",
]
