"""A store of activations held in memory, with the interface of `glp_lens.activations.ActivationStore`."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from glp_lens.activations import ActivationStore
from glp_lens.types import Json


class MemoryStore:
    __class__ = ActivationStore  # type: ignore[assignment]  # as isinstance sees it

    def __init__(self, x: Tensor, hook: str = "blocks.1.hook_resid_post") -> None:
        self.x, self.hook, self.d_in, self.dtype = x.float(), hook, x.shape[1], "float32"
        wide = x.double()
        self.stats = SimpleNamespace(
            count=len(x),
            mean=wide.mean(0),
            var=wide.var(0, correction=0),
            min=wide.amin(0),
            max=wide.amax(0),
            mean_norm=float(wide.norm(dim=1).mean()),
        )
        self.median_norm = float(wide.norm(dim=1).median())

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, start: int = 0, stop: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x[start:stop].to(dtype)

    def take(self, index: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(index)]

    def sample_index(self, n: int, seed: int) -> np.ndarray:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n].numpy()

    def sample(self, n: int, seed: int) -> Tensor:
        return self.take(self.sample_index(n, seed))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start_batch: int = 0,
        epochs: int | None = None,
        drop_last: bool = True,
    ) -> Iterator[Tensor]:
        assert start_batch == 0
        generator = torch.Generator().manual_seed(seed)
        while epochs is None or epochs > 0:
            for index in torch.randperm(len(self), generator=generator).split(batch_size):
                if len(index) == batch_size or not drop_last:
                    yield self.x[index]
            epochs = None if epochs is None else epochs - 1

    def provenance(self) -> Json:
        return {
            "model": {"name": "random"},
            "hook": self.hook,
            "d_in": self.d_in,
            "rows": len(self),
            "median_norm": self.median_norm,
            "max_norm": 1e6,
        }
