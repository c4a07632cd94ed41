"""Which tokens of a text become rows of a store, and the reasons why others are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from glp_lens import lm
from glp_lens.activations.forward import Forwarded
from glp_lens.corpus import Document
from glp_lens.errors import InputError

Keep = Literal["all", "last", "mean", "max"] | int
"""All usable tokens of a text, the last one, the mean or the largest value of each dimension over all, or this many at
random."""
_POOLED = ("mean", "max")


@dataclass(frozen=True)
class Rule:
    """Which tokens are kept.

    Attributes:
        keep: which of the usable tokens.
        bos: id of the BOS token, which is never used; nor is position 0, an attention sink.
        excluded: further token ids that are never used.
        seed: chooses random tokens, together with the text's id.
    """

    keep: Keep
    bos: int
    excluded: frozenset[int]
    seed: int = 0


@dataclass(frozen=True)
class Kept:
    """The rows kept of a forward pass, texts one after the other.

    Attributes:
        text: index of each row's text, `(n,)`.
        token_id: `(n,)`; of a mean or maximum, the last token's.
        position: `(n,)`, with BOS at 0; of a mean or maximum, the last token's.
        rows: at each hook point `(n, d)`, on the CPU, in the dtype of the store.
        excluded: tokens left out, by reason.
    """

    text: np.ndarray
    token_id: np.ndarray
    position: np.ndarray
    rows: dict[str, Tensor]
    excluded: dict[str, int]


def rule(model: lm.Model, keep: Keep, exclude: Iterable[str | int], seed: int) -> Rule:
    """The rule of these options; `"special"` in `exclude` names all special tokens of the tokenizer.

    Raises:
        InputError: an unknown way to keep tokens, or an unknown token.
    """
    if keep not in ("all", "last", *_POOLED) and not (type(keep) is int and keep >= 1):
        raise InputError(f"keep must be 'all', 'last', 'mean', 'max' or a number of tokens, got {keep!r}")
    tokenizer, ids = lm.tokenizer_of(model), set[int]()
    vocabulary = tokenizer.get_vocab()
    for token in exclude:
        if token == "special":
            ids.update(tokenizer.all_special_ids)
        elif isinstance(token, str) and token in vocabulary:
            ids.add(vocabulary[token])
        elif type(token) is int and 0 <= token < model.cfg.d_vocab:
            ids.add(token)
        else:
            raise InputError(f"token {token!r} is not in the model's vocabulary: pass a token as the tokenizer "
                             "spells it, its id, or 'special'")  # fmt: skip
    return Rule(keep, lm.bos_id(model), frozenset(ids), seed)


def norms(batch: Forwarded, usable: Tensor, hook: str, documents: Sequence[Document]) -> Tensor:
    """Euclidean norm of every row at a hook point, `(batch, pos)` float32, after checking those that count.

    Raises:
        InputError: values that are not finite.
    """
    norm: Tensor = torch.linalg.vector_norm(batch.rows[hook], dim=-1, dtype=torch.float32).cpu()
    bad = (usable & ~torch.isfinite(norm)).nonzero()
    if len(bad):
        text, position = bad[0].tolist()
        raise InputError(
            f"activations at {hook} are not finite in document {documents[batch.texts[text]].text[:40]!r} "
            f"(position {position}): run the model in bfloat16 or float32"
        )
    return norm


def usable_tokens(batch: Forwarded, how: Rule) -> tuple[Tensor, dict[str, int]]:
    """Mask `(batch, pos)` of the tokens that may be kept, and how many are not, by reason."""
    rest = batch.mask.clone()
    excluded = {"padding": int((~rest).sum())}
    reasons = {
        "prompt": ~batch.wanted,
        "bos": batch.ids == how.bos,
        "position_0": (torch.arange(rest.shape[1]) == 0).expand_as(rest),
        "special": torch.isin(batch.ids, torch.tensor(sorted(how.excluded), dtype=torch.long)),
    }
    for reason, mask in reasons.items():
        if hit := int((rest & mask).sum()):
            excluded[reason] = hit
        rest &= ~mask
    return rest, excluded


def select(
    batch: Forwarded, how: Rule, limits: Mapping[str, float], documents: Sequence[Document], dtype: torch.dtype
) -> Kept:
    """The rows of a forward pass that are kept.

    Args:
        batch: the forward pass.
        how: the rule.
        limits: at each hook point, the norm above which a token is massive. A token that is massive at one hook
            point is left out at all.
        documents: all texts, which the batch names by index.
        dtype: of the store.

    Raises:
        InputError: values that are not finite, also once rounded to `dtype`.
    """
    usable, excluded = usable_tokens(batch, how)
    massive = torch.zeros_like(usable)
    for hook in batch.rows:
        norm = norms(batch, usable, hook, documents)
        massive |= usable & (norm > limits.get(hook, float("inf")))
    excluded["massive"] = int(massive.sum())
    usable &= ~massive
    kept = _choose(usable, how, [documents[i].id for i in batch.texts])
    if how.keep not in _POOLED and (unchosen := int(usable.sum() - kept.sum())):
        excluded["not_chosen"] = unchosen
    text, position = kept.nonzero(as_tuple=True)
    rows = {}
    for hook, values in batch.rows.items():
        if how.keep in _POOLED:
            chosen = _pooled(values, usable.to(values.device), how.keep)[text.to(values.device)]
        else:
            chosen = values[kept.to(values.device)]
        rows[hook] = _rounded(hook, chosen.cpu(), dtype)
    return Kept(
        text=np.asarray(batch.texts)[text.numpy()],
        token_id=batch.ids[text, position].numpy(),
        position=position.numpy(),
        rows=rows,
        excluded=excluded,
    )


def _pooled(values: Tensor, usable: Tensor, keep: Keep) -> Tensor:
    """Mean or maximum over each text's usable tokens, `(batch, d)` float32; texts without any give no row."""
    weight = usable[..., None]
    if keep == "max":
        return torch.where(weight, values.float(), -torch.inf).amax(1)
    sums = torch.where(weight, values.float(), 0.0).sum(1)  # what is left out may be infinite
    return sums / weight.sum(1).clamp(min=1)


def _choose(usable: Tensor, how: Rule, text_ids: list[int]) -> Tensor:
    """Of each text's usable tokens, a mask of those that give a row."""
    if how.keep == "all":
        return usable
    chosen = torch.zeros_like(usable)
    for i, text_id in enumerate(text_ids):
        places = usable[i].nonzero()[:, 0].numpy()
        if isinstance(how.keep, int):
            rng = np.random.Generator(np.random.Philox(key=[how.seed % 2**64, text_id]))
            places = places[np.argsort(rng.random(len(places)), kind="stable")[: how.keep]]
        else:
            places = places[-1:]
        chosen[i, torch.from_numpy(places)] = True
    return chosen


def _rounded(hook: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    stored = rows.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(stored).all():
        raise InputError(
            f"activations at {hook} reach {float(rows.abs().max()):.0f}, float16 ends at 65504: use dtype='bfloat16'"
        )
    return stored


def labels_of(values: Mapping[str, Any], length: int) -> dict[str, np.ndarray]:
    """A text's labels as one array of `length` for each name; a single number stands for all tokens.

    Raises:
        InputError: another number of values than tokens, or values that are not numbers.
    """
    columns = {}
    for name, value in values.items():
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" or array.shape not in ((), (length,)):
            raise InputError(
                f"label {name!r} must be a number, or {length} numbers, one for each token, got "
                f"{array.dtype} of shape {array.shape}"
            )
        if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
            raise InputError(f"label {name!r} must fit into int64, got {array.max()}")
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        columns[name] = np.broadcast_to(array, (length,))
    return columns


def check_labels(labels: Mapping[str, np.ndarray], types: Mapping[str, str]) -> None:
    """Refuse a text's labels if they are not those of the store, whose types the first texts have fixed.

    Raises:
        InputError: other names, or fractions in a column of whole numbers.
    """
    if set(labels) != set(types):
        raise InputError(
            f"all texts need the labels {', '.join(types) or 'none'}, one has {', '.join(labels) or 'none'}"
        )
    for name, values in labels.items():
        if types[name] == "int64" and values.dtype.kind == "f" and (values % 1 != 0).any():
            raise InputError(f"label {name!r} has whole numbers in the first texts, and {values[values % 1 != 0][0]} "
                             "in a later one: pass floats from the beginning")  # fmt: skip
