"""Documents of a Hugging Face dataset, streamed."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from glp_lens.arguments import checked
from glp_lens.corpus.columns import TEXT, Columns
from glp_lens.corpus.documents import Document, not_empty, shuffled
from glp_lens.corpus.tables import Row, kind_of, table_rows
from glp_lens.errors import InputError, first_line
from glp_lens.limits import check_expansion

if TYPE_CHECKING:
    import datasets

_PLAIN = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
"""Kinds of files that are read as `from_files` reads them."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@checked
def from_hub(
    name: str,
    *,
    split: str = "train",
    config: str | None = None,
    text_column: str = TEXT,
    labels: str | Sequence[str] = (),
    revision: str | None = None,
    piece: int | None = None,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> Iterator[Document]:
    """Documents of a dataset of the Hugging Face Hub, one a row, downloaded as they are asked for.

    No code of the dataset is run. A conversation, a list of messages with `role` and `content`, is never cut.

    Args:
        name: a dataset, such as `stanfordnlp/imdb`, or a local folder of jsonl, csv, tsv or parquet files.
        split: the dataset's own split; the held-out split of this library is made of any of them.
        config: the dataset's configuration, if it has several.
        text_column: column that holds the text or the messages; where there is no `text`, it is `messages`.
        labels: columns of numbers that become labels of each document.
        revision: branch, tag or commit; only a commit gives the same documents for ever.
        piece: see `from_files`.
        shuffle_buffer: over 0, documents are drawn from a buffer of this many, see `shuffled`.
        seed: seed of the draws.

    Raises:
        InputError: no such dataset, configuration or split, or no network; csv files with options of reading other
            than the separator; while reading: the same as `from_files`.
    """
    columns = Columns.of(text_column, labels, piece)
    if shuffle_buffer < 0:
        raise InputError(f"shuffle_buffer must be at least 0, got {shuffle_buffer}")
    import datasets

    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        files = _plain_files(builder, split)
        streamed = builder.as_streaming_dataset(split=split)
        if not files and streamed.column_names is not None:  # unread columns, of images say, are not decoded
            streamed = streamed.select_columns(columns.names(streamed.column_names, f"dataset {name}"))
    except Exception as error:
        raise _unreadable(name, error) from None
    rows = _rows_of_files(files, columns, builder) if files else _rows_of_dataset(streamed, name)
    documents = not_empty(_read_documents(rows, columns, name), f"no text in dataset {name}: every document is empty")
    return shuffled(documents, shuffle_buffer, seed) if shuffle_buffer else documents


def _plain_files(builder: datasets.DatasetBuilder, split: str) -> list[str]:
    """Files of a split, if they are tables without declared types or reading options; else none.

    `datasets` would cast all rows to the types of the first ones (5 to true). In csv files it also takes the first
    field of a row that is too long for an index, `NA` for nothing, and a null character for the end of a text: it
    never reads them here, and what their types are declared to be is left to the columns that are read.

    Raises:
        InputError: csv files that cannot be read otherwise.
    """
    import datasets

    is_csv = builder.name == "csv"

    by_split = builder.config.data_files or {}
    names = list(map(str, by_split)) if split == "all" else split.split("+")
    files = [file for name in names if name in by_split for file in by_split[name]]
    kinds = {kind_of(_uncompressed(file)) for file in files}
    if len(kinds) == 1 and kinds <= set(_PLAIN) and (is_csv or builder.info.features is None):
        own = [field.name for field in dataclasses.fields(datasets.BuilderConfig)] + ["sep"] * is_csv
        if builder.config == type(builder.config)(**{name: getattr(builder.config, name) for name in own}):
            return files
    if is_csv and files:
        raise InputError(
            f"csv files of dataset {builder.dataset_name} are archived or have options of reading "
            f"({', '.join(sorted(kinds))}), with which rows may be misread: download them and pass the files"
        )
    return []


def _uncompressed(file: str) -> str:
    """A file's name without the ending that says how it is compressed."""
    return str(file)[: -len(kind)] if (kind := kind_of(file)) in _COMPRESSED else str(file)


def _rows_of_files(files: list[str], columns: Columns, builder: datasets.DatasetBuilder) -> Iterator[Row]:
    import datasets
    from datasets.utils.file_utils import xopen
    from fsspec.compression import compr  # type: ignore[import-untyped]
    from fsspec.utils import infer_compression  # type: ignore[import-untyped]

    access = datasets.DownloadConfig(token=builder.token, storage_options=builder.storage_options)
    separator = getattr(builder.config, "sep", None)
    for file in files:
        with xopen(file, "rb", download_config=access) as opened:
            plain = compr[infer_compression(file)](opened, mode="rb") if kind_of(file) in _COMPRESSED else opened
            if plain is not opened:
                plain = io.BufferedReader(_Unpacking(plain, opened, file))
            yield from table_rows(plain, _uncompressed(file), columns, separator)


class _Unpacking(io.RawIOBase):
    """An unpacked file that is refused where it is very many times the size of what it was unpacked from."""

    def __init__(self, unpacked: BinaryIO, packed: BinaryIO, name: str) -> None:
        self._unpacked, self._packed, self._name, self._count = unpacked, packed, name, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes."""
        data = self._unpacked.read(len(buffer))
        buffer[: len(data)] = data
        self._count += len(data)
        check_expansion(self._count, self._packed.tell(), self._name)
        return len(data)


def _rows_of_dataset(rows: datasets.IterableDataset, name: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield f"dataset {name}, row {number}", row


def _read_documents(rows: Iterator[Row], columns: Columns, name: str) -> Iterator[Document]:
    while True:
        try:
            place, row = next(rows)
        except StopIteration:
            break
        except Exception as error:
            raise _unreadable(name, error) from None
        yield from columns.documents(row, name, place)


def _unreadable(name: str, error: Exception) -> InputError:
    """The error for whatever goes wrong while a dataset is read over the network."""
    if isinstance(error, InputError):
        return error
    reason = first_line(error).rstrip(".")
    return InputError(
        f"cannot read dataset {name}: {reason}; check its name, configuration, split, the columns of its files, and "
        "the network"
    )
