"""Documents of a user's own files, and of what is piped in."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glp_lens.corpus.documents import Document
from glp_lens.corpus.rows import TEXT, Columns
from glp_lens.errors import InputError

STDIN = Path("-")
TABLES = (".csv", ".jsonl", ".parquet")
"""Kinds of files that have columns."""
Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its columns."""


def from_files(
    paths: str | Path | Iterable[str | Path],
    text_column: str = TEXT,
    *,
    piece: int | None = 600,
    labels: str | Sequence[str] = (),
) -> Iterator[Document]:
    """Documents of text files: one a txt file, one a row of jsonl, csv or parquet, one a line of standard input.

    A row whose text column holds a list of messages with `role` and `content` is a conversation, and is never
    cut. Rows are read as they are asked for.

    Args:
        paths: files, or folders that are searched for files of these kinds, in sorted order; `-` is standard
            input: one document a line, or jsonl if the first line starts with a brace.
        text_column: column or JSON key that holds the text or the messages; where there is no `text`, it is
            `messages`. Empty texts are left out.
        piece: longer texts become several documents of at most this many characters, cut at white space, so
            that a collection with a short context still sees all of a long text. None keeps texts whole. All
            pieces of a text are on one side of the held-out split.
        labels: columns of numbers that become labels of each document.

    Raises:
        InputError: a path does not exist or is of another kind; while reading: a file that cannot be read, a
            row without the columns, a label that is no number, or no text at all.
    """
    columns = Columns.of(text_column, labels, piece)
    files = [file for path in _as_paths(paths) for file in _find(path)]
    return _read_documents(files, columns)


def read_rows(path: str | Path, text: str, others: Sequence[str] = ()) -> Iterator[Mapping[str, Any]]:
    """Rows of a csv, jsonl or parquet file, each with these columns. All values of a csv file are text.

    Raises:
        InputError: no such file, one of another kind or that cannot be read, a column is missing.
    """
    file, columns = Path(path), Columns.of(text, others, None)
    if not file.is_file() or file.suffix not in TABLES:
        raise InputError(f"expected a file of kind {', '.join(TABLES)}, got {path}: name one that exists")
    with _reading(str(file)):
        for place, row in _READERS[file.suffix](file, columns):
            columns.names(row, place)
            yield row


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turns what a damaged file raises into one line."""
    try:
        yield
    except (OSError, UnicodeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {place}: {str(error).splitlines()[0]}") from None


def _as_paths(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _find(path: Path) -> list[Path]:
    kinds = ", ".join(_READERS)
    if path == STDIN:
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
        if not files:
            raise InputError(f"folder {path} holds no text files: expected {kinds}")
        return files
    if not path.is_file():
        raise InputError(f"text file {path} does not exist")
    if path.suffix not in _READERS:
        raise InputError(f"cannot read {path}: expected a file of kind {kinds}")
    return [path]


def _read_documents(files: list[Path], columns: Columns) -> Iterator[Document]:
    empty = True
    for file in files:
        is_stdin = file == STDIN
        source = "stdin" if is_stdin else file.name
        with _reading(source if is_stdin else str(file)):
            for place, row in _read_stdin(columns) if is_stdin else _READERS[file.suffix](file, columns):
                for document in columns.documents(row, source, place):
                    empty = False
                    yield document
    if empty:
        raise InputError(f"no text in {', '.join(map(str, files[:3]))}: every document is empty")


def _read_stdin(columns: Columns) -> Iterator[Row]:
    first = next(sys.stdin, "")
    lines = itertools.chain([first], sys.stdin)
    if first.lstrip().startswith("{"):
        yield from _json_rows(lines, "stdin")
    else:
        yield from (("stdin", {columns.text: line}) for line in lines)


def _read_txt(file: Path, columns: Columns) -> Iterator[Row]:
    yield str(file), {columns.text: file.read_text(encoding="utf-8")}


def _read_jsonl(file: Path, _columns: Columns) -> Iterator[Row]:
    with file.open(encoding="utf-8") as lines:
        yield from _json_rows(lines, str(file))


def _json_rows(lines: Iterable[str], place: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{place}, line {number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{place}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield f"{place}, line {number}", row


def _read_csv(file: Path, columns: Columns) -> Iterator[Row]:
    import pandas as pd

    for table in pd.read_csv(file, chunksize=1000, dtype=str, keep_default_na=False):
        names = columns.names(table.columns, str(file))
        yield from ((str(file), row) for row in table[names].to_dict("records"))


def _read_parquet(file: Path, columns: Columns) -> Iterator[Row]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.ParquetFile(file)
    names = columns.names(table.schema_arrow.names, str(file))
    for batch in table.iter_batches(batch_size=1000, columns=names):
        yield from ((str(file), row) for row in batch.to_pylist())


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
