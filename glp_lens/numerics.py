"""Suspend the caller's modes of torch, so that results depend on the arguments alone.

Autocast, inference mode and gradient mode belong to a thread, and `own` suspends them wherever a model computes. The
default dtype belongs to the process, so that setting it would affect other threads: our code names the dtype of every
tensor that it creates, and only `of_others` sets it, around training loops and the code of other libraries.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from threadpoolctl import ThreadpoolController, threadpool_limits

_AUTOCAST = tuple(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Kinds of device that have an autocast of their own."""


@contextmanager
def own() -> Iterator[None]:
    """Neither autocast nor inference mode in the block, or as `@own()` in a function; it costs a few microseconds.

    Gradients are recorded if they were before: under inference mode they are not, but what is made here can take part
    in them later.
    """
    grad = torch.is_grad_enabled()
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))  # turns gradients on
            modes.enter_context(torch.set_grad_enabled(grad))
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield


def threads(n: int) -> None:
    """Let torch use `n` threads for what the calling thread does, one of several that share the work.

    The threads of one operation would else wait for each other while another thread works.
    """
    torch.get_num_threads()  # torch sets the number at the first call in a thread
    threadpool_limits(n, user_api="openmp")


@contextmanager
def blas_threads(n: int) -> Iterator[None]:
    """Let NumPy's and SciPy's matrix products use `n` threads in the block, in all threads of the process."""
    with _blas().limit(limits=n, user_api="blas"):
        yield


@functools.cache
def _blas() -> ThreadpoolController:
    """NumPy's and SciPy's BLAS, which are looked for once, as that takes milliseconds."""
    import scipy.linalg  # noqa: F401  # has a library of its own

    return ThreadpoolController()


@contextmanager
def of_others() -> Iterator[None]:
    """As `own`, with float32 as the default dtype, for code of other libraries that creates tensors."""
    dtype = torch.get_default_dtype()
    with own():
        if dtype == torch.float32:
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def training() -> Iterator[None]:
    """As `of_others`, with gradients on, and with autocast as in a fresh thread."""
    with of_others(), torch.enable_grad(), _outermost_autocast():
        yield


@contextmanager
def _outermost_autocast() -> Iterator[None]:
    """Contexts of autocast begun in the block count as outermost.

    Autocast keeps the bfloat16 copies of weights until the outermost context ends, even one with `enabled=False`: in a
    loop inside of one, every step would see the weights of the first.
    """
    torch.clear_autocast_cache()
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
