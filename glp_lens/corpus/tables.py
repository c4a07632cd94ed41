"""Rows of csv, tsv, json, jsonl and parquet files, each with its place in the file for error messages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from glp_lens.corpus.columns import Columns
from glp_lens.errors import InputError
from glp_lens.limits import check_expansion

Row = tuple[str, Mapping[str, Any]]
"""Place of a row, for error messages, and its columns."""
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Kinds of files that have columns."""
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_LONGEST = 2**31 - 1
"""Characters of a csv field: the most that every platform allows. The csv module's own limit is 131,072."""


def table_rows(opened: BinaryIO, source: str, columns: Columns, separator: str | None = None) -> Iterator[Row]:
    """Rows of an opened file, whose kind is the ending of its name. All values of csv and tsv files are text.

    A json file holds an array of objects, a single one, or one a line. The separator of a csv file is a comma, of a tsv
    file a tab, unless given.

    Raises:
        InputError: a column is missing; a row of a csv file has more or fewer fields than the header, or wrong quotes;
            json or jsonl that holds anything but objects.
    """
    kind = kind_of(source)
    if kind == ".parquet":
        yield from _parquet_rows(opened, source, columns)
        return
    text = io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")
    if kind == ".jsonl":
        yield from json_lines(text, source)
    elif kind == ".json":
        yield from _json_rows(text.read(), source)
    else:
        yield from _csv_rows(text, source, columns, separator or ("\t" if kind == ".tsv" else ","))


def kind_of(file: str | Path) -> str:
    """The ending of a file's name, in small letters."""
    return PurePath(file).suffix.lower()


def _csv_rows(lines: Iterable[str], source: str, columns: Columns, separator: str) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST)
    records = _records(lines, source, separator)
    place, header = next(records, (source, []))
    if not header:
        raise InputError(f"cannot read {source}: it is empty, expected a line with the names of its columns")
    if len(header) == 1 and header != [columns.text]:
        _check_separator(header[0], separator, place)
    header = [name.strip() for name in header]
    fields = [(name, header.index(name)) for name in columns.names(header, source)]
    for place, record in records:
        if any(field.lstrip().startswith('"') and field[0].isspace() for field in record):
            raise InputError(f"{place}: a text in double quotes must begin right behind the separator: leave out the "
                             "space before it")  # fmt: skip
        if len(record) != len(header):
            raise _miscounted(place, record, len(header), _SEPARATORS.get(separator, repr(separator)))
        yield place, {name: record[i] for name, i in fields}


def _records(lines: Iterable[str], source: str, separator: str) -> Iterator[tuple[str, list[str]]]:
    """Rows that are not blank, each with the line that it begins in."""
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        place = f"{source}, line {reader.line_num + 1}"
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
                f"{place}: expected a {_SEPARATORS.get(separator, repr(separator))} between columns, got one column, "
                f"{header!r}, with a {name}: use commas in .csv files and tabs in .tsv files"
            )


def _miscounted(place: str, record: list[str], expected: int, separator: str) -> InputError:
    if len(record) < expected:
        advice = "fill in what is missing, and put a text of several lines into double quotes"
    elif len(record) == expected + 1 and not record[-1].strip():
        advice = f"leave out the {separator} at the end, or name its column in the header"
    else:
        advice = f"put a text that holds a {separator} into double quotes"
    return InputError(f"{place}: expected as many fields as the header has, {expected}, got {len(record)}: {advice}")


def _json_rows(text: str, source: str) -> Iterator[Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InputError(f"{source} is no JSON: {error}") from None
        yield from json_lines(io.StringIO(text), source)
        return
    except RecursionError as error:
        raise InputError(f"{source} is no JSON: {error}") from None
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        place = f"{source}, row {number}"
        yield place, _object(row, place)


def json_lines(lines: Iterable[str], source: str) -> Iterator[Row]:
    """JSON objects, one a line; blank lines are skipped.

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


def _parquet_rows(opened: BinaryIO, source: str, columns: Columns) -> Iterator[Row]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.ParquetFile(opened)
    names = columns.names(table.schema_arrow.names, source)
    size = opened.seek(0, io.SEEK_END)
    groups = [table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups)]
    check_expansion(max(groups, default=0), size, source)  # a group's pages are unpacked together
    number = read = 0
    for batch in table.iter_batches(batch_size=1000, columns=names):
        read += batch.nbytes  # one value may stand for any number of rows
        check_expansion(read, size, source)
        for row in batch.to_pylist():
            number += 1
            yield f"{source}, row {number}", row
