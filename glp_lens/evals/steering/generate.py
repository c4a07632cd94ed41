"""Steered generation: prompts continued greedily at several strengths, kept text by text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from glp_lens import hooks, lm
from glp_lens.evals.entries import Entry
from glp_lens.evals.results import Setting
from glp_lens.types import HookFunction, Json

BATCH_ROWS = 320
_OWN_NLL_ROWS = 32


@dataclass(frozen=True, eq=False)
class Method:
    """One way to steer.

    Attributes:
        label: what results call it.
        strengths: how far the direction is followed, or of guidance its scales; 0 alone for no steering.
        direction: what strength 1 adds, `(d_in,)` in activation units; None for no push.
        entry: the model that repairs steered activations and its options, among them `repair`; None for no repair.
        options: of `hooks.steer` besides, such as `renormalize`.
        factor: each strength is multiplied by it.
        guide: instead of a push, options of the entry's projection at a strength: a classifier or a condition.
        identity: what tells one guide from another, as JSON-like values.
    """

    label: str
    strengths: tuple[float, ...]
    direction: Tensor | None = None
    entry: Entry | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    guide: Callable[[float], Mapping[str, Any]] | None = None
    identity: Any = None

    @property
    def setting(self) -> Setting:
        """Options of the repair, as part of the setting of a metric."""
        return self.entry.setting if self.entry else Setting()

    @property
    def stochastic(self) -> bool:
        """Whether noise is drawn."""
        return self.entry is not None and bool(getattr(self.entry.model, "stochastic", False))

    def inputs(self) -> Json:
        """All that its texts depend on besides language model, prompt, strength and seed."""
        entry = None if self.entry is None else [self.entry.options, self.entry.model.fingerprint()]
        about = {"direction": self.direction, "entry": entry, "options": dict(self.options), "factor": self.factor}
        return {**about, "guide": self.identity}

    def edit(
        self, alphas: Sequence[float], noise: hooks.SeededNoise, model: lm.Model, *, allow_mismatch: bool
    ) -> HookFunction | None:
        """The hook for a batch with a strength for each of its texts; None where nothing is edited.

        With a guide all texts of a batch must have one strength.
        """
        entry = self.entry
        about: dict[str, Any] = {"model": model, "allow_mismatch": allow_mismatch}
        if self.guide is not None:
            assert entry is not None
            assert len(set(alphas)) == 1
            guided, prior = {**entry.options, **self.guide(alphas[0])}, cast(Any, entry.model)
            return hooks.project(prior, "last", noise, **about, **guided)
        if self.direction is None:
            return None
        options = {**self.options, **(entry.options if entry else {})}
        projector: Any = entry.model if entry else None
        strength = self.factor * torch.tensor(alphas, dtype=torch.float32)
        return hooks.steer(self.direction, strength, projector, "last", noise, **about, **options)


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        ids: its tokens.
        nll_own: their mean loss under the unsteered language model, in nats a token.
    """

    ids: list[int]
    nll_own: float


Wanted = tuple[int, float]
"""A prompt by its number, and a strength."""


def generate(
    model: lm.Model,
    method: Method,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Wanted],
    *,
    hook: str,
    keys: Sequence[str],
    new_tokens: int = 24,
    seed: int = 0,
    temperature: float = 0.0,
    batch_rows: int = BATCH_ROWS,
    allow_mismatch: bool = False,
) -> Iterator[dict[Wanted, Generation]]:
    """Continuations of prompts at strengths, batch by batch, greedy unless there is a temperature.

    The edit is made at the last position of each call, that is, at the prompt's last token and at each new one, as in
    the released GLP code. EOS does not end a text: all have the same length.

    The noise of a repair depends on seed, key of the prompt and position only. It is the same for every strength and
    every model, which pairs their comparisons, and does not depend on the batching.

    Args:
        model: a HookedTransformer or TransformerBridge.
        method: how to steer.
        prompts: token ids of the texts to continue, BOS included.
        wanted: which of them, at which strengths.
        hook: the hook point to steer at.
        keys: what noise is drawn by, one for each prompt: its text.
        new_tokens: length of a continuation.
        seed: for the noise of stochastic projectors, and of sampling.
        temperature: of sampling; 0 takes the likeliest token. Sampled texts depend on the batch that they are in.
        batch_rows: most sequences generated at once.
        allow_mismatch: repair at another hook point than the entry's model was trained at.
    """
    alike: dict[Any, list[Wanted]] = {}  # texts of one batch have prompts of one length, which need no padding
    for pair in wanted:
        alike.setdefault((len(prompts[pair[0]]), pair[1] if method.guide else None), []).append(pair)
    for group in (group for _, group in sorted(alike.items(), key=lambda item: item[0][0])):
        for start in range(0, len(group), batch_rows):
            batch = group[start : start + batch_rows]
            tokens = torch.tensor([list(prompts[i]) for i, _ in batch])
            noise = hooks.SeededNoise(seed, [keys[i] for i, _ in batch])
            edit = method.edit([alpha for _, alpha in batch], noise, model, allow_mismatch=allow_mismatch)
            seen: list[Tensor] = []
            edits = [(hook, _keeping(seen)), *([] if edit is None else [(hook, edit)])]
            text = lm.generate(model, tokens, new_tokens, temperature=temperature, hooks=edits, seed=seed)
            nll = own_nll(model, text, tokens.shape[1], (hook, torch.cat(seen, dim=1)))
            rows = text[:, tokens.shape[1] :].tolist()
            yield {pair: Generation(ids, loss) for pair, ids, loss in zip(batch, rows, nll.tolist(), strict=True)}


def _keeping(seen: list[Tensor]) -> HookFunction:
    """A hook function that adds the stream `(batch, pos, d)` of each call to `seen`, and changes nothing."""

    def hook_fn(tensor: Tensor, *, hook: Any = None) -> Tensor:
        seen.append(tensor.detach().clone())
        return tensor

    return hook_fn


def own_nll(model: lm.Model, tokens: Tensor, start: int, known: tuple[str, Tensor] | None = None) -> Tensor:
    """Mean loss a token of what follows position `start`, under the unsteered model, `(n,)`.

    Args:
        model: the language model.
        tokens: whole texts `(n, pos)`.
        start: where the continuations begin.
        known: a hook point, and what came there before any edit, `(n, pos - 1, d)`: an edit changes nothing before its
            hook point, so that the blocks before need not run again. Of another length it is not used, as where
            generation has no cache and calls the hook with the whole text each time.
    """
    stream = None
    if known is not None and known[1].shape[:2] == (len(tokens), tokens.shape[1] - 1):
        stream = torch.nn.functional.pad(known[1], (0, 0, 0, 1))  # nothing is read at the last token
    means = []
    for rows in torch.arange(len(tokens)).split(_OWN_NLL_ROWS):
        block = tokens[rows]
        real = torch.ones_like(block, dtype=torch.bool)
        wanted = (torch.arange(1, block.shape[1]) >= start).expand(len(block), -1)
        at_hook = None if known is None or stream is None else (known[0], stream[rows])
        means.append(lm.token_nll(model, block, real, wanted=wanted, known=at_hook)[:, start - 1 :].mean(1))
    return torch.cat(means)
