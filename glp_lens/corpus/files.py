"""Documents of a user's own files, and of standard input."""

from __future__ import annotations

import io
import itertools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glp_lens.arguments import checked
from glp_lens.corpus.columns import TEXT, Columns
from glp_lens.corpus.documents import Document, not_empty
from glp_lens.corpus.tables import TABLES, Row, json_lines, kind_of, table_rows
from glp_lens.errors import InputError, first_line

STDIN = Path("-")
_KINDS = (".txt", *TABLES)


@checked
def from_files(
    paths: str | Path | Iterable[str | Path],
    text_column: str = TEXT,
    *,
    piece: int | None = 600,
    labels: str | Sequence[str] = (),
) -> Iterator[Document]:
    """Documents of text files: one a txt file, one a row of a table, one a line of standard input.

    Tables are csv, tsv, jsonl, json (an array of objects, or jsonl) and parquet files. A row whose text column holds
    a list of messages with `role` and `content` is a conversation, and is never cut. Rows are read as they are asked
    for.

    Args:
        paths: files, or folders that are searched for files of these kinds, in sorted order, but not in what is
            hidden, nor for json files, which must be named: a warning counts what is skipped. `-` is standard input:
            one document a line, or jsonl if the first line that is not blank starts with a brace.
        text_column: column or JSON key that holds the text or the messages; where there is no `text`, it is
            `messages`. Empty texts are left out.
        piece: longer texts become several documents of at most this many characters, cut at white space, so
            that a collection with a short context still sees all of a long text. None keeps texts whole. All
            pieces of a text are on one side of the held-out split.
        labels: columns of numbers that become labels of each document.

    Raises:
        InputError: a path does not exist or is of another kind; while reading: a file that cannot be read, a
            row without the columns or with more or fewer fields than the header, a label that is no number, or no
            text at all.
    """
    columns = Columns.of(text_column, labels, piece)
    skipped: Counter[str] = Counter()
    files = [file for path in _as_paths(paths) for file in _find(path, skipped)]
    if skipped:
        read = Counter("stdin" if file == STDIN else kind_of(file) for file in files)
        warnings.warn(f"read {_counted(read, 'files')}, skipped {_counted(skipped)}", stacklevel=2)
    names = ", ".join(map(str, files[:3]))
    return not_empty(_read_documents(files, columns), f"no text in {names}: every document is empty")


def read_rows(path: str | Path, text: str, others: Sequence[str] = ()) -> Iterator[Mapping[str, Any]]:
    """Rows of a csv, tsv, jsonl, json or parquet file, each with these columns. All values of csv and tsv are text.

    Raises:
        InputError: no such file, one of another kind or that cannot be read, a column is missing.
    """
    file, columns = Path(path), Columns.of(text, others, None)
    if not file.is_file() or kind_of(file) not in TABLES:
        raise InputError(f"expected a file of kind {', '.join(TABLES)}, got {path}: name one that exists")
    with _reading(str(file)):
        for place, row in _rows(file, columns):
            columns.names(row, place)
            yield row


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Turn the exceptions of a damaged file into one line."""
    try:
        yield
    except (OSError, UnicodeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        advice = ": save it as UTF-8" if isinstance(error, UnicodeError) else ""
        raise InputError(f"cannot read {place}: {first_line(error)}{advice}") from None


def _as_paths(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _counted(kinds: Mapping[str, int], noun: str = "") -> str:
    """For example `12 files (.csv 2, .txt 10)`."""
    number = f"{sum(kinds.values())} {noun}".rstrip()
    return f"{number} ({', '.join(f'{kind} {n}' for kind, n in sorted(kinds.items()))})"


def _find(path: Path, skipped: Counter[str]) -> list[Path]:
    """The file itself, or the text files of a folder, sorted; `skipped` counts what else is there."""
    kinds = ", ".join(_KINDS)
    if path == STDIN:
        return [path]
    with _reading(str(path)[:80]):  # also what cannot be the name of a file
        is_folder, is_file = path.is_dir(), path.is_file()
    if is_folder:
        here: Counter[str] = Counter()
        with _reading(f"folder {path}"):
            files = sorted(_search(path, here))
        if not files:
            skipped_here = f", found {_counted(here)}" if here else ""
            raise InputError(
                f"folder {path} holds no text files{skipped_here}: expected {kinds}; name json files one by one"
            )
        skipped += here
        return files
    if not is_file:
        raise InputError(f"text file {path} does not exist")
    if kind_of(path) not in _KINDS:
        raise InputError(f"cannot read {path}: expected a file of kind {kinds}")
    return [path]


def _search(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            skipped["hidden"] += 1
        elif entry.is_dir() and entry.is_symlink():  # it may lead back here
            skipped["linked folders"] += 1
        elif entry.is_dir():
            yield from _search(entry, skipped)
        elif not entry.is_file():
            skipped["dead links and devices"] += 1
        elif kind_of(entry) in _KINDS and kind_of(entry) != ".json":  # in a folder, those are settings as a rule
            yield entry
        else:
            skipped[kind_of(entry) or "no ending"] += 1


def _read_documents(files: list[Path], columns: Columns) -> Iterator[Document]:
    for file in files:
        is_stdin = file == STDIN
        source = "stdin" if is_stdin else file.name
        with _reading(source if is_stdin else str(file)):
            for place, row in _read_stdin(columns) if is_stdin else _rows(file, columns):
                yield from columns.documents(row, source, place)


def _read_stdin(columns: Columns) -> Iterator[Row]:
    # Strictly UTF-8, as files are: in some locales Python would take any bytes for text.
    raw = getattr(sys.stdin, "buffer", None)
    typed = sys.stdin if raw is None else io.TextIOWrapper(raw, encoding="utf-8")
    lines = (line.removeprefix("\ufeff") for line in typed)  # byte order marks, also of files that were joined
    head: list[str] = []
    while not head or not head[-1].strip():
        if (line := next(lines, None)) is None:
            return
        head.append(line)
    every = itertools.chain(head, lines)
    if head[-1].lstrip().startswith("{"):
        yield from json_lines(every, "stdin")
    elif _is_other_json(head[-1].strip()):
        raise InputError(
            f"stdin, line {len(head)}: expected a JSON object a line or plain text, got other JSON, "
            f'{head[-1].strip()[:40]!r}: write each text as {{"text": ...}} on a line of its own'
        )
    else:
        yield from (("stdin", {columns.text: line}) for line in every)


def _is_other_json(line: str) -> bool:
    """Whether a line is a JSON array or string, or begins an array of several lines."""
    try:
        return isinstance(json.loads(line), list | str)
    except (ValueError, RecursionError):
        return line == "[" or line.startswith("[{")


def _rows(file: Path, columns: Columns) -> Iterator[Row]:
    if kind_of(file) == ".txt":
        yield str(file), {columns.text: file.read_text(encoding="utf-8-sig")}
    else:
        with file.open("rb") as opened:
            yield from table_rows(opened, str(file), columns)
