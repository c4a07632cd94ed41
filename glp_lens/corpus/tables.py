"""Rows of csv, tsv, json, jsonl and parquet files, each with the place where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glp_lens.corpus.rows import Columns
from glp_lens.errors import InputError

if TYPE_CHECKING:
    import _csv

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its columns."""
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_LONGEST = 2**31 - 1
"""Characters of a csv field: the most that every platform allows. The csv module's own limit is 131,072."""


def read_csv(file: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a csv file, or of a tsv file, whose separator is the tab. All values are text, an empty one too.

    Raises:
        InputError: a column is missing, a row has more or fewer fields than the header, or its quotes are wrong.
    """
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_LONGEST)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        records = _records(csv.reader(lines, delimiter=separator, strict=True), str(file))
        place, header = next(records, (str(file), []))
        if not header:
            raise InputError(f"cannot read {file}: it is empty, expected a line with the names of its columns")
        if len(header) == 1 and header != [columns.text]:
            _check_separator(header[0], separator, place)
        fields = [(name, header.index(name)) for name in columns.names(header, str(file))]
        for place, record in records:
            if len(record) != len(header):
                raise _miscounted(place, record, len(header), _SEPARATORS[separator])
            yield place, {name: record[i] for name, i in fields}


def _records(reader: _csv._reader, file: str) -> Iterator[tuple[str, list[str]]]:
    """Rows that are not blank, each with the line that it begins in."""
    while True:
        place = f"{file}, line {reader.line_num + 1}"
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{place}: a quoted text must end before a separator, got {error}: "
                'write "" for each quote inside of a quoted text'
            ) from None
        if len(record) > 1 or "".join(record).strip():
            yield place, record


def _check_separator(header: str, separator: str, place: str) -> None:
    for other, name in _SEPARATORS.items():
        if other != separator and other in header:
            raise InputError(
                f"{place}: expected columns separated by a {_SEPARATORS[separator]}, got the one column {header!r} with "
                f"a {name}: use commas in .csv files and tabs in .tsv files"
            )


def _miscounted(place: str, record: list[str], expected: int, separator: str) -> InputError:
    if len(record) < expected:
        advice = "fill in what is missing, and put a text of several lines into double quotes"
    elif len(record) == expected + 1 and not record[-1].strip():
        advice = f"leave out the {separator} at the end, or name its column in the header"
    else:
        advice = f"put a text that holds a {separator} into double quotes"
    return InputError(f"{place}: expected as many fields as the header has, {expected}, got {len(record)}: {advice}")


def read_json(file: Path, columns: Columns) -> Iterator[Row]:
    """Objects of a json file, which holds an array of them, a single one, or one a line.

    Raises:
        InputError: it holds anything else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError) or error.msg != "Extra data":
            raise InputError(f"{file} is no JSON: {error}") from None
        yield from read_jsonl(file, columns)
        return
    for number, row in enumerate(found if isinstance(found, list) else [found], start=1):
        place = f"{file}, row {number}"
        yield place, _object(row, place)


def read_jsonl(file: Path, _columns: Columns) -> Iterator[Row]:
    """Objects of a jsonl file.

    Raises:
        InputError: see `json_lines`.
    """
    with file.open(encoding="utf-8-sig") as lines:
        yield from json_lines(lines, str(file))


def json_lines(lines: Iterable[str], source: str) -> Iterator[Row]:
    """Objects of lines, of which the blank ones are passed over.

    Raises:
        InputError: a line that is no JSON, or no object.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{place} is no JSON: {error}") from None
        yield place, _object(row, place)


def _object(row: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def read_parquet(file: Path, columns: Columns) -> Iterator[Row]:
    """Rows of a parquet file.

    Raises:
        InputError: a column is missing.
    """
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.ParquetFile(file)
    names = columns.names(table.schema_arrow.names, str(file))
    number = 0
    for batch in table.iter_batches(batch_size=1000, columns=names):
        for number, row in enumerate(batch.to_pylist(), start=number + 1):
            yield f"{file}, row {number}", row
