"""Mixed precision without casts: float32 master weights, and bfloat16 weights and gradients that stay in place.

Autocast makes a bfloat16 copy of every weight in each step, and a float32 copy of every gradient, in fresh memory;
clipping and AdamW then read all of it again. Here the bfloat16 weights stay, matrix products write gradients where they
belong, and one pass, in pieces that fit a processor's cache, clips, updates the master weights and rounds them. The
numbers are those of autocast and fused AdamW, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.optim import AdamW

from glp_lens.types import Json

_PIECE = 2**17
"""Elements that are updated at once: all that is read and written of them fits a core's cache."""
_ALIGN = 64
"""Each weight begins at a multiple of so many elements."""


class _Working:
    """The bfloat16 copy of a parameter, and its gradient in this step.

    Attributes:
        value, grad: bfloat16, in the parameter's shape.
        has_grad: `grad` is of this step.
    """

    def __init__(self, value: Tensor, grad: Tensor) -> None:
        self.value, self.grad, self.has_grad = value, grad, False

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add `a @ b` to the gradient."""
        a = a.contiguous()  # where tiles are multiplied (AMX), half of a transposed product's time is reading it
        if self.has_grad:
            self.grad.addmm_(a, b)
        else:
            torch.mm(a, b, out=self.grad)
        self.has_grad = True

    def add_sum(self, rows: Tensor) -> None:
        """Add the sum of rows to the gradient."""
        if self.has_grad:
            self.grad += rows.sum(0)
        else:
            torch.sum(rows, 0, out=self.grad)
        self.has_grad = True


class Linear(nn.Linear):
    """A linear layer in float32; a `MixedAdamW` has it compute with copies in bfloat16 where gradients are recorded."""

    _copies: tuple[_Working, _Working] | None = None

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`, `(n, d_out)`."""
        return self._product(x, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """`x W^T`, `(n, d_out)`."""
        return self._product(x, None)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._copies is None or not torch.is_grad_enabled():
            return linear(x, self.weight, bias)
        weight, own = self._copies
        apply: Callable[..., Tensor] = _Product.apply
        product = apply(x.to(weight.value.dtype), self.weight, weight, None if bias is None else own)
        return product


class _Product(torch.autograd.Function):
    """`x W^T + b` in bfloat16, whose backward pass writes the gradients of the weights where they belong.

    The master weight is an argument only so that autograd, which does not know of the copies, records the product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, _master: Tensor, weight: _Working, bias: _Working | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.bias = weight, bias
        return linear(x, weight.value, None if bias is None else bias.value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.weight.add_product(grad.T, x)
        if ctx.bias is not None:
            ctx.bias.add_sum(grad)
        before = grad @ ctx.weight.value if ctx.needs_input_grad[0] else None
        return before, None, None, None


class MixedAdamW(AdamW):
    """AdamW on float32 master weights, with clipping, of a module whose linear layers compute in bfloat16.

    Its state is that of `torch.optim.AdamW`, parameter by parameter.
    """

    def __init__(self, module: nn.Module, groups: list[Json] | None = None, *, clip: float, **options: Any) -> None:
        """Put all weights of the module into one piece of memory; `release` gives each its own again.

        Args:
            module: what is trained, in one process, on the CPU; its products are in layers of the class `Linear`.
            groups: those of `AdamW`, by default one of all parameters; what is in no such layer is in the first.
            clip: largest norm of the gradient.
            options: those of `AdamW`.
        """
        self._layers = [layer for layer in module.modules() if isinstance(layer, Linear)]
        super().__init__(groups or [{"params": [*module.parameters()]}], fused=True, **options)
        of = {id(p): i for i, group in enumerate(self.param_groups) for p in group["params"]}
        inner = sorted((p for layer in self._layers for p in layer.parameters()), key=lambda p: of[id(p)])
        self._others = [p for p in module.parameters() if all(p is not q for q in inner)]
        self._clip, self._norm = clip, torch.ones((), dtype=torch.float32)
        places, self._split = _placed(inner, 0)
        other_places, size = _placed(self._others, self._split)
        starts = {of[id(p)]: at.start for p, at in zip(reversed(inner), reversed(places), strict=True)}
        edges = [(start, i) for i, start in sorted(starts.items())] + [(self._split, 0), (size, 0)]
        self._parts = [(start, end, i) for (start, i), (end, _) in pairwise(edges)]
        self._weights, self._mean, self._square = (torch.zeros(size, dtype=torch.float32) for _ in range(3))
        self._copies, self._grads = (torch.zeros(self._split, dtype=torch.bfloat16) for _ in range(2))
        self._other_grads = torch.zeros(size - self._split, dtype=torch.float32)
        self._buffer = torch.empty(_PIECE, dtype=torch.float32)
        for p, at in zip([*inner, *self._others], [*places, *other_places], strict=True):
            own = self._weights[at].view_as(p)
            own.copy_(p.detach())
            p.data = own
            averages = {"exp_avg": self._mean[at].view_as(p), "exp_avg_sq": self._square[at].view_as(p)}
            self.state[p] = {"step": torch.zeros((), dtype=torch.float32), **averages}
        self._working = [
            _Working(self._copies[at].view_as(p), self._grads[at].view_as(p))
            for p, at in zip(inner, places, strict=True)
        ]
        self._gathered = [
            self._other_grads[at.start - self._split : at.stop - self._split].view_as(p)
            for p, at in zip(self._others, other_places, strict=True)
        ]
        working = {id(p): own for p, own in zip(inner, self._working, strict=True)}
        for layer in self._layers:
            layer._copies = (working[id(layer.weight)], working[id(layer.bias)])
        self.refresh()

    def refresh(self) -> None:
        """Round the master weights, after they were changed from outside."""
        self._copies.copy_(self._weights[: self._split])

    def release(self) -> None:
        """Give each parameter memory of its own again, and let the layers compute in float32."""
        for layer in self._layers:
            layer._copies = None
        for p in self.state:
            p.data = p.data.clone()

    def clip(self) -> Tensor:
        """The norm of the gradient, by which `step` will clip it."""
        for p, place in zip(self._others, self._gathered, strict=True):
            if p.grad is None:
                place.zero_()
            else:
                place.copy_(p.grad)
        for working in self._working:
            if not working.has_grad:
                working.grad.zero_()
        self._norm = torch.stack([torch.dot(grad, grad) for *_, grad in self._pieces()]).sum().sqrt()
        return self._norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights by the clipped gradient."""
        scale = (self._norm / self._clip + 1e-6 / self._clip).clamp(min=1.0)
        for state in self.state.values():
            state["step"] += 1
        count = next(iter(self.state.values()))["step"]
        for group, at, grad in self._pieces():
            weights = self._weights[at]
            torch._fused_adamw_(  # what torch.optim calls, whose own work for each piece takes as long as the update
                [weights], [grad], [self._mean[at]], [self._square[at]], [], [count],
                grad_scale=scale, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            if at.stop <= self._split:
                self._copies[at].copy_(weights)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        for working in self._working:
            working.has_grad = False

    def _pieces(self) -> Iterator[tuple[dict[str, Any], slice, Tensor]]:
        """Group and place of pieces of the weights, and the gradients there in float32, which the next overwrites."""
        for begin, end, group in self._parts:
            for start in range(begin, end, _PIECE):
                at = slice(start, min(start + _PIECE, end))
                inner = end <= self._split
                own = self._grads[at] if inner else self._other_grads[at.start - self._split : at.stop - self._split]
                yield self.param_groups[group], at, self._buffer[: at.stop - start].copy_(own)


def _placed(parameters: list[nn.Parameter], start: int) -> tuple[list[slice], int]:
    """Where each lies in one piece of memory from `start` on, and where the last ends, gap included."""
    places = []
    for p in parameters:
        places.append(slice(start, start + p.numel()))
        start += -(-p.numel() // _ALIGN) * _ALIGN
    return places, start
