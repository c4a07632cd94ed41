"""Documents of a Hugging Face dataset, streamed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from glp_lens.corpus.documents import Document, shuffled
from glp_lens.corpus.rows import TEXT, Columns
from glp_lens.errors import InputError


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
        name: a dataset, such as `stanfordnlp/imdb`, or a local folder of jsonl, csv or parquet files.
        split: the dataset's own split; the held-out split of this library is made of any of them.
        config: the dataset's configuration, if it has several.
        text_column: column that holds the text or the messages; where there is no `text`, it is `messages`.
        labels: columns of numbers that become labels of each document.
        revision: branch, tag or commit; only a commit gives the same documents for ever.
        piece: see `from_files`.
        shuffle_buffer: over 0, documents are drawn from a buffer of this many, see `shuffled`.
        seed: seed of the draws.

    Raises:
        InputError: no such dataset, configuration or split, or no network; while reading: the same as
            `from_files`.
    """
    columns = Columns.of(text_column, labels, piece)
    if shuffle_buffer < 0:
        raise InputError(f"shuffle_buffer must be at least 0, got {shuffle_buffer}")
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        if rows.column_names is not None:  # unread columns, of images say, are not decoded
            rows = rows.select_columns(columns.names(rows.column_names, f"dataset {name}"))
    except Exception as error:
        raise _unreadable(name, error) from None
    documents = _read_documents(iter(rows), columns, name)
    return shuffled(documents, shuffle_buffer, seed) if shuffle_buffer else documents


def _read_documents(rows: Iterator[dict[str, Any]], columns: Columns, name: str) -> Iterator[Document]:
    empty = True
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            break
        except Exception as error:
            raise _unreadable(name, error) from None
        for document in columns.documents(row, name, f"dataset {name}, row {number}"):
            empty = False
            yield document
    if empty:
        raise InputError(f"no text in dataset {name}: every document is empty")


def _unreadable(name: str, error: Exception) -> InputError:
    """Whatever went wrong in a library that reads foreign data over the network, as one line."""
    if isinstance(error, InputError):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return InputError(f"cannot read dataset {name}: {reason}; check its name, configuration, split, and the network")
