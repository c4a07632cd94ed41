"""The packaged language model, opened once."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from glp_lens.lm import Model


@pytest.fixture(scope="session")
def smollm2() -> "Model":
    """SmolLM2-135M-Instruct as `open_model` opens it by default."""
    from glp_lens import lm

    return lm.open_model()
