"""Columns of a table, of a file or of the Hub, and the documents that its rows become."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from glp_lens.corpus.documents import Document, beginning
from glp_lens.errors import InputError

TEXT = "text"
"""The text column if none is named. Where there is no such column, `messages` is read."""
MESSAGES = "messages"


@dataclass(frozen=True)
class Columns:
    """What to read of each row, and how long a piece of its text may be.

    Attributes:
        text: the column that holds a text, or a conversation: a list of messages with `role` and `content`.
        labels: columns of numbers.
        piece: longer texts are cut into pieces of at most this many characters; None keeps them whole.
    """

    text: str
    labels: tuple[str, ...]
    piece: int | None

    @classmethod
    def of(cls, text: str, labels: str | Sequence[str], piece: int | None) -> Columns:
        """The columns that a caller names.

        Raises:
            InputError: `piece` is under 1.
        """
        if piece is not None and piece < 1:
            raise InputError(f"piece must be at least 1 character or None, got {piece}")
        return cls(text, (labels,) if isinstance(labels, str) else tuple(labels), piece)

    def names(self, columns: Iterable[str], place: str) -> list[str]:
        """The text column, then the label columns, all of which a table has.

        Args:
            columns: those that the table has.
            place: the table, for the message.

        Raises:
            InputError: it lacks one, or has two of that name.
        """
        columns = list(columns)
        use_messages = self.text == TEXT and TEXT not in columns and MESSAGES in columns
        text = MESSAGES if use_messages else self.text
        if text not in columns:
            raise InputError(f"{place} has no text in {text!r}, found {_quoted(columns)}: name the text column")
        for name in (text, *self.labels):
            if name not in columns:
                raise InputError(f"{place} has no column {name!r}, found {_quoted(columns)}: name one of them")
            if columns.count(name) > 1:
                raise InputError(f"{place} has {columns.count(name)} columns {name!r}: rename all but one")
        return [text, *self.labels]

    def documents(self, row: Mapping[str, Any], source: str, place: str) -> Iterator[Document]:
        """The documents of a row: none if its text is empty or null, several if it is cut.

        Raises:
            InputError: a column is missing; it holds neither text nor messages; a label is no number.
        """
        column, *names = self.names(row, place)
        labels = tuple((name, _label(row[name], name, place)) for name in names)
        value = row[column]
        if isinstance(value, list):
            document = Document.chat(_messages(value, column, place), source, labels=labels)
            if document.text.strip():
                yield document
        elif isinstance(value, str):
            parts = pieces(value, self.piece)
            whole = beginning(value) if len(parts) > 1 else ""
            yield from (Document.of(part, source, labels=labels, whole=whole) for part in parts)
        elif value is not None:
            raise InputError(
                f"{place}: expected text or messages in {column!r}, got {str(value)[:40]!r} of type "
                f"{type(value).__name__}: name the text column"
            )


def _quoted(names: Sequence[str]) -> str:
    """Names of columns; in quotes where one is empty or has spaces around it, which would be invisible otherwise."""
    plain = all(name and name == name.strip() for name in names)
    return ", ".join(map(str, names) if plain else map(repr, names))


def pieces(text: str, size: int | None) -> list[str]:
    """A text without outer white space, cut at white space into pieces of at most `size` characters."""
    text = text.strip()
    if not text or size is None or len(text) <= size:
        return [text] if text else []
    # As much as fits up to white space; a run without any is cut where the piece is full.
    return [m[0].rstrip() for m in re.finditer(rf"\S(?:.{{0,{size - 1}}}(?=\s|\Z)|.{{0,{size - 1}}})", text, re.S)]


def _messages(value: list[Any], column: str, place: str) -> list[tuple[str, str]]:
    try:
        messages = [(message["role"], message["content"]) for message in value]
    except (KeyError, TypeError):
        messages = [(None, None)]
    if not all(isinstance(part, str) for message in messages for part in message):
        raise InputError(
            f"{place}: expected messages with a role and a content of text in {column!r}, "
            f"got {str(value)[:60]!r}: name a text column"
        )
    return messages


def _label(value: Any, name: str, place: str) -> int | float:
    try:
        number = parse_number(value)
        # A missing label is not zero, and a store holds 64 bits of a whole number.
        if abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number):
            return number
    except ValueError:
        pass
    raise InputError(f"{place}: label {name!r} must be a number, got {str(value)[:40]!r}: name a column of numbers")


def parse_number(value: Any) -> int | float:
    """A number, or a text that is one, as in csv files; whole numbers are exact.

    Raises:
        ValueError: neither, or NaN.
    """
    if isinstance(value, int):
        return int(value)
    # Decimals come from parquet files. Python takes 1_2 for 12.
    if not isinstance(value, Real | Decimal | str) or (isinstance(value, str) and "_" in value):
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if math.isnan(number := float(value)):
        raise ValueError("NaN is no number")
    return number
