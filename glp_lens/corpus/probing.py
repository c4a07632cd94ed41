"""The packaged corpus: the text of the datasets of sae-probes.

They are probing tasks too, so the split of the tasks is defined here, and no text that begins like a task's test
prompt is ever part of the corpus.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from tqdm.auto import tqdm

from glp_lens.arguments import checked
from glp_lens.corpus.documents import Document, Split, check_split, of_split, text_id, text_key
from glp_lens.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


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


@checked
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


@checked
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


@checked
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
    check_split(split)
    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share}")
    # Sorting by a keyed hash is a shuffle that depends on the texts and the seed alone.
    corpus = _texts(min_characters, max_characters)
    keys = [xxhash.xxh3_64_intdigest(text.encode(errors="surrogatepass"), seed % 2**64) for text in corpus["text"]]
    corpus = corpus.iloc[np.argsort(np.array(keys, dtype=np.uint64))]
    cap = _cap(corpus["source"].value_counts().to_numpy(), share)
    corpus = corpus[corpus.groupby("source").cumcount() < cap]
    columns = (corpus["text"], corpus["source"], corpus["whole"])
    documents = (
        Document(text_id(text), text, source, whole=whole) for text, source, whole in zip(*columns, strict=True)
    )
    return list(of_split(documents, split))


@lru_cache(maxsize=1)
def _texts(min_characters: int, max_characters: int) -> pd.DataFrame:
    """All texts that the packaged corpus may use, distinct, as `text`, `source` and `whole` (see `Document`).

    A text that stands in several datasets belongs to the first by name. Kept in memory (15 MB), since reading
    takes seconds and a run needs both the training and the held-out texts.
    """
    import pandas as pd

    files = sorted((probing_folder() / "cleaned_data").glob("*.csv.zst"), key=lambda file: file.name)
    binary = set(binary_datasets())
    tables: list[pd.DataFrame] = []
    tested: set[str] = set()
    for file in tqdm(files, desc="read corpus", unit="file", mininterval=2, delay=2, leave=False):
        name = file.name.removesuffix(".csv.zst")
        table = read_dataset(name)
        prompts = table["prompt"].astype(str).str.strip()
        if name in binary:
            _, test = official_split(binary_labels(table["target"]))
            tested.update(map(text_key, prompts.iloc[test]))
        long = prompts[prompts.str.len() >= min_characters]
        # The beginning is taken before the cut, so that no `max_characters` hides a test prompt or moves a text to
        # the other split.
        columns = {"text": long.str[:max_characters], "source": name, "whole": long.map(text_key)}
        tables.append(pd.DataFrame(columns))
    corpus = pd.concat(tables, ignore_index=True).drop_duplicates("text")
    return corpus[~corpus["whole"].isin(tested)]


def _cap(counts: np.ndarray, share: float) -> int:
    """The largest number of texts a source may give so that none has more than `share` of them all."""
    cap = int(counts.max())
    while cap > (limit := int(share * np.minimum(counts, cap).sum())):
        cap = limit
    if cap < 1:
        raise InputError(f"share must be at least 1/{len(counts)} for {len(counts)} datasets, got {share:g}")
    return cap
