"""Directions from labelled texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Literal

import numpy as np
import torch
import xxhash
from torch import Tensor
from tqdm.auto import tqdm

from glp_lens import lm, provenance
from glp_lens.arguments import checked
from glp_lens.directions.direction import Direction
from glp_lens.directions.estimators import Method, check_rows, estimate
from glp_lens.errors import InputError
from glp_lens.intervals import Interval, auc_interval
from glp_lens.types import Json

Read = Literal["last", "mean"]


@checked
def from_texts(
    model: lm.Model,
    positive: Sequence[str],
    negative: Sequence[str],
    hook: str,
    *,
    method: Method = "mean",
    name: str = "direction",
    seed: int = 0,
    held_out: float = 0.2,
    read: Read = "last",
    context: int = 64,
    batch_size: int = 32,
    identity: Json | None = None,
    known: dict[str, Tensor] | None = None,
) -> Direction:
    """A direction from texts about something to texts that are not, with its AUROC on held-out texts.

    A share of the texts is held out: they take no part in the vector, and neither does a text equal to one of them.
    Longer texts are cut on the left, so that the last token read is always the text's own.

    Args:
        model: the language model.
        positive: texts of what to steer towards.
        negative: texts to steer away from. `pca` pairs them with the positives in order: the pair is held out together,
            and texts beyond the shorter side are not used.
        hook: the hook point.
        method: see `estimate`.
        name: what results call the direction.
        seed: chooses what is held out, and the folds of `probe`.
        held_out: share of the texts of each side to hold out, at least two; 0 holds out none, and `auroc` is None.
        read: activations of each text's `last` token, or their `mean` over its tokens without BOS.
        context: most tokens of a text.
        batch_size: texts of a forward pass.
        identity: `lm.identity(model)`, where the caller knows it already.
        known: see `text_activations`.

    Raises:
        InputError: a side has too few texts, the classes do not differ, or the hook point does not exist.
    """
    lm.check_hook(model, hook)
    sides = _clean(positive, negative, paired=method == "pca")
    parts = _split(*sides, held_out, np.random.default_rng(seed), paired=method == "pca")
    texts = [text for part in parts for text in part]
    rows = text_activations(model, texts, hook, read=read, context=context, batch_size=batch_size, known=known)
    train_pos, train_neg, test_pos, test_neg = rows.split([len(part) for part in parts])
    about: Json = {
        **provenance.here(model, hook, identity),
        "texts": {"positive": len(parts[0]), "negative": len(parts[1]), "hash": hash_of(parts[0], parts[1]),
                  "held_out": [len(parts[2]), len(parts[3])]},
        "options": {"read": read, "context": context, "held_out": held_out, "seed": seed},
    }  # fmt: skip
    return from_rows(
        train_pos, train_neg, hook, method=method, name=name, seed=seed, provenance=about,
        held_out=(test_pos, test_neg) if len(test_pos) else None,
    )  # fmt: skip


@checked
def from_rows(
    positive: Tensor,
    negative: Tensor,
    hook: str,
    *,
    method: Method = "mean",
    name: str = "direction",
    seed: int = 0,
    held_out: tuple[Tensor, Tensor] | None = None,
    provenance: Json | None = None,
) -> Direction:
    """A direction from activation rows `(n, d)` of both classes; see `estimate` for the methods.

    Args:
        positive, negative: rows that the vector is made from.
        hook: the hook point they come from.
        method, name, seed: as in `from_texts`.
        held_out: other positive and negative rows, for the AUROC.
        provenance: where the rows come from.

    Raises:
        InputError: too few rows, or classes that do not differ.
    """
    vector = estimate(positive, negative, method, seed=seed)
    auroc = None if held_out is None else separation(vector, *held_out)
    return Direction.of(vector, hook, name=name, method=method, auroc=auroc, provenance=provenance)


@checked
def separation(vector: Tensor, positive: Tensor, negative: Tensor) -> Interval:
    """AUROC of the rows' projection on a vector, with its interval (DeLong)."""
    check_rows(positive, negative, vector[None])
    scores = torch.cat([positive, negative]).double() @ vector.double()
    return auc_interval(scores.numpy(), np.repeat([1, 0], [len(positive), len(negative)]))


@checked
def text_activations(
    model: lm.Model,
    texts: Sequence[str],
    hook: str,
    *,
    read: Read = "last",
    context: int = 64,
    batch_size: int = 32,
    known: dict[str, Tensor] | None = None,
) -> Tensor:
    """One activation row a text, float32 `(len(texts), d_in)` on the CPU, in the texts' order.

    `read` as in `from_texts`; longer texts are cut on the left.

    Args:
        known: rows `(d_in,)` by text, of the same model, hook point, `read` and `context`: these texts are not read
            again, and those that are read are added. Rows depend on the batch they are read in by rounding.
    """
    known = {} if known is None else known
    new = [text for text in texts if text not in known]
    if new:
        ids = lm.to_ids(model, new, context, truncate="left")
        rows = span_activations(model, ids, [1] * len(ids), hook, read=read, batch_size=batch_size)
        known.update(zip(new, rows, strict=True))
    return torch.stack([known[text] for text in texts])


@checked
def span_activations(
    model: lm.Model,
    ids: Sequence[Sequence[int]],
    starts: Sequence[int],
    hook: str,
    *,
    read: Read = "mean",
    batch_size: int = 32,
) -> Tensor:
    """One row a sequence, float32 `(len(ids), d_in)`: of its last token, or the mean from position `starts[i]` on.

    The mean is taken in float64; a sequence that ends before its start is read at its last token.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    parts = []
    with tqdm(total=len(ids), desc="direction", unit="text", mininterval=2) as bar:
        for first in range(0, len(ids), batch_size):
            chosen = order[first : first + batch_size]
            tokens, mask = lm.pad([ids[i] for i in chosen])
            stream = lm.activations(model, tokens, mask, [hook])[hook]
            last = mask.sum(1) - 1
            begin = last if read == "last" else torch.minimum(torch.tensor([starts[i] for i in chosen]), last)
            where = torch.arange(mask.shape[1])
            weights = (where >= begin[:, None]) & (where <= last[:, None])
            shares = (weights.double() / weights.sum(1, keepdim=True)).to(stream.device)
            parts.append(torch.einsum("bp,bpd->bd", shares, stream.double()).float().cpu())
            bar.update(len(chosen))
    return torch.cat(parts)[torch.as_tensor(np.argsort(order))]


def _clean(positive: Sequence[str], negative: Sequence[str], *, paired: bool) -> tuple[list[str], list[str]]:
    """The texts that are not empty; of pairs, those of which neither text is."""
    if paired:
        pairs = [(a, b) for a, b in zip(positive, negative, strict=False) if a.strip() and b.strip()]
        sides = [a for a, _ in pairs], [b for _, b in pairs]
    else:
        sides = [a for a in positive if a.strip()], [b for b in negative if b.strip()]
    if not all(sides):
        raise InputError("a direction needs at least one positive and one negative text that is not empty")
    return sides


def _split(
    positive: list[str], negative: list[str], share: float, rng: np.random.Generator, *, paired: bool
) -> tuple[list[str], list[str], list[str], list[str]]:
    """Training positives and negatives, then those held out, in the given order."""
    if not 0 <= share < 1:
        raise InputError(f"held_out must lie in [0, 1), got {share}")
    if share == 0:
        return positive, negative, [], []
    sides = (positive, negative)
    chosen = []
    for side in sides:
        count = max(2, round(share * len(side)))
        if len(side) < count + 2:
            raise InputError(
                f"a direction with held-out AUROC needs at least 4 texts of each side, got {len(positive)} and "
                f"{len(negative)}: pass more, or held_out=0"
            )
        chosen.append(set(rng.permutation(len(side))[:count].tolist()))
    if paired:
        chosen[1] = chosen[0]
    held = [[text for i, text in enumerate(side) if i in out] for side, out in zip(sides, chosen, strict=True)]
    # Copies of a held-out text do not train, whichever side they stand on.
    known = {text.strip() for side in held for text in side}
    keep = [[text.strip() not in known for text in side] for side in sides]
    if paired:
        keep = [[a and b for a, b in zip(*keep, strict=True)]] * 2
    train = [list(compress(side, own)) for side, own in zip(sides, keep, strict=True)]
    if not all(train):
        raise InputError("all texts of a side equal one that is held out: pass distinct texts, or held_out=0")
    return train[0], train[1], held[0], held[1]


def hash_of(*sides: Sequence[str]) -> str:
    """Hash of the texts of both sides and their order."""
    digest = xxhash.xxh3_64()
    for side in sides:
        for text in side:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(b"\xff")
    return digest.hexdigest()
