"""Texts to collect activations from: the packaged corpus, a user's own files, and datasets of the Hub."""

from glp_lens.corpus.columns import parse_number
from glp_lens.corpus.documents import (
    HELD_OUT,
    Document,
    Split,
    beginning,
    distinct,
    limit,
    of_split,
    ordered,
    shuffled,
    split_documents,
)
from glp_lens.corpus.files import from_files
from glp_lens.corpus.hub import from_hub
from glp_lens.corpus.opening import CHARACTERS_PER_TOKEN, check_texts, open_corpus
from glp_lens.corpus.probing import (
    binary_datasets,
    binary_labels,
    official_split,
    packaged,
    probing_folder,
    read_dataset,
)

__all__ = [
    "CHARACTERS_PER_TOKEN",
    "HELD_OUT",
    "Document",
    "Split",
    "beginning",
    "binary_datasets",
    "binary_labels",
    "check_texts",
    "distinct",
    "from_files",
    "from_hub",
    "limit",
    "of_split",
    "official_split",
    "open_corpus",
    "ordered",
    "packaged",
    "parse_number",
    "probing_folder",
    "read_dataset",
    "shuffled",
    "split_documents",
]
