"""A decoder without the layers between: the modules of its weights, called one after the other.

A TransformerBridge calls hundreds of hook points, masks and wrappers in each pass, and runs every prompt of a batch to
the end. Here the same modules of transformers compute the same numbers, and only hook points that have hooks are
called. Texts are read with torch's own attention, no further than the last hook point. In generating, what prompts have
in common is computed once, and only the last position is unembedded. It is for decoders of the usual shape (pre-norm,
rotary positions, gated MLP: Llama, Mistral, Qwen, Gemma 3), and used only where `trial` found it to agree with a whole
forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SHORT = 256
"""Tokens of a text up to which plain products are faster on a CPU than torch's own attention, twice at 128."""
_Rotary = tuple[Tensor, Tensor]
"""Cosines and sines `(pos, 1, d_head)`, the sines of the first half negated."""


@dataclass(frozen=True)
class _Block:
    """Modules of one block, and the hook points of the residual stream around it."""

    hook_in: nn.Module
    hook_out: nn.Module
    ln1: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    ln2: nn.Module
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    activation: nn.Module
    scale: float
    d_head: int
    kind: str | None
    window: int | None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None
    ln1_post: nn.Module | None = None
    ln2_post: nn.Module | None = None


@dataclass
class _Cache:
    """Keys and values of one block, `(rows, heads, pos, d_head)`, written up to the position reached."""

    keys: Tensor
    values: Tensor


@dataclass
class _Stream:
    """The residual stream of a batch of prompts: positions that equal prompts share, and those of each row.

    Attributes:
        shared: `(distinct, split, d)`, the positions before `split` of each distinct prompt.
        own: `(batch, pos - split, d)`, the other positions of each row.
        owner: `(batch,)`, which prompt each row has.
    """

    shared: Tensor
    own: Tensor
    owner: Tensor

    def through(self, point: nn.Module) -> None:
        """Call a hook point with the whole stream; positions that it leaves as they are stay shared."""
        if not point._forward_hooks:
            return
        split = self.shared.shape[1]
        given = torch.cat([self.shared[self.owner], self.own], dim=1)
        new = point(given)
        before = torch.cat([self.shared[self.owner], self.own], dim=1)  # once more: a hook may write into its tensor
        changed = (new[:, :split] != before[:, :split]).any(2).any(0).nonzero()
        split = int(changed[0]) if len(changed) else split
        self.shared, self.own = self.shared[:, :split], new[:, split:]


@dataclass(frozen=True)
class Decoder:
    """The modules of a language model, in the order in which they run."""

    embed: nn.Module
    rotary: nn.Module
    blocks: list[_Block]
    ln_final: nn.Module
    unembed: nn.Linear
    longest: float
    """Positions up to which every layer attends to all of the text."""

    @classmethod
    def of(cls, model: Any) -> Decoder | None:
        """The modules of a TransformerBridge of the usual shape; None for any other model."""
        blocks = [_block(block) for block in getattr(model, "blocks", ())]
        embed, rotary = _inner(getattr(model, "embed", None)), _inner(getattr(model, "rotary_emb", None))
        ln_final, unembed = _inner(getattr(model, "ln_final", None)), _inner(getattr(model, "unembed", None))
        whole = [block for block in blocks if block is not None]
        if not whole or len(whole) < len(blocks) or model.training or getattr(model, "compatibility_mode", False):
            return None
        if embed is None or ln_final is None or rotary is None or type(unembed) is not nn.Linear:
            return None
        kinds = getattr(rotary, "rope_type", "default")
        if {"dynamic", "longrope"} & set(kinds.values() if isinstance(kinds, dict) else [kinds]):
            return None  # the angles of a position depend on the length of the text
        config = getattr(getattr(model, "original_model", None), "config", None)
        if getattr(config, "final_logit_softcapping", None) or len({p.device for p in model.parameters()}) > 1:
            return None
        windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        windows += [block.window for block in whole]
        return cls(embed, rotary, whole, ln_final, unembed, min((w for w in windows if w), default=float("inf")))

    @property
    def points(self) -> set[nn.Module]:
        """The hook points that are called here: those of the residual stream around each block."""
        return {point for block in self.blocks for point in (block.hook_in, block.hook_out)}

    def calls_all_hooks_of(self, model: Any) -> bool:
        """Whether every hook that is set on the model, by TransformerLens or torch, stands where one is called here."""
        points = self.points
        general = torch.nn.modules.module
        if general._global_forward_hooks or general._global_forward_pre_hooks:
            return False
        # Bridges and transformers set some of their own, to be ready for values that nobody asks for here.
        after, before = ("transformers.",), ("transformers.", "transformer_lens.")
        for module in model.modules():
            if module not in points and not _all_of(module._forward_hooks, after):
                return False
            if not _all_of(module._forward_pre_hooks, before):
                return False
        return True

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the residual stream."""
        return self.unembed.weight.dtype

    def read(self, tokens: Tensor, known: tuple[nn.Module, Tensor] | None = None) -> Iterator[tuple[nn.Module, Tensor]]:
        """The residual stream `(batch, pos, d)` of right-padded texts at each hook point, after its hooks.

        Padding needs no mask: no real token attends to a later one.

        Args:
            known: one of these hook points and the stream there: what comes before is left out.
        """
        rotary = self._rotary(tokens, tokens.shape[1])
        x: Tensor = self.embed(tokens) if known is None else known[1]
        begun = known is None
        for block in self.blocks:
            for point in (block.hook_in, block.hook_out):
                if begun:
                    x = _called(point, _advance(block, x, rotary[block.kind]) if point is block.hook_out else x)
                elif known is not None and point is known[0]:
                    begun = True
                else:
                    continue
                yield point, x

    def logits(self, stream: Iterator[tuple[nn.Module, Tensor]], rows: Tensor) -> Tensor:
        """Logits `(n, d_vocab)` at positions `(batch, pos)`, from what `read` gives."""
        for _, x in stream:
            last = x
        logits: Tensor = self.unembed(self.ln_final(last[rows]))
        return logits

    def generate(self, tokens: Tensor, new_tokens: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Prompts `(batch, pos)` and the tokens that `choose` takes by the logits `(batch, d_vocab)` of each step."""
        length = tokens.shape[1]
        total = length + new_tokens
        text = torch.cat([tokens, tokens.new_empty(len(tokens), new_tokens)], dim=1)
        rotary = self._rotary(tokens, total)
        caches: list[_Cache] = []
        last = self._prompt(tokens, total, rotary, caches)
        for at in range(length, total):
            if at > length:
                x = self.embed(text[:, at - 1 : at])
                for block, cache in zip(self.blocks, caches, strict=True):
                    x = _called(block.hook_in, x)
                    x = _advance(block, x, rotary[block.kind], cache, at - 1)
                    x = _called(block.hook_out, x)
                last = x[:, -1]
            text[:, at] = choose(self.unembed(self.ln_final(last)))
        return text

    def _prompt(self, tokens: Tensor, total: int, rotary: dict[str | None, _Rotary], caches: list[_Cache]) -> Tensor:
        """The stream at the last position `(batch, d)`, with keys and values of all positions written to `caches`."""
        distinct, owner = tokens.unique(dim=0, return_inverse=True)
        shared = self.embed(distinct)
        stream = _Stream(shared, shared.new_empty(len(tokens), 0, shared.shape[2]), owner)
        for block in self.blocks:
            stream.through(block.hook_in)
            cache, split = _empty(block, stream.own, total), stream.shared.shape[1]
            if split:
                common = _empty(block, stream.shared, split)
                stream.shared = _advance(block, stream.shared, rotary[block.kind], common, 0)
                cache.keys[:, :, :split] = common.keys[owner]
                cache.values[:, :, :split] = common.values[owner]
            if stream.own.shape[1]:
                stream.own = _advance(block, stream.own, rotary[block.kind], cache, split)
            caches.append(cache)
            stream.through(block.hook_out)
        return stream.own[:, -1] if stream.own.shape[1] else stream.shared[owner, -1]

    def _rotary(self, tokens: Tensor, total: int) -> dict[str | None, _Rotary]:
        """Angles of all positions, for each kind of layer."""
        positions = torch.arange(total, device=tokens.device)[None]
        like = self.embed(tokens[:1, :1])
        tables: dict[str | None, _Rotary] = {}
        by_kind = "layer_type" in inspect.signature(self.rotary.forward).parameters
        for kind in dict.fromkeys(block.kind for block in self.blocks):
            cos, sin = self.rotary(like, positions, kind) if by_kind else self.rotary(like, positions)
            half = sin.shape[-1] // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            tables[kind] = (cos[0, :, None], sin[0, :, None])
        return tables


def _all_of(hooks: Mapping[int, Any], modules: tuple[str, ...]) -> bool:
    """Whether all these hooks of torch are functions of some Python modules."""
    return all((getattr(hook, "__module__", None) or "").startswith(modules) for hook in hooks.values())


def _called(point: nn.Module, x: Tensor) -> Tensor:
    called: Tensor = point(x) if point._forward_hooks else x
    return called


def _inner(component: Any) -> Any:
    """The module of transformers in a component of a bridge."""
    return getattr(component, "original_component", None)


def _block(block: Any) -> _Block | None:
    """The modules of a block of a bridge, or None if it is of another shape."""
    parts = getattr(block, "submodules", None) or {}
    attention, mlp = parts.get("attn"), parts.get("mlp")
    inner = {name: _inner(part) for name, part in parts.items()}
    linear = {
        name: _inner((getattr(owner, "submodules", None) or {}).get(name))
        for owner, names in ((attention, "qkvo"), (mlp, ("gate", "in", "out")))
        for name in names
    }
    about, activation = _inner(attention), getattr(_inner(mlp), "act_fn", None)
    around = dict(getattr(attention, "submodules", None) or {})
    if inner.keys() - {"attn", "mlp", "ln1", "ln2", "ln1_post", "ln2_post"} or not {"ln1", "ln2"} <= inner.keys():
        return None
    if any(type(module) is not nn.Linear for module in linear.values()) or activation is None:
        return None
    norms = {name: _inner(part) for name, part in around.items() if name in ("q_norm", "k_norm")}
    d_head = int(getattr(about, "head_dim", 0))
    sizes = [norm.weight.numel() if hasattr(norm, "weight") else d_head for norm in norms.values()]
    if not d_head or set(sizes) - {d_head} or not hasattr(about, "scaling"):
        return None
    if getattr(about, "attn_logit_softcapping", None) or around.keys() - {*"qkvo", "q_norm", "k_norm"}:
        return None
    return _Block(
        block.hook_in, block.hook_out,
        inner["ln1"], linear["q"], linear["k"], linear["v"], linear["o"],
        inner["ln2"], linear["gate"], linear["in"], linear["out"], activation,
        float(about.scaling), d_head, getattr(about, "layer_type", None), getattr(about, "sliding_window", None),
        norms.get("q_norm"), norms.get("k_norm"), inner.get("ln1_post"), inner.get("ln2_post"),
    )  # fmt: skip


def _empty(block: _Block, like: Tensor, total: int) -> _Cache:
    shape = (len(like), block.k.out_features // block.d_head, total, block.d_head)
    return _Cache(like.new_empty(shape), like.new_empty(shape))


def _advance(block: _Block, x: Tensor, rotary: _Rotary, cache: _Cache | None = None, start: int = 0) -> Tensor:
    """The stream `(rows, n, d)` after a block: of whole texts, or of positions after those in a cache."""
    change = _attend(block, block.ln1(x), rotary, cache, start)
    x = x + (change if block.ln1_post is None else block.ln1_post(change))
    h = block.ln2(x)
    change = block.down(block.activation(block.gate(h)).mul_(block.up(h)))
    new: Tensor = x + (change if block.ln2_post is None else block.ln2_post(change))
    return new


def _attend(block: _Block, h: Tensor, rotary: _Rotary, cache: _Cache | None, start: int) -> Tensor:
    rows, n, _ = h.shape
    end, d_head = start + n, block.d_head
    cos, sin = rotary[0][start:end], rotary[1][start:end]
    q, k = (project(h).view(rows, n, -1, d_head) for project in (block.q, block.k))
    if block.q_norm is not None:
        q = block.q_norm(q)
    if block.k_norm is not None:
        k = block.k_norm(k)
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    if cache is None:
        return _attend_to_all(block, q, k, block.v(h).view(rows, n, -1, d_head))
    cache.keys[:, :, start:end] = k.transpose(1, 2)
    cache.values[:, :, start:end] = block.v(h).view(rows, n, -1, d_head).transpose(1, 2)
    keys, values = cache.keys[:, :, :end], cache.values[:, :, :end]
    heads = keys.shape[1]
    # Queries that share a head of keys stand below one another, so that nothing is repeated.
    q = q.view(rows, n, heads, -1, d_head).permute(0, 2, 3, 1, 4).reshape(rows, heads, -1, d_head)
    scores = (q @ keys.transpose(2, 3)).mul_(block.scale)
    if n > 1:
        later = torch.ones(n, end, dtype=torch.bool, device=h.device).triu_(start + 1)
        scores.view(rows, heads, -1, n, end).masked_fill_(later, float("-inf"))
    pattern = scores.softmax(-1, dtype=torch.float32).to(h.dtype)
    mixed = (pattern @ values).view(rows, heads, -1, n, d_head).permute(0, 3, 1, 2, 4)
    out: Tensor = block.o(mixed.reshape(rows, n, -1))
    return out


def _attend_to_all(block: _Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over whole texts `(rows, pos, d)`, from queries, keys and values `(rows, pos, heads, d_head)`."""
    rows, n, heads, d_head = k.shape
    if q.device.type == "cpu" and n <= _SHORT:
        # Queries that share a head of keys stand below one another, so that nothing is repeated.
        q = q.view(rows, n, heads, -1, d_head).permute(0, 2, 3, 1, 4).reshape(rows * heads, -1, d_head)
        k = k.permute(0, 2, 3, 1).reshape(rows * heads, d_head, n)
        later = q.new_full((n, n), float("-inf")).triu_(1).repeat(q.shape[1] // n, 1)
        pattern = torch.baddbmm(later, q, k, alpha=block.scale).softmax(-1)
        mixed = pattern @ v.transpose(1, 2).reshape(rows * heads, n, d_head)
        mixed = mixed.view(rows, heads, -1, n, d_head).permute(0, 3, 1, 2, 4)
    else:
        k, v = (x.repeat_interleave(q.shape[2] // heads, dim=2) for x in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=block.scale
        ).transpose(1, 2)
    out: Tensor = block.o(mixed.reshape(rows, n, -1))
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))
