"""Activations of a language model on disk: collecting, storing, and reading them in shuffled batches."""

from glp_lens.activations.collect import Generation, collect
from glp_lens.activations.describe import describe_store
from glp_lens.activations.merge import merge
from glp_lens.activations.repair import repair
from glp_lens.activations.stats import Stats
from glp_lens.activations.store import ActivationStore
from glp_lens.activations.stream import ActivationStream
from glp_lens.activations.torch_data import StoreDataset
from glp_lens.activations.writer import write_store

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "Generation",
    "Stats",
    "StoreDataset",
    "collect",
    "describe_store",
    "merge",
    "repair",
    "write_store",
]
