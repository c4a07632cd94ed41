"""Activations of a language model on disk: collecting, storing, and reading them in shuffled batches."""

from glp_lens.activations.collect import collect
from glp_lens.activations.stats import Stats
from glp_lens.activations.store import ActivationStore, describe_store
from glp_lens.activations.writer import write_store

__all__ = ["ActivationStore", "Stats", "collect", "describe_store", "write_store"]
