"""The logit lens: which tokens a direction of the residual stream speaks for, if it is read out at once.

It is a linear approximation. The later blocks of the language model are left out, and the final norm is applied to the
direction alone: its weights scale each dimension, and the direction gets the length that the norm would give it, so
that its own length does not count. Only the order of tokens and the ratios of their logits mean something.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from glp_lens import lm, numerics
from glp_lens.features.folder import Way

TOKENS = 10
"""Tokens at each end."""
_BLOCK = 512
"""Directions that are unembedded at once."""


class Lens:
    """The final norm and the unembedding of a language model.

    Attributes:
        d_model: width of its residual stream.
        unembedding: `(d_model, d_vocab)` float32.
    """

    def __init__(self, model: lm.Model) -> None:
        """Take the parts from a `HookedTransformer` or `TransformerBridge`.

        Raises:
            InputError: it has no tokenizer.
        """
        parts: Any = model
        self.d_model = int(model.cfg.d_model)
        self.unembedding: Tensor = parts.W_U.detach().float()
        self._norm = parts.ln_final
        self._tokenizer = lm.tokenizer_of(model)
        self._texts: dict[int, str] = {}

    @torch.no_grad()
    @numerics.own()
    def logits(self, vectors: Tensor) -> Tensor:
        """Logits `(n, d_vocab)` of directions `(n, d_model)`, less their mean over the vocabulary, float32.

        The lengths of the directions do not matter. What norm and unembedding add to any direction is left out.
        """
        device = self.unembedding.device
        unit = torch.nn.functional.normalize(vectors.double(), dim=1, eps=1e-300).float().to(device)
        whole = torch.cat([unit * math.sqrt(self.d_model), unit.new_zeros(1, self.d_model)])
        normed: Tensor = self._norm(whole[None])[0].float()
        logits = (normed[:-1] - normed[-1:]) @ self.unembedding
        return logits - logits.mean(1, keepdim=True)

    def rows(self, way: Way, vectors: Tensor, k: int = TOKENS) -> list[tuple[int, Way, str, list[str], list[float]]]:
        """Rows of the table `writes`, for all directions `(n_features, d_model)` but those with NaN.

        Args:
            k: tokens of each end.
        """
        rows: list[tuple[int, Way, str, list[str], list[float]]] = []
        known = vectors.isfinite().all(1).nonzero()[:, 0]
        k = min(k, self.unembedding.shape[1])
        for index in known.split(_BLOCK):
            logits = self.logits(vectors[index])
            ends = [("top", logits.topk(k, dim=1)), ("bottom", logits.topk(k, dim=1, largest=False))]
            found = [(side, end.indices.tolist(), end.values.tolist()) for side, end in ends]
            for i, feature in enumerate(index.tolist()):
                rows += [(feature, way, side, self._decode(ids[i]), values[i]) for side, ids, values in found]
        return rows

    def _decode(self, ids: Iterable[int]) -> list[str]:
        for token in ids:
            if token not in self._texts:
                self._texts[token] = str(self._tokenizer.decode([token]))
        return [self._texts[token] for token in ids]
