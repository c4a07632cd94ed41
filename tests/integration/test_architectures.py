"""Many architectures, each beside transformers: rows and generated texts equal its own, or are refused in one line."""

import pytest

from tests.architectures import ARCHITECTURES, DOC, EQUAL, autoencoders, cover, row, versions


def documented() -> str:
    """The page on what is covered, if it is of these versions."""
    text = DOC.read_text(encoding="utf-8")
    return text if versions() in text else ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_collected_and_generated_is_what_transformers_computes_or_refused(name, tmp_path):
    found = cover(name, tmp_path)
    assert "\n" not in found.refused
    if not found.refused:
        assert found.rows < EQUAL
        assert found.generation in ("cached", "whole text")
        assert found.texts == (True, True)
    elif found.blocks:  # collected from, though it does not generate
        assert found.rows < EQUAL
        assert found.generation == "none"
    assert not documented() or row(name, found) in documented()


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_autoencoder_works_or_is_refused(tmp_path):
    pytest.importorskip("sae_lens")
    found = autoencoders(tmp_path)
    assert found["topk"] == found["jumprelu"] == found["standard"] == ""
    assert all(found[name] for name in found if "transcoder" in name or name == "temporal")
    for name, said in found.items():
        assert not documented() or f"| {name} | {said or 'works'} |" in documented()
