"""Memory of long runs: what is kept of products that were made once, and what was freed and not returned."""

from __future__ import annotations

import ctypes
import os
import sys

_PRODUCTS = 64
_CACHES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
"""How many products oneDNN keeps, and the layer of torch above it, either of which keeps what the other forgets."""


def keep_few_products() -> None:
    """Let torch keep the machine code of the last 64 products, unless the caller's environment says how many.

    On a CPU, machine code is made for each shape of a product, .7 MB in bfloat16, and 1,024 are kept. Texts of every
    length are as many shapes, which are not seen again, while a training step has a few dozen. To be called before the
    first product.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(_PRODUCTS))


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it otherwise (glibc's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
