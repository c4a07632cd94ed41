"""A store's shuffled batches as a torch dataset."""

from __future__ import annotations

from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from glp_lens.activations.batches import Batches
from glp_lens.activations.store import ActivationStore
from glp_lens.arguments import checked
from glp_lens.errors import InputError
from glp_lens.types import Acts, Json


class StoreDataset(IterableDataset[Acts]):
    """Whole batches of a store: `DataLoader(StoreDataset("acts", 4096), batch_size=None, num_workers=2)`.

    Whatever the number of workers, the loader gives the batches of `ActivationStore.batches` in its order: worker w
    of n makes batches w, w + n and so on. Each worker reads every window, so the plain iterator, which prefetches in
    a thread, is the faster way unless the batches are worked on in the workers.

    A new iterator begins again at `start_batch`: for several epochs, pass `epochs` or leave it at None.

    Examples:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from glp_lens.activations import StoreDataset, write_store
        >>> store = write_store("acts", torch.arange(10.0)[:, None], hook="blocks.3.hook_resid_post")
        >>> loader = DataLoader(StoreDataset("acts", 4, epochs=1, drop_last=False), batch_size=None)
        >>> batches = list(loader)
        >>> [len(batch) for batch in batches]
        [4, 4, 2]
        >>> bool((torch.cat(batches).sort(0).values == store.rows()).all())
        True
    """

    @checked
    def __init__(
        self,
        path: str | Path | ActivationStore,
        batch_size: int,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        start_batch: int = 0,
        **options: Any,
    ) -> None:
        """Only the path is kept: each process opens the store for itself.

        Args:
            path: the store's folder, or the opened store.
            batch_size: rows of a batch, for each process of a distributed training.
            rank: which of these processes this is; by default as in `torch.distributed`, if that is initialised.
            world_size: number of processes; by default likewise.
            start_batch: number of batches to leave out in front.
            options: `seed`, `epochs`, `drop_last`, `normalize` and what else `ActivationStore.batches` takes.

        Raises:
            InputError: neither a folder nor a store.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        folder = path.path if isinstance(path, ActivationStore) else path
        if not isinstance(folder, str | PathLike):
            raise InputError(f"expected an activation store or its folder, got {type(path).__name__}")
        self.path = Path(folder)
        self.start_batch = start_batch
        self._options = {
            "batch_size": batch_size,
            "rank": rank if rank is not None else torch.distributed.get_rank() if distributed else 0,
            "world_size": world_size or (torch.distributed.get_world_size() if distributed else 1),
            **options,
        }

    def __iter__(self) -> Iterator[Acts]:
        worker = get_worker_info()
        index, every = (worker.id, worker.num_workers) if worker else (0, 1)
        return self._batches(self.start_batch + index, every)

    def state_dict(self, batches: int) -> Json:
        """Where a loader stands that has given `batches` batches since it began at `start_batch`.

        They must be counted by who takes them: workers are ahead of what was taken, and do not report back.
        """
        return self._batches(self.start_batch + batches).state_dict()

    def load_state_dict(self, state: Json) -> None:
        """Let the next iterator continue after those batches, bit for bit, with any number of workers.

        Raises:
            InputError: the state is of another store, or of another order.
        """
        batches = self._batches(0)
        batches.load_state_dict(state)
        self.start_batch = batches.next_batch

    def _batches(self, start_batch: int, every: int = 1) -> Batches:
        store = ActivationStore.open(self.path)
        return store.batches(**self._options, start_batch=start_batch, every=every)
