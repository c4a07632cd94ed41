"""Open a corpus by its name: the packaged texts, files, standard input, or a dataset of the Hub."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from glp_lens.arguments import checked
from glp_lens.corpus.columns import TEXT
from glp_lens.corpus.documents import (
    Document,
    Split,
    check_split,
    distinct,
    limit,
    not_empty,
    of_split,
    ordered,
    shuffled,
)
from glp_lens.corpus.files import STDIN, from_files
from glp_lens.corpus.hub import from_hub
from glp_lens.corpus.probing import packaged
from glp_lens.errors import InputError

CHARACTERS_PER_TOKEN = 5
"""At least what English text has: a piece of this many for each token of the context fills the context."""
HUB = "hf:"


@checked
def open_corpus(
    spec: str | Sequence[str] = "",
    *,
    split: Split = "train",
    seed: int = 0,
    context: int | None = 128,
    text_column: str = TEXT,
    labels: str | Sequence[str] = (),
    dedup: bool = True,
    max_documents: int | None = None,
    stream: bool = False,
    shuffle_buffer: int = 10_000,
    revision: str | None = None,
) -> Iterable[Document]:
    """The documents of a corpus in a seeded order; the same call gives the same ones again.

    Args:
        spec: empty for the packaged corpus, `-` for standard input (which can be read only once),
            `hf:NAME[:CONFIG[:SPLIT]]` for a dataset of the Hub, else a file or folder; or several of them.
        split: side of the held-out split, see `of_split`. It is taken first, before order and cap.
        seed: chooses the order.
        context: tokens that a collection reads of a document: longer texts are cut into pieces that fill it.
            None keeps them whole. Texts of the packaged corpus are short already.
        text_column: column of the text or of the messages.
        labels: columns of numbers that become labels of each document.
        dedup: keep only the first document of each text. The packaged corpus has no others.
        max_documents: keep so many, the first in the seeded order.
        stream: read the texts as they are asked for, for more than fit into memory; the order is then that of
            a shuffle buffer. Datasets of the Hub are always streamed.
        shuffle_buffer: documents in that buffer; 0 keeps the order of the files.
        revision: of a dataset of the Hub.

    Raises:
        InputError: bad options; a source that cannot be read, or (when streamed: while reading) has no text in
            the split.
    """
    check_split(split)
    if max_documents is not None and max_documents < 1:
        raise InputError(f"max_documents must be at least 1, got {max_documents}")
    if shuffle_buffer < 0:
        raise InputError(f"shuffle_buffer must be at least 0, got {shuffle_buffer}")
    sources = [source for source in ([spec] if isinstance(spec, str) else spec) if source]
    if not sources:
        if labels:
            raise InputError("the packaged corpus has no label columns: pass files, or leave out the labels")
        return packaged(seed, split)[:max_documents]
    piece = None if context is None else CHARACTERS_PER_TOKEN * context
    files = [source for source in sources if not source.startswith(HUB)]
    on_hub = [source for source in sources if source.startswith(HUB)]
    documents = itertools.chain(
        from_files(files, text_column, piece=piece, labels=labels) if files else (),
        *(_open_hub(s, text_column=text_column, labels=labels, revision=revision, piece=piece) for s in on_hub),
    )
    # Dedup comes first and in the order of the sources: else the seed would choose which of two texts that share
    # a piece keeps it, and the piece could change sides.
    chosen = of_split(distinct(documents) if dedup else documents, split)
    if stream or on_hub:
        chosen = shuffled(chosen, shuffle_buffer, seed) if shuffle_buffer else chosen
    else:
        chosen = iter(ordered(tqdm(chosen, desc="read texts", unit="doc", mininterval=2, delay=2, leave=False), seed))
    chosen = limit(chosen, max_documents) if max_documents else chosen
    chosen = not_empty(chosen, f"no text falls into the {split} split: pass more texts")
    return chosen if stream or on_hub else list(chosen)


@checked
def check_texts(spec: str | Sequence[str], text_column: str = TEXT, labels: str | Sequence[str] = ()) -> None:
    """Look at the first text of each file or folder: for callers whose other work would come before a mistake is seen.

    Args:
        spec: as that of `open_corpus`; of standard input and the Hub nothing is read.
        text_column: column of the text or of the messages.
        labels: columns of numbers.

    Raises:
        InputError: a path that does not exist or cannot be read, a column that is missing, or no text at all.
    """
    for source in [spec] if isinstance(spec, str) else spec:
        if source and not source.startswith(HUB) and Path(source) != STDIN:
            with warnings.catch_warnings(action="ignore"):  # they are told when all of it is read
                next(iter(from_files(source, text_column, labels=labels)))


def _open_hub(
    source: str, *, text_column: str, labels: str | Sequence[str], revision: str | None, piece: int | None
) -> Iterator[Document]:
    parts = source.removeprefix(HUB).split(":")
    if not parts[0] or len(parts) > 3:
        raise InputError(
            f"expected {HUB}NAME[:CONFIG[:SPLIT]], got {source!r}: write for example {HUB}stanfordnlp/imdb"
        )
    name, config, split = [*parts, "", ""][:3]
    return from_hub(
        name,
        split=split or "train",
        config=config or None,
        text_column=text_column,
        labels=labels,
        revision=revision,
        piece=piece,
    )
