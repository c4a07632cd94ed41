"""Training batches of a prior: from one store, or from sibling stores at several layers, with layers and classes."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from glp_lens import lm
from glp_lens.activations.batches import window_rows
from glp_lens.activations.massive import Massive
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.stream import ActivationStream
from glp_lens.errors import InputError
from glp_lens.models.normalizer import Normalizer, massive_rows, mean_and_std
from glp_lens.models.row_checks import check_rows
from glp_lens.training import distributed
from glp_lens.training.config import TrainConfig
from glp_lens.training.objective import Batch, step_seed
from glp_lens.types import Acts, Json

Store = ActivationStore | ActivationStream
Stores = Store | Sequence[Store] | Mapping[str, Store]

ClassVectors = dict[float, Tensor]
"""The embedding `(d_condition,)` of each class."""

_MOST_CLASSES = 1000
_OWN = ("hook", "hook_names", "max_norm", "median_norm", "manifest_hash")
"""Entries of the provenance that siblings do not share."""
_WINDOW = 8192
"""Least number of rows of a layer that are shuffled together, where many layers share the memory for it."""
_HELD_OUT, _LEAST = 2048, 256
"""Validation rows of held-out stores: in all, and at least of each layer."""


def layer_of(hook: str) -> int | None:
    """The layer that a hook point is at; None outside of the blocks."""
    block = re.match(r"blocks\.(\d+)\.", hook)
    return int(block[1]) if block else None


class Prior(Protocol):
    """The parts of a prior that its training batches depend on."""

    normalizer: Normalizer
    class_vectors: ClassVectors

    @property
    def device(self) -> torch.device:
        """Device of the batches."""


@dataclass(frozen=True)
class Source:
    """The rows of one store.

    Attributes:
        store: the store, or a stream while it is collected.
        layer: of the language model, for a multi-layer prior.
        limit: norm above which rows are massive and excluded; None if there are none.
        massive: number of them.
        classes: `(n, 1)` float32, the index of each row's class, NaN without one.
    """

    store: Store
    layer: int | None = None
    limit: float | None = None
    massive: int = 0
    classes: np.ndarray | None = None

    def provenance(self) -> Json:
        """Provenance of the store, with the limit of this training."""
        known = self.store.provenance()
        return known if self.limit is None else {**known, "max_norm": self.limit}

    def batches(
        self, size: int, part: tuple[int, int], seed: int, start: int, window: int | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches `(size, d_in)` of rows, and the class index of each, `(size,)`, where there are classes."""
        if isinstance(self.store, ActivationStream):
            return zip(self.store.batches(size, seed=seed, start_batch=start), itertools.repeat(None))
        options = {"seed": seed, "start_batch": start, "part": part, "window": window}
        rows = self.store.batches(size, **options)  # type: ignore[arg-type]
        if self.classes is None:
            return zip(rows, itertools.repeat(None))
        classes = self.store.batches(size, values=self.classes, **options)  # type: ignore[arg-type]
        return zip(rows, (values[:, 0] for values in classes), strict=True)


class Sources:
    """The stores that a prior is trained on, and batches of their rows.

    Attributes:
        sources: one for each layer, in ascending order.
        depth: number of layers of the language model if the prior is conditioned on the layer, else None.
        label: column with the class of each row, if the prior is conditioned on it.
        vectors: the embedding of each class; empty without a condition.
    """

    def __init__(self, sources: list[Source], depth: int | None, label: str | None, vectors: ClassVectors) -> None:
        self.sources, self.depth, self.label, self.vectors = sources, depth, label, vectors
        self.d_in = sources[0].store.d_in

    @classmethod
    def of(
        cls,
        stores: Stores,
        *,
        massive: Massive = None,
        label: str | None = None,
        vectors: Tensor | ClassVectors | None = None,
        lm_layers: int | None = None,
    ) -> Sources:
        """Open one store, or sibling stores: the same rows at different layers of one language model.

        Args:
            massive: which rows are massive activations, as in `normalizer.massive_rows`.
            label: column with the class of each row.
            vectors: `(n_classes, d_condition)`, the embedding of class c in row c, or those of a trained prior.
            lm_layers: number of layers of the language model, for a prior conditioned on the layer; by default that in
                the manifests of several stores, and none for a single store.

        Raises:
            InputError: stores that are no siblings, or labels and vectors that do not fit together.
        """
        if isinstance(stores, str | Path | Tensor):
            raise InputError(f"expected a store, got a {type(stores).__name__}: open it with gl.ActivationStore.open, "
                             "or write rows with glp_lens.activations.write_store")  # fmt: skip
        given: list[Store]
        if isinstance(stores, Mapping):
            given = list(stores.values())
        else:
            given = list(stores) if isinstance(stores, Sequence) else [stores]
        layers, depth = _layers(given, lm_layers)
        order = sorted(range(len(given)), key=lambda i: layers[i] or 0)
        given, layers = [given[i] for i in order], [layers[i] for i in order]
        if vectors is not None and label is None:
            raise InputError("vectors embed the classes of a label: name its column, condition='...'")
        classes, known = _classes(given, label, vectors) if label else ([None] * len(given), {})
        limits = [massive_rows(store, massive) or (None, 0) for store in given]
        sources = [Source(*each) for each in zip(given, layers, *zip(*limits, strict=True), classes, strict=True)]
        made = cls(sources, depth, label, known)
        if made.massive and distributed.is_main():
            rule = "beyond the gap in the data" if massive == "gap" else f"{massive:g} times the median"
            where = {source.store.hook: f"{source.limit:.4g}" for source in sources if source.massive}
            warnings.warn(
                f"{made.massive} of {made.rows} rows are massive activations, with a norm over "
                f"{', '.join(f'{limit} at {hook}' for hook, limit in where.items())} ({rule}): "
                "they count neither in the normaliser nor in the loss; massive=None (--massive 0) keeps them",
                stacklevel=5,
            )
        return made

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(len(source.store) for source in self.sources)

    @property
    def massive(self) -> int:
        """Number of rows that are massive and excluded."""
        return sum(source.massive for source in self.sources)

    def streams(self, batch_size: int) -> list[tuple[ActivationStream, int]]:
        """The streams among the stores, and the number of rows that a batch takes from each."""
        return [
            (source.store, layer_rows(batch_size, i, len(self.sources)))
            for i, source in enumerate(self.sources)
            if isinstance(source.store, ActivationStream)
        ]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, `(d_in,)`, or `(layers, d_in)` with NaN for layers without a store."""
        each = [mean_and_std(source.store, source.limit) for source in self.sources]
        mean, var = (torch.stack(values) for values in zip(*((mean, std**2) for mean, std in each), strict=True))
        if self.depth is None:
            return mean[0], var[0]
        layers = torch.tensor([source.layer for source in self.sources])
        empty = torch.full((self.depth, self.d_in), torch.nan, dtype=torch.float32)
        return empty.index_copy(0, layers, mean), empty.index_copy(0, layers, var)

    def provenance(self) -> Json:
        """Provenance of the store; of siblings, the entries that all share, and in `hooks` those of each hook point."""
        each = [source.provenance() for source in self.sources]
        if self.depth is None:
            return each[0]
        shared = {
            key: value
            for key, value in each[0].items()
            if key not in _OWN and all(key in known and known[key] == value for known in each)
        }
        hooks = {known["hook"]: {k: v for k, v in known.items() if k not in shared} for known in each}
        return {**shared, "hooks": hooks}

    def feed(self, config: TrainConfig, prior: Prior) -> Callable[[int], Generator[Batch]]:
        """The batches of a training, as `training.loop.train` takes them.

        Of n layers, row i of a batch is of layer i modulo n, so the first layers have one row more of a batch that does
        not divide among them. Each layer has its own order of rows, and row i does not depend on the number of
        processes.

        Raises:
            InputError: fewer rows in a batch than layers, or a stream for several processes.
        """
        n, rank, world = len(self.sources), distributed.rank(), distributed.world_size()
        if config.batch_size < n:
            raise InputError(f"a batch holds rows of all {n} layers, expected at least {n}, got {config.batch_size}")
        if world > 1 and any(isinstance(source.store, ActivationStream) for source in self.sources):
            raise InputError("a stream has one trainer at a time: collect a store for several processes")
        share = config.batch_size // world
        first = rank * share
        finish = self._finish(prior, (first + torch.arange(share)) % n, weigh=self.massive > 0)

        def batches(i: int, start: int) -> Iterator[tuple[Tensor, Tensor | None]]:
            source = self.sources[i]
            seed = config.seed if n == 1 else step_seed(config.seed, source.layer or 0)
            window = None if n == 1 else max(_WINDOW, window_rows(4 * self.d_in * n))
            before, whole = layer_rows(first, i, n), layer_rows(config.batch_size, i, n)
            if size := layer_rows(first + share, i, n) - before:
                return source.batches(size, (before, whole), seed, start, window)
            return itertools.repeat((torch.empty(0, self.d_in, dtype=torch.float32), None))

        def feed(start: int) -> Generator[Batch]:
            each = [batches(i, start) for i in range(n)]
            while True:
                if n == 1:
                    yield finish(*next(each[0]))
                    continue
                x = torch.empty(share, self.d_in, dtype=torch.float32)
                classes = None if self.label is None else torch.empty(share, dtype=torch.float32)
                for i, own in enumerate(each):
                    turn = slice((i - first) % n, None, n)
                    x[turn], index = next(own)
                    if classes is not None and index is not None:
                        classes[turn] = index
                yield finish(x, classes)

        return feed

    def held_out(self, rows: Acts | Sources, prior: Prior) -> Batch:
        """A validation batch: the rows given, or a sample of each held-out store; massive rows are left out.

        Raises:
            InputError: rows of another width, several layers but no stores, or no store of a layer.
        """
        if isinstance(rows, Tensor) and len(self.sources) > 1:
            raise InputError("a prior of several layers is validated on held-out sibling stores, got rows of one")
        parts, classes = [], []
        for source in self.sources:
            if isinstance(rows, Sources):
                x, index = rows._draw(source, max(_HELD_OUT // len(self.sources), _LEAST))
            else:
                x, index = check_rows(rows, self.d_in), None
            if index is None:
                index = torch.full((len(x),), torch.nan, dtype=torch.float32)
            limit = source.limit or source.store.manifest.max_norm  # as for the training rows
            usable = slice(None) if limit is None else x.norm(dim=1) <= limit
            parts.append(x[usable])
            classes.append(index[usable])
        turn = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
        return self._finish(prior, turn, weigh=False)(torch.cat(parts), torch.cat(classes))

    # -- inside --------------------------------------------------------------------------------------------

    def _finish(self, prior: Prior, turn: Tensor, *, weigh: bool) -> Callable[[Tensor, Tensor | None], Batch]:
        """A function of rows in activation units and their classes that makes batches on the prior's device.

        Args:
            turn: `(n,)`, which source each row is of.
            weigh: there may be massive rows, which get weight 0 in the loss.
        """
        device, turn = prior.device, turn.to(prior.device)
        table = limit = layer = None
        if self.depth is not None:
            layer = torch.tensor([source.layer for source in self.sources], device=device)[turn]
        mean, std = prior.normalizer.statistics(layer, device)
        if prior.class_vectors:
            vectors = [prior.class_vectors[value] for value in sorted(prior.class_vectors)]
            table = torch.stack([*vectors, torch.full_like(vectors[0], torch.nan)]).to(device)
        if weigh:
            limits = [source.limit or torch.inf for source in self.sources]
            limit = torch.tensor(limits, dtype=torch.float32, device=device)[turn]
            # So that the mean over all rows is the mean over the others.
            scales = [len(source.store) / max(1, len(source.store) - source.massive) for source in self.sources]
            scale = torch.tensor(scales, dtype=torch.float32, device=device)[turn]

        def finish(x: Tensor, classes: Tensor | None) -> Batch:
            x, condition, weight = x.to(device), None, None
            if table is not None:
                none = len(table) - 1
                if self.label is None or classes is None:
                    condition = table[none:].expand(len(x), -1)
                else:
                    condition = table[classes.to(device).nan_to_num(none).long()]
            z = (x - mean) / std
            if limit is not None:
                usable = x.norm(dim=1) <= limit
                z, weight = torch.where(usable[:, None], z, 0.0), usable * scale
            return Batch(z, layer, condition, weight)

        return finish

    def _draw(self, like: Source, n: int) -> tuple[Tensor, Tensor | None]:
        """A sample of `n` rows of the same layer as another source, and their classes."""
        same = [s for s in self.sources if s.layer == like.layer]  # or siblings, for a prior of one layer
        source = next(iter(same or [s for s in self.sources if s.store.hook == like.store.hook]), None)
        if source is None or isinstance(source.store, ActivationStream) or source.store.d_in != like.store.d_in:
            raise InputError(
                f"no store of held-out rows at {like.store.hook}, of width {like.store.d_in}: "
                "collect held-out texts at the same hooks"
            )
        if not lm.same_point(*(s.store.manifest.hook_names for s in (source, like))):
            warnings.warn(
                f"validation on activations of {source.store.hook}, training on those of {like.store.hook}",
                stacklevel=2,
            )
        index = source.store.sample_index(n, seed=0)
        return source.store.take(index), None if source.classes is None else torch.from_numpy(source.classes[index, 0])


def layer_rows(rows: int, i: int, n: int) -> int:
    """Number of rows of the i-th of `n` layers among the first rows of a batch."""
    return -(-(rows - i) // n)


def _layers(stores: list[Store], lm_layers: int | None) -> tuple[list[int | None], int | None]:
    """Layer of each store and number of layers of the language model; None without conditioning on the layer."""
    if not stores:
        raise InputError("no store to train on: pass at least one")
    if len(stores) == 1 and lm_layers is None:
        return [None], None
    first = stores[0]
    layers = [layer_of(store.hook) for store in stores]
    if None in layers or len(set(layers)) < len(layers):
        raise InputError(
            f"sibling stores are of different layers, got {', '.join(store.hook for store in stores)}: "
            "collect several blocks.N.* hook points"
        )
    kinds = {re.sub(r"\d+", "N", store.hook, count=1) for store in stores}
    if len(kinds) > 1:
        raise InputError(f"sibling stores are of one hook point in each layer, got {', '.join(sorted(kinds))}")
    for store in stores[1:]:
        for what, one, other in (
            ("width", first.d_in, store.d_in),
            ("language model", first.manifest.language_model, store.manifest.language_model),
            ("weights", first.manifest.source.get("weights"), store.manifest.source.get("weights")),
            ("texts", _rows(first), _rows(store)),
        ):
            if one != other:
                raise InputError(
                    f"the stores at {first.hook} and {store.hook} differ in {what}: expected siblings, as one collect "
                    "with several hooks makes them"
                )
    depth = lm_layers or first.manifest.source.get("model", {}).get("n_layers")
    if depth is None:
        raise InputError("the stores do not say how many layers the language model has: pass lm_layers=")
    if (highest := max(layer or 0 for layer in layers)) >= depth:
        raise InputError(f"layers run from 0 to {depth - 1} in this language model, got {highest}")
    return list(layers), int(depth)


def _rows(store: Store) -> tuple[object, ...]:
    """What identifies the rows of siblings; streams, which grow independently, have only the corpus in common."""
    if isinstance(store, ActivationStream):
        return (True, store.manifest.source.get("corpus"))
    return (False, len(store), store.manifest.corpus_hash)


def _classes(
    stores: list[Store], label: str, vectors: Tensor | ClassVectors | None
) -> tuple[list[np.ndarray | None], ClassVectors]:
    """Class index of each row of each store, and the embeddings."""
    columns = []
    for store in stores:
        if isinstance(store, ActivationStream):
            raise InputError("a stream gives no labels with its batches: collect a store to condition on them")
        columns.append(store.column(label).astype(np.float64))
    present = np.unique(np.concatenate([column[column >= 0] for column in columns]))
    if not len(present):
        raise InputError(f"no row has a class: label {label!r} is negative or NaN everywhere")
    if vectors is None:
        if len(present) > _MOST_CLASSES:
            raise InputError(f"label {label!r} has {len(present)} classes, too many to tell apart one by one: pass "
                             "vectors (n_classes, d_condition)")  # fmt: skip
        known = dict(zip(present.tolist(), torch.eye(len(present), dtype=torch.float32), strict=True))
    elif isinstance(vectors, Tensor):
        if vectors.ndim != 2 or not vectors.isfinite().all():
            raise InputError(f"vectors must be finite, (n_classes, d_condition), got shape {tuple(vectors.shape)}")
        known = {float(value): vector.detach().cpu().float() for value, vector in enumerate(vectors)}
    else:
        known = vectors
    values = np.array(sorted(known))
    if strangers := sorted(set(present.tolist()) - set(known)):
        raise InputError(
            f"label {label!r} has classes without a vector, such as {strangers[0]:g}: expected "
            f"{values[0]:g} to {values[-1]:g}, a row of vectors for each"
        )
    indices: list[np.ndarray | None] = []
    for column in columns:
        index = np.searchsorted(values, column).astype(np.float32)
        index[~(column >= 0)] = np.nan
        indices.append(index[:, None])
    return indices, known
