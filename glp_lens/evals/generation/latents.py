"""Rows made of an autoencoder's latents, each drawn by itself: what it knows of activations as a generative model."""

from __future__ import annotations

import torch
from torch import Tensor

from glp_lens.interface import Decoder, Featurizer
from glp_lens.types import Acts

_BLOCK = 1024


class LatentSampler:
    """Draws each latent independently of the others from its values on real rows, zeros included, and decodes them.

    So every latent is active as often and as strongly as on real rows, and a sampled row has as many active latents on
    average; that latents occur together, or exclude each other, is lost, as is what the decoder cannot write.

    Args:
        model, decoder: the autoencoder, which is both.
        rows: `(m, d_in)`, real rows.
    """

    def __init__(self, model: Featurizer, decoder: Decoder, rows: Acts) -> None:
        self._decoder = decoder
        found = []
        for start in range(0, len(rows), _BLOCK):
            sparse = model.encode(rows[start : start + _BLOCK]).cpu().to_sparse()
            found.append((sparse.indices()[1], sparse.values()))
        latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        self._values = values[latents.argsort(stable=True)]
        counts = latents.bincount(minlength=model.n_features)
        self._first, self._counts, self._rate = counts.cumsum(0) - counts, counts, counts.double() / len(rows)

    def sample(self, n: int, *, seed: int = 0) -> Acts:
        """`n` rows `(n, d_in)`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([self._block(min(_BLOCK, n - start), generator) for start in range(0, n, _BLOCK)])

    def _block(self, n: int, generator: torch.Generator) -> Tensor:
        shape = n, len(self._rate)
        latents = torch.zeros(shape, dtype=torch.float32)
        row, latent = (torch.rand(shape, generator=generator, dtype=torch.float64) < self._rate).nonzero().unbind(1)
        place = torch.rand(len(latent), generator=generator, dtype=torch.float64) * self._counts[latent]
        latents[row, latent] = self._values[self._first[latent] + place.long()]
        return self._decoder.decode(latents)
