"""What is used of a language model, as types that `HookedTransformer` and `TransformerBridge` satisfy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module, Parameter


class Parameters(Protocol):
    """Anything with weights, such as a `torch.nn.Module`."""

    def parameters(self) -> Iterator[Parameter]: ...


class Config(Protocol):
    """Sizes of a language model. What only some configurations have is read by `getattr`."""

    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def d_vocab(self) -> int: ...
    @property
    def d_mlp(self) -> int | None: ...
    @property
    def n_ctx(self) -> int: ...


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def chat_template(self) -> Any: ...
    def __call__(self, text: Any, *, add_special_tokens: bool) -> Mapping[str, Any]: ...
    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...
    def decode(self, token_ids: list[int], /) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...


class Model(Parameters, Protocol):
    """A `HookedTransformer` or a `TransformerBridge`. `fwd_hooks` are pairs of a hook point's name and a function."""

    training: bool

    @property
    def cfg(self) -> Config: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def hook_dict(self) -> Mapping[str, Module]: ...
    def __call__(self, tokens: Any, /, *, return_type: Any) -> Any: ...
    def hooks(self, *, fwd_hooks: list[Any]) -> AbstractContextManager[Any]: ...
    def run_with_hooks(
        self,
        tokens: Any,
        /,
        *,
        return_type: Any,
        attention_mask: Tensor,
        fwd_hooks: list[Any],
        stop_at_layer: int | None = None,
    ) -> Any: ...
    def generate(
        self,
        tokens: Any,
        /,
        *,
        max_new_tokens: int = 10,
        do_sample: bool = True,
        temperature: float = 1.0,
        stop_at_eos: bool = True,
        use_past_kv_cache: bool = True,
        return_type: str | None = "input",
        verbose: bool = True,
    ) -> Any: ...
    def eval(self) -> Any: ...
    def train(self, mode: bool = True, /) -> Any: ...
