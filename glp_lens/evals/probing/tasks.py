"""Binary probing tasks: the names, families and splits of those of sae-probes, and the folds of any task.

Source: Kantamneni et al. 2025, "Are Sparse Autoencoders Useful? A Case Study in Sparse Probing", whose 113
binary data sets and split come with the `sae-probes` package.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from tqdm.auto import tqdm

from glp_lens import corpus
from glp_lens.arguments import checked
from glp_lens.errors import InputError

Indices = NDArray[np.int64]
SPLITS = ("official", "dedup")

DEFAULT_TASKS = (
    "5_hist_fig_ismale",  # entities: people
    "23_headline_ischina",  # topic of a headline
    "36_sciq_tf",  # truth of a science answer
    "87_glue_cola",  # grammar
    "92_glue_sst2",  # sentiment of film reviews
    "105_click_bait",  # style
    "114_nyc_borough_Manhattan",  # entities: buildings
    "124_world_country_United_States",  # entities: places
    "127_art_type_song",  # entities: works of art
    "133_context_type_Causality",  # kind of question
    "149_twt_emotion_happiness",  # emotion
    "151_it_tick_HR Support",  # topic of a help-desk ticket
    "155_athlete_sport_basketball",  # entities: athletes
)
"""A small set for a first look: one task a family, mostly short prompts."""

_FAMILIES = {
    "hist_fig": "historical figures",
    "wikidata": "wikidata",
    "headline": "headlines",
    "us_state": "places",
    "us_timezone": "places",
    "world_country": "places",
    "art_type": "art",
    "athlete_sport": "athletes",
    "nyc_borough": "new york",
    "news_class": "ag news and code",
    "agnews": "ag news and code",
    "code": "ag news and code",
    "glue_sst2": "film reviews",
    "movie_sent": "film reviews",
    "glue_mnli": "mnli",
    "hate": "hate",
    "twt_emotion": "tweets",
    "cm": "commonsense morality",
    "temp_cat": "temporal questions",
    "context_type": "context questions",
    "cancer_cat": "cancer",
    "disease_class": "disease",
    "it_tick": "it tickets",
}
_BIGRAMS = range(65, 86)

MISNAMED = {
    "139_news_class_Politics": "class 1 is world news (AG News class World)",
    "140_news_class_Technology": "class 1 is business news (AG News class Business)",
    "141_news_class_Entertainment": "class 1 is science and technology news (AG News class Sci/Tech)",
}
"""What class 1 of a task is where its name says something else."""


class Split(NamedTuple):
    """Row numbers into a task's texts."""

    train: Indices
    test: Indices


@dataclass(frozen=True)
class Task:
    """One binary classification task.

    Attributes:
        name: for example `162_agnews_1`.
        family: tasks of one family share prompts, so intervals resample whole families.
        texts: the texts in use, train rows first, then test rows.
        labels: `(n,)`, 0 or 1.
        classes: what 0 and 1 stand for.
        splits: `official`, and `dedup`: every text once, no group in both train and test, no text that
            occurs with both labels anywhere in the data set.
        groups: `(n,)`; texts of one group belong together. By default these are texts that are equal up to the
            white space around them.
        own_groups: whether the groups are a user's own, so that they also bind the folds of the official split.
        note: what a reader must know that the name does not say.
    """

    name: str
    family: str
    texts: tuple[str, ...]
    labels: Indices
    classes: tuple[str, str]
    splits: dict[str, Split]
    groups: Indices
    own_groups: bool = False
    note: str = ""

    def fold_groups(self, split: str) -> Indices | None:
        """The groups `(n,)` that folds of a split must keep together; None for the paper's folds of `official`."""
        return None if split == "official" and not self.own_groups else self.groups


@cache
def all_names() -> tuple[str, ...]:
    """Names of the 113 binary tasks, in the order of their numbers."""
    return tuple(sorted(corpus.binary_datasets(), key=lambda name: int(name.split("_", 1)[0])))


@checked
def names(patterns: str | Sequence[str] | None = None) -> list[str]:
    """Task names that match shell patterns, for example `162_agnews_1`, `*agnews*`; `*` or `all` for all of them.

    Without patterns, `DEFAULT_TASKS`.

    Raises:
        InputError: a pattern matches nothing.
    """
    if patterns is None:
        return list(DEFAULT_TASKS)
    known = all_names()
    matches: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in known if pattern == "all" or fnmatchcase(name, pattern)]
        if not hits:
            near = (difflib.get_close_matches(pattern, known, n=1, cutoff=0.3) or known[:1])[0]
            raise InputError(f"no probing task matches {pattern!r}: did you mean {near!r}? 'glp-lens tasks' lists them")
        matches |= dict.fromkeys(hits)
    return list(matches)


def overview(patterns: str | Sequence[str] | None = "all") -> pd.DataFrame:
    """A row for each task of `names(patterns)`, without its texts.

    Returns:
        The columns `task`, `family`, `texts` (their number, before any split), `class_0` and `class_1` (what the
        classes are called), `note` (see `note`), and `default`, whether it is one of `DEFAULT_TASKS`.

    Raises:
        InputError: a pattern matches nothing, or the data are not installed.
    """
    rows = []
    for name in tqdm(names(patterns), desc="read tasks", unit="task", mininterval=2, delay=2, leave=False):
        targets = corpus.read_dataset(name)["target"]
        low, high = map(str, np.unique(targets.to_numpy()))
        rows.append((name, family(name), len(targets), low, high, note(name), name in DEFAULT_TASKS))
    return pd.DataFrame(rows, columns=["task", "family", "texts", "class_0", "class_1", "note", "default"])


def family(name: str) -> str:
    """The family of a task: a fixed table by name.

    It joins the tasks made from one source and all tasks where over 1% of the smaller one's prompts are
    shared, among them AG News with the code sets, which take negatives from each other. A stray name or two
    in common (a person who is both a historical figure and an athlete) does not join families.
    """
    number, tag = name.split("_", 1)
    if int(number) in _BIGRAMS:
        return "bigrams"
    return next((title for prefix, title in _FAMILIES.items() if tag.startswith(prefix)), tag)


def families() -> dict[str, list[str]]:
    """The names of the tasks of each family, by the name of the family, in alphabetical order."""
    found: dict[str, list[str]] = {}
    for name in all_names():
        found.setdefault(family(name), []).append(name)
    return dict(sorted(found.items()))


def note(name: str) -> str:
    """A warning where the name of a task of sae-probes misleads, else an empty text."""
    if int(name.split("_", 1)[0]) in _BIGRAMS:
        return "class 1 is not_bigram: texts without the bigram"
    return MISNAMED.get(name, "")


@checked
def load(name: str, *, max_train: int | None = None, max_test: int | None = None) -> Task:
    """Read one task with its official split.

    Args:
        name: a full task name; `names` resolves patterns.
        max_train: use the first so many of the official, permuted train rows.
        max_test: likewise for test rows.

    Raises:
        InputError: unknown name, or the data are not installed.
    """
    if name not in all_names():
        names(name)  # raises with a hint, unless the name is a pattern
        raise InputError(f"expected one task name, got the pattern {name!r}: resolve it with tasks.names")
    table = corpus.read_dataset(name)
    values, labels = np.unique(table["target"].to_numpy(), return_inverse=True)
    train, test = corpus.official_split(labels)
    return build(
        name,
        table["prompt"].astype(str).tolist(),
        labels,
        train[:max_train],
        test[:max_test],
        family=family(name),
        classes=(str(values[0]), str(values[1])),
        note=note(name),
    )


@checked
def build(
    name: str,
    texts: Sequence[str],
    labels: ArrayLike,
    train: ArrayLike,
    test: ArrayLike,
    *,
    family: str | None = None,
    classes: tuple[str, str] = ("0", "1"),
    groups: ArrayLike | None = None,
    note: str = "",
) -> Task:
    """A task from all rows of a data set and the row numbers to train and test on.

    Rows in neither split are used only to find texts with contradictory labels.

    Args:
        name: of the task.
        texts: all texts of the data set.
        labels: 0 or 1 for each.
        train: row numbers, in the order in which folds are cut.
        test: likewise.
        family: by default the task is its own.
        classes: what 0 and 1 stand for.
        groups: a value for each text; texts with the same one are never parted between train and test of
            `dedup`, nor between folds. By default equal texts are a group, which the folds of the official split
            may part, as the paper's do.
        note: for readers of a report.

    Raises:
        InputError: labels other than 0 and 1, labels or groups of another length than `texts`.
    """
    y = np.asarray(labels)
    if y.shape != (len(texts),) or not np.isin(y, (0, 1)).all():
        raise InputError(f"task {name!r}: expected a label 0 or 1 for each of {len(texts)} texts, got shape {y.shape}")
    # Texts that differ only in the white space around them count as one.
    key, _ = pd.factorize(np.array([text.strip() for text in texts], dtype=object))
    given = key if groups is None else np.asarray(groups)
    if given.shape != y.shape:
        raise InputError(f"task {name!r}: expected a group for each of {len(texts)} texts, got shape {given.shape}")
    rows = np.concatenate([np.asarray(train, dtype=np.int64), np.asarray(test, dtype=np.int64)])
    position, n_train = np.arange(len(rows)), len(np.asarray(train))
    group, _ = pd.factorize(given[rows], use_na_sentinel=False)
    contradictory = np.isin(key, key[y == 0]) & np.isin(key, key[y == 1])
    usable = ~contradictory[rows]
    usable[n_train:] &= ~np.isin(group[n_train:], group[:n_train][usable[:n_train]])
    kept = position[usable][~pd.Series(key[rows[usable]]).duplicated().to_numpy()]  # train rows come first
    return Task(
        name=name,
        family=family or name,
        texts=tuple(texts[i] for i in rows),
        labels=y[rows].astype(np.int64),
        classes=classes,
        splits={
            "official": Split(position[:n_train], position[n_train:]),
            "dedup": Split(kept[kept < n_train], kept[kept >= n_train]),
        },
        groups=group.astype(np.int64),
        own_groups=groups is not None,
        note=note,
    )


def folds(labels: ArrayLike, groups: ArrayLike | None = None, n: int = 5) -> list[tuple[Indices, Indices]]:
    """Row numbers `(train, validation)` of each fold, in the order of the rows: nothing is shuffled.

    Without groups, or where none repeats, these are the stratified folds of the paper's code.

    Args:
        labels: `(n_rows,)`, 0 or 1.
        groups: `(n_rows,)`; rows of one group are never parted. See `Task.fold_groups`.
        n: how many folds.

    Raises:
        InputError: some fold would validate on one class alone.
    """
    y = np.asarray(labels)
    group = np.arange(len(y)) if groups is None else np.asarray(groups)
    grouped = len(np.unique(group)) < len(y)
    zeros, ones = (len(np.unique(group[y == label])) for label in (0, 1))
    pairs: list[tuple[Indices, Indices]] = []
    if min(zeros, ones) >= n:
        splitter = StratifiedGroupKFold(n) if grouped else StratifiedKFold(n)
        pairs = list(splitter.split(y[:, None], y, group if grouped else None))
    if not pairs or any(len(np.unique(y[validation])) < 2 for _, validation in pairs):
        raise InputError(
            f"{n} folds with both classes in each cannot be made of {zeros} and {ones} "
            f"{'groups' if grouped else 'rows'} of the two classes: use more rows or smaller groups"
        )
    return pairs
