"""Documents, and operations on sequences of them: deduplication, held-out split, order, limit.

Each takes and gives an iterable of documents and reads no further than needed, so a corpus may be larger than memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import xxhash

from glp_lens.arguments import checked
from glp_lens.errors import InputError, counted

Split = Literal["train", "heldout", "all"]
HELD_OUT = 20
"""One text of this many, chosen by the hash of its beginning, is kept for evaluation."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: xxh3-64 of the text: the same text has the same id everywhere.
        text: of a conversation, its contents joined by newlines.
        source: the dataset or file it came from.
        labels: names and values of the numbers that belong to the whole document.
        messages: roles and contents of a conversation, for a chat template; empty for plain text.
        whole: the beginning of the text that this one was cut from; empty stands for that of `text` itself.
    """

    id: int
    text: str
    source: str
    labels: tuple[tuple[str, int | float], ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    whole: str = ""

    @classmethod
    @checked
    def of(
        cls, text: str, source: str = "", *, labels: tuple[tuple[str, int | float], ...] = (), whole: str = ""
    ) -> Document:
        """A document with the id of its text."""
        return cls(text_id(text), text, source, labels, whole=whole)

    @classmethod
    @checked
    def chat(
        cls,
        messages: Iterable[tuple[str, str]],
        source: str = "",
        *,
        labels: tuple[tuple[str, int | float], ...] = (),
    ) -> Document:
        """A conversation of roles and contents; its id is that of the contents joined by newlines."""
        messages = tuple(messages)
        text = "\n".join(content for _, content in messages)
        return cls(text_id(text), text, source, labels, messages)


@checked
def beginning(text: str) -> str:
    """A key that copies of a text share though datasets cut, space and capitalise them differently: 60 characters."""
    return text_key(text)


@checked
def distinct(documents: Iterable[Document], by: Literal["text", "beginning"] = "text") -> Iterator[Document]:
    """The first document of each text, or of each beginning. Keeps a hash of each in memory, about 80 bytes.

    Raises:
        InputError: `by` is neither.
    """
    if by not in ("text", "beginning"):
        raise InputError(f"by must be text or beginning, got {by!r}")
    seen: set[int] = set()

    def is_new(document: Document) -> bool:
        key = document.id if by == "text" else _hash(_beginning_of(document))
        before = len(seen)
        seen.add(key)
        return len(seen) > before

    return filter(is_new, documents)


@checked
def of_split(documents: Iterable[Document], split: Split) -> Iterator[Document]:
    """The documents of a split: `heldout` is a twentieth, `train` the others, `all` is both.

    The hash of the beginning decides, so texts that begin alike are on one side, and so are all pieces of one
    text. Nothing else does: order, seed, cap, dedup and the size of pieces never move a text. System messages
    are passed over, since many conversations share one.

    Raises:
        InputError: no such split.
    """
    check_split(split)
    return (d for d in documents if split == "all" or _held_out(d) == (split == "heldout"))


def check_split(split: str) -> None:
    """Raises InputError unless it is a split."""
    if split not in get_args(Split):
        raise InputError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")


@checked
def limit(documents: Iterable[Document], n: int) -> Iterator[Document]:
    """The first `n` documents.

    Raises:
        InputError: `n` is under 1.
    """
    if n < 1:
        raise InputError(f"the number of documents must be at least 1, got {n}")
    return itertools.islice(documents, n)


@checked
def ordered(documents: Iterable[Document], seed: int = 0) -> list[Document]:
    """Documents in a seeded order that depends on nothing but their texts: that of a keyed hash."""
    return sorted(documents, key=lambda d: _hash(d.text, seed))


@checked
def shuffled(documents: Iterable[Document], buffer: int, seed: int = 0) -> Iterator[Document]:
    """Every document exactly once, in a seeded order, holding at most `buffer` and one more in memory.

    Each draw is from the next `buffer + 1` documents not yet given: a text seldom moves forward by much more
    than that, so a corpus sorted by topic stays roughly sorted.

    Raises:
        InputError: the buffer is under 1.
    """
    if buffer < 1:
        raise InputError(f"the shuffle buffer must hold at least 1 document, got {buffer}")
    # Raw bits: NumPy promises them to be the same in every version, unlike what it draws from them.
    return _shuffled(documents, buffer, np.random.Philox(seed % 2**64))


def _shuffled(documents: Iterable[Document], buffer: int, bits: np.random.Philox) -> Iterator[Document]:
    waiting: list[Document] = []

    def draw() -> Document:
        i = int(bits.random_raw()) % len(waiting)
        waiting[i], waiting[-1] = waiting[-1], waiting[i]
        return waiting.pop()

    for document in documents:
        waiting.append(document)
        if len(waiting) > buffer:
            yield draw()
    while waiting:
        yield draw()


@checked
def split_documents(texts: Iterable[str | Document], split: Split = "train", *, seed: int = 0) -> list[Document]:
    """Distinct documents of a split in a seeded order, split as `packaged` is: by the hash of the beginning.

    Raises:
        InputError: the split is empty.

    Examples:
        >>> from glp_lens.corpus import split_documents
        >>> texts = [f"text number {i}" for i in range(100)]
        >>> train, heldout = (split_documents(texts, split) for split in ("train", "heldout"))
        >>> len(train) + len(heldout), {d.id for d in train} & {d.id for d in heldout}
        (100, set())
    """
    documents = list(distinct(t if isinstance(t, Document) else Document.of(t) for t in texts))
    chosen = ordered(of_split(documents, split), seed)
    if not chosen:
        raise InputError(f"no text falls into the {split} split of {counted(len(documents), 'text')}: pass more texts")
    return chosen


def not_empty(documents: Iterable[Document], message: str) -> Iterator[Document]:
    """The documents; an InputError with this message, once they are read, if there are none."""
    document = None
    for document in documents:
        yield document
    if document is None:
        raise InputError(message)


def text_id(text: str) -> int:
    """The id of a document with this text. Nothing is checked: a corpus has hundreds of thousands of texts."""
    return _hash(text)


def text_key(text: str) -> str:
    """The `beginning` of a text, likewise."""
    return " ".join(text.lstrip()[:240].split()).casefold()[:60]


def _hash(text: str, seed: int = 0) -> int:
    # Half a surrogate pair, which JSON may hold, has no UTF-8, but still a hash.
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"), seed % 2**64)


def _beginning_of(document: Document) -> str:
    contents = "\n".join(content for role, content in document.messages if role != "system")
    return text_key(contents) or text_key(document.text)


def _held_out(document: Document) -> bool:
    return _hash(document.whole or _beginning_of(document)) % HELD_OUT == 0
