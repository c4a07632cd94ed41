"""Settings of the probing suite and of its tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from glp_lens.errors import InputError
from glp_lens.evals.settings import SuiteSettings
from glp_lens.settings import Settings, option

DENSE, MEAN = "dense", "all"
"""Label of the logistic regression on all raw dimensions, an upper reference, and the `task` of means over tasks."""
Size = int | Literal["dense"]
Solver = Literal["newton", "lbfgs"]
Pooling = Literal["last", "mean", "max", "all"]
"""What of a text is a row: its last token, the mean or maximum over its tokens, or each token by itself."""


def parse_size(size: str | int) -> Size:
    """The number of features of a k-sparse probe, or `dense`.

    Raises:
        InputError: neither a whole number from 1 nor `dense`.
    """
    if size == "dense":
        return "dense"
    if isinstance(size, bool) or not str(size).isdecimal() or not int(size):
        raise InputError(f"ks must be numbers of features from 1, 'dense', or 'none' alone; got {size!r}")
    return int(size)


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Settings):
    """Which texts probing reads, and which of their tokens."""

    panel: ClassVar[str] = "Tasks"

    tasks: tuple[str, ...] = ()
    """Names or patterns of sae-probes' 113 tasks ('162_agnews_1,8*', of 'glp-lens tasks'), 'all' of them, or
    your own csv, tsv, jsonl, json or parquet files. By default one task from each of many families."""
    text_column: str = "text"
    """Column of the texts in your own files."""
    label_column: str = "label"
    """Column of the classes in your own files."""
    group_column: str | None = None
    """Column of your own files that says which texts belong together: they are never parted between training and test.
    By default equal texts."""
    split_column: str | None = None
    """Column of your own files that says train or test. By default a quarter is drawn for the test."""
    positive: str | None = None
    """Of your own classes, where there are more than two: the one against the rest."""
    probe_train: int = option(1024, min=0, memory=True)
    """Most training texts a task; 0 takes all."""
    probe_test: int = option(1024, min=0, memory=True)
    """Most test texts a task; 0 takes all."""
    pooling: Pooling = "last"
    """What of a text is a row: its last token, the mean or max over its tokens, or all of them."""


@dataclass(frozen=True, kw_only=True)
class ProbingSettings(SuiteSettings):
    """What decides the numbers of `probing.run`, besides models and data, and the noise levels a GLP is read at."""

    panel: ClassVar[str] = "Probes"

    sigmas: tuple[float, ...] = option((0.1,), min=0, max=1)
    """Noise levels at which a GLP's meta-neurons are read. The first is compared; more are shown as a sweep, and side
    by side as one set of features."""
    ks: tuple[Size, ...] = option((1, 2, 5, 16, 64, 128), min=1, parse=parse_size)
    """Numbers of features of the k-sparse probes, 'dense' for all of them; or 'none'."""
    sparse_solver: Solver = "newton"
    """How a k-sparse probe is fitted: newton to its optimum; lbfgs, far slower, as sae-probes does, whose solver may
    stop short of it."""
    seeds: int = option(3, min=1)
    """Noise seeds of models with randomness, each of which chooses its own features."""
    max_features: int = option(512, min=1, memory=True)
    """Features that the paper's mode chooses among: those with the largest class-mean difference."""
    sizes: tuple[int, ...] = option(tuple(4**i for i in range(10)), min=1)
    """Numbers of features of the curves at equal count; those above a model's own number are left out."""
    resamples: int = option(2000, min=1, memory=True)
    """Bootstrap samples of intervals over tasks."""

    def __post_init__(self) -> None:
        """Check each setting; 'none' is no k-sparse probes at all."""
        self.take_none_for_empty("ks")
        super().__post_init__()
        if not self.sigmas or len(set(self.sigmas)) < len(self.sigmas):
            raise InputError(f"sigmas must hold at least one noise level, and each once, got {list(self.sigmas)}")
