"""Defaults that the library and the commands share, importable without torch."""

from typing import Literal

Backend = Literal["bridge", "hooked"]
"""The TransformerLens class of a language model: `TransformerBridge` or `HookedTransformer`."""
Dtype = Literal["bfloat16", "float16", "float32"]
"""Number formats of a language model, and of stored activations."""

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_DTYPE: Dtype = "bfloat16"
DEFAULT_BACKEND: Backend = "bridge"
DEFAULT_DEVICE = "cpu"
DEFAULT_STEPS = 20
"""Steps from noise to data of a GLP's samples, taken by `DEFAULT_SOLVER`."""
DEFAULT_SOLVER = "euler"
DEFAULT_PASSAGES = 10
"""Passages of the highest values of a feature on the page, and of the lowest."""
