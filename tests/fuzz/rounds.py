"""Rounds of a harness: each with a random generator and a folder of its own, some at once, counted by outcome."""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from tests.fuzz.world import World

FAULT = "FAULT"


@dataclass(frozen=True)
class Outcome:
    """What came of a round.

    Attributes:
        group: what it was about: a command, or a kind of file.
        kind: the outcome, `FAULT` for what must not be.
        what: what was done, enough to do it again by hand.
        said: the last line of what was said, or what is wrong.
        number: of the round.
    """

    group: str
    kind: str
    what: str
    said: str = ""
    number: int = 0


@dataclass(frozen=True)
class Harness:
    """A kind of fuzzing.

    Attributes:
        name: on the command line.
        about: one line of help.
        rounds: of a full run.
        one: does a round in a copy of the world's folder.
    """

    name: str
    about: str
    rounds: int
    one: Callable[[World, Path, random.Random, int], Outcome]


def run_rounds(
    harness: Harness, world: World, numbers: Sequence[int], *, seed: int, jobs: int = 1, progress: float | None = None
) -> list[Outcome]:
    """Do rounds; each depends on the seed and its number alone.

    Args:
        jobs: rounds at once.
        progress: seconds between two lines about how far it is; None for no such lines.
    """
    outcomes: list[Outcome] = []
    began = told = time.monotonic()
    for outcome in _outcomes(harness, world, numbers, seed, jobs):
        outcomes.append(outcome)
        now = time.monotonic()
        if progress is not None and outcome.kind == FAULT:  # a run that is stopped has told what it found
            print(faults(harness, [outcome], seed), flush=True)
        if progress is not None and (now - told > progress or len(outcomes) == len(numbers)):
            told, rate = now, len(outcomes) / (now - began)
            left = (len(numbers) - len(outcomes)) / rate
            wrong = sum(each.kind == FAULT for each in outcomes)
            print(f"{harness.name}: {len(outcomes)}/{len(numbers)}, {rate:.2f} a second, {left:.0f} s left, "
                  f"{wrong} faults", flush=True)  # fmt: skip
    return sorted(outcomes, key=lambda outcome: outcome.number)


def _outcomes(harness: Harness, world: World, numbers: Sequence[int], seed: int, jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        for number in numbers:
            yield _round(harness, world, seed, number)
        return
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        waiting = [pool.submit(_round, harness, world, seed, number) for number in numbers]
        for done in as_completed(waiting):
            yield done.result()


def _round(harness: Harness, world: World, seed: int, number: int) -> Outcome:
    case = world.folder.parent / f"{harness.name}-{number}"
    try:
        outcome = harness.one(world, case, random.Random(f"{harness.name} {seed} {number}"), number)
    finally:
        shutil.rmtree(case, ignore_errors=True)
    return Outcome(outcome.group, outcome.kind, outcome.what, outcome.said, number)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts of each outcome by group, as Markdown."""
    kinds = [*sorted({each.kind for each in outcomes} - {FAULT}), FAULT]
    counts = Counter((each.group, each.kind) for each in outcomes)
    groups = sorted({each.group for each in outcomes})
    rows = [[group, *(counts[group, kind] for kind in kinds)] for group in groups]
    rows.append(["all", *(sum(counts[group, kind] for group in groups) for kind in kinds)])
    head = [["", *kinds], ["---", *("---:" for _ in kinds)]]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [*head, *rows])


def faults(harness: Harness, outcomes: Sequence[Outcome], seed: int) -> str:
    """Each fault, and the line that makes it again."""
    return "\n".join(
        f"python -m tests.fuzz {harness.name} --seed {seed} --only {each.number}\n  {each.what}\n  {each.said}"
        for each in outcomes
        if each.kind == FAULT
    )
