"""A store of activations held in memory, with the interface of `glp_lens.activations.ActivationStore`."""

from types import SimpleNamespace

import torch


class MemoryStore:
    def __init__(self, x, hook="blocks.1.hook_resid_post"):
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

    def __len__(self):
        return len(self.x)

    def rows(self, start=0, stop=None, dtype=torch.float32):
        return self.x[start:stop].to(dtype)

    def sample(self, n, seed):
        return self.x[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:n]]

    def batches(self, batch_size, *, seed=0, start_batch=0, epochs=None, drop_last=True):
        assert start_batch == 0
        generator = torch.Generator().manual_seed(seed)
        while epochs is None or epochs > 0:
            for index in torch.randperm(len(self), generator=generator).split(batch_size):
                if len(index) == batch_size or not drop_last:
                    yield self.x[index]
            epochs = None if epochs is None else epochs - 1

    def provenance(self):
        return {
            "model": {"name": "random"},
            "hook": self.hook,
            "d_in": self.d_in,
            "rows": len(self),
            "median_norm": self.median_norm,
            "max_norm": 1e6,
        }
