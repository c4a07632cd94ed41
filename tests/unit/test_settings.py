"""Settings: each field is checked, documented where it stands, and an option of a command."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from glp_lens import pipeline
from glp_lens.errors import InputError
from glp_lens.settings import Settings, option, options

JOBS = [getattr(pipeline, name) for name in pipeline.__all__ if name.endswith("Job")]


def half(share: str | float) -> float:
    if share not in ("half", 0.5, 1.0):
        raise InputError(f"share must be 'half', got {share!r}")
    return 0.5 if share == "half" else float(share)


@dataclass(frozen=True, kw_only=True)
class Shared(Settings):
    """What two jobs have in common."""

    panel = "Shared"

    seed: int = option(0, min=0)
    """Of every
    random choice."""


@dataclass(frozen=True, kw_only=True)
class Job(Shared):
    """One with every kind of setting."""

    models: tuple[str, ...]
    """Needed."""
    sizes: tuple[int, ...] = option((1, 4), min=1, max=9, panel="Sizes")
    """Several."""
    rate: float = 1.0
    """A number."""
    pooling: Literal["last", "mean"] = "last"
    """A choice."""
    out: Path | None = None
    """A folder."""
    share: float = option(1.0, flag="--part", parse=half)
    """A text with a meaning."""


def test_every_setting_knows_what_its_option_needs():
    by_name = {each.name: each for each in options(Job)}
    assert list(by_name) == ["seed", "models", "sizes", "rate", "pooling", "out", "share"]
    assert by_name["seed"].help == "Of every random choice."
    assert (by_name["seed"].panel, by_name["rate"].panel, by_name["sizes"].panel) == ("Shared", "Shared", "Sizes")
    assert (by_name["sizes"].several, by_name["sizes"].type, by_name["rate"].several) == (True, int, False)
    assert (by_name["out"].optional, by_name["out"].type, by_name["share"].flag) == (True, Path, "--part")


def test_values_become_what_the_setting_is():
    kept = Job(models=[Path("a/b")], sizes=np.array([2, 3]), seed=np.int64(4), rate=np.float32(0.5))
    assert (kept.models, kept.sizes, kept.seed, kept.rate) == (("a/b",), (2, 3), 4, 0.5)
    assert {type(kept.seed), type(kept.sizes[0])} == {int}
    job = Job(models="a", sizes=[2, 3], rate=2, out="there", share="half")
    assert (job.models, job.sizes, job.rate, job.out, job.share) == (("a",), (2, 3), 2.0, Path("there"), 0.5)
    assert isinstance(job.rate, float)
    assert job.to_json() == {
        "seed": 0, "models": ["a"], "sizes": [2, 3], "rate": 2.0, "pooling": "last", "out": "there", "share": 0.5,
    }  # fmt: skip
    with pytest.raises(FrozenInstanceError):
        job.rate = 3.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"sizes": (1, 10)}, "sizes must be between 1 and 9, got 10"),
        ({"rate": float("nan")}, "rate must be a finite number, got nan"),
        ({"rate": "fast"}, "rate must be a number, got 'fast'"),
        ({"pooling": "max"}, "pooling must be one of last, mean, got 'max'"),
        ({"share": "third"}, "share must be 'half'"),
        ({"models": (3,)}, "models must be a text, got 3"),
    ],
)
def test_values_that_a_setting_cannot_have_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        Job(**{"models": ("a",), **changes})


@dataclass(frozen=True, kw_only=True)
class Another(Shared):
    """One that declares a name that another class declares apart."""

    rate: float = 7.0
    """Another number."""


def test_settings_take_over_what_a_common_class_declares():
    job = Job(models=("a",), seed=5, rate=3.0)
    assert Shared.of(job) == Shared(seed=5)
    assert Another.of(job) == Another(seed=5, rate=7.0)
    assert Another.of(job, rate=3.0) == Another(seed=5, rate=3.0)


def test_settings_work_where_no_source_is():
    code = (
        "from dataclasses import dataclass\n"
        "from glp_lens.evals.density.settings import DensitySettings\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(DensitySettings):\n    extra: int = 3\n"
        "print(Mine(draws=2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "draws=2" in done.stdout
    assert "extra=3" in done.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_every_setting_of_every_job_is_documented(job):
    for each in options(job):
        assert each.help.endswith("."), each.name
        assert each.panel


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
def test_one_name_has_one_kind_of_value(job):
    """An option that two commands share takes the same values in both, but for how many."""
    for each in options(job):
        for other in (o for another in JOBS for o in options(another) if o.name == each.name):
            assert other.type == each.type, each.name
            assert other.flag == each.flag, each.name
