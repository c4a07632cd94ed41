"""Steering directions: made from texts, rows and models, saved with their provenance, exchanged with other packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glp_lens.lazy import exports

if TYPE_CHECKING:
    from glp_lens.directions.controls import random_covariance, random_isotropic, random_labels
    from glp_lens.directions.direction import Direction
    from glp_lens.directions.estimators import Method, estimate
    from glp_lens.directions.files import layer_of, read, read_layers, write
    from glp_lens.directions.responses import Response, chat_prompt, from_responses, respond, response_activations
    from glp_lens.directions.texts import from_rows, from_texts, separation, span_activations, text_activations
    from glp_lens.directions.trained import clamp_latents, class_means, sae_latent

__all__ = [
    "Direction",
    "Method",
    "Response",
    "chat_prompt",
    "clamp_latents",
    "class_means",
    "estimate",
    "from_responses",
    "from_rows",
    "from_texts",
    "layer_of",
    "random_covariance",
    "random_isotropic",
    "random_labels",
    "read",
    "read_layers",
    "respond",
    "response_activations",
    "sae_latent",
    "separation",
    "span_activations",
    "text_activations",
    "write",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "controls": ("random_covariance", "random_isotropic", "random_labels"),
        "direction": ("Direction",),
        "estimators": ("Method", "estimate"),
        "files": ("layer_of", "read", "read_layers", "write"),
        "responses": ("Response", "chat_prompt", "from_responses", "respond", "response_activations"),
        "texts": ("from_rows", "from_texts", "separation", "span_activations", "text_activations"),
        "trained": ("clamp_latents", "class_means", "sae_latent"),
    },
)
