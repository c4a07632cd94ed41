"""Long commands killed at a change of the disk or at any moment, and run again."""

import random
from pathlib import Path

from tests.fuzz import children
from tests.fuzz.references import Reference, differences, reference
from tests.fuzz.rounds import FAULT, Harness, Outcome
from tests.fuzz.world import LONG, World

LIMIT = 600.0
"""Seconds that a command may take."""


def one(world: World, case: Path, rng: random.Random, number: int, *, names: tuple[str, ...] = tuple(LONG)) -> Outcome:
    """Kill a command once, twice or three times, and let it come to its end: all is as if nothing had been."""
    name = names[number % len(names)]
    undisturbed = reference(world, LONG[name])
    world.copy(case)
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.8:
            step, after = rng.randint(1, undisturbed.changes), rng.random() < 0.5
            done.append(f"{'after' if after else 'before'} change {step} of {undisturbed.changes}")
            end = children.run(LONG[name], case, act=children.kill_at(step, after), limit=LIMIT)
        else:
            seconds = rng.uniform(0, undisturbed.seconds)
            done.append(f"after {seconds:.2f} s")
            end = children.run(LONG[name], case, kill_after=seconds, limit=LIMIT)
        if end.code >= 0:  # it came to its end, or was refused, which running it again shows
            break
    what = f"glp-lens {LONG[name]}, killed {', '.join(done)}"
    return gone_on(name, case, undisturbed, what)


def gone_on(name: str, case: Path, undisturbed: Reference, what: str) -> Outcome:
    """Run a command again: it must succeed, with the files of an undisturbed run and no others.

    Where all of them are there already, it may also say so.
    """
    finished = not differences(case, undisturbed.contents)
    end = children.run(LONG[name], case, limit=LIMIT)
    if end.code and not (finished and end.code == 2 and "already" in end.err):
        return Outcome(name, FAULT, what, f"run again: {end.fault or end.lines[-1]}"[:600])
    if wrong := differences(case, undisturbed.contents):
        return Outcome(name, FAULT, what, f"run again: {wrong}"[:600])
    return Outcome(name, "was done" if finished else "went on", what)


HARNESS = Harness("kills", "long commands that are killed and run again", 300, one)
