"""Full disks: no space from some change of the disk on, or on a small disk of its own; then space again."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz import children
from tests.fuzz.kills import LIMIT, gone_on
from tests.fuzz.references import Reference, differences, reference
from tests.fuzz.rounds import FAULT, Harness, Outcome
from tests.fuzz.world import LONG, World

DISK = 48 << 20
"""Bytes of a small disk, which are in memory: the world, what a command adds, and what fills the rest."""


def one(
    world: World, case: Path, rng: random.Random, number: int, *, names: tuple[str, ...] = tuple(LONG),
    small: bool = True,
) -> Outcome:  # fmt: skip
    """Fill the disk while a command runs: it says so in one line, and goes on to its end when there is space.

    Every second time on a small disk, where that is permitted: there all writes fail, not only those of Python.
    """
    name = names[number % len(names)]
    undisturbed = reference(world, LONG[name])
    small = small and bool(number // len(names) % 2)
    with _small_disk(case, wanted=small) as full:
        folder = world.copy(case / "case")
        if full is None:
            step = rng.randint(1, undisturbed.changes)
            what = f"glp-lens {LONG[name]}, no space from change {step} of {undisturbed.changes} on"
            end = children.run(LONG[name], folder, act=children.no_space_from(step), limit=LIMIT)
        else:
            room = rng.randint(0, undisturbed.written)
            what = f"glp-lens {LONG[name]}, on a disk with {room} bytes left"
            _fill(full, room)
            end = children.run(LONG[name], folder, limit=LIMIT)
            full.unlink()
        return _judged(name, folder, end, undisturbed, what)


def _judged(name: str, folder: Path, end: children.Ended, undisturbed: Reference, what: str) -> Outcome:
    if end.fault:
        return Outcome(name, FAULT, what, end.fault[:600])
    if end.code == 2 and "space" not in end.lines[-1]:
        return Outcome(name, FAULT, what, f"says nothing of space: {end.lines[-1]}"[:600])
    if end.code == 0:
        wrong = differences(folder, undisturbed.contents)
        kind = "had space enough" if not wrong else "did without and said so" if end.lines else FAULT
        return Outcome(name, kind, what, wrong[:600])
    return gone_on(name, folder, undisturbed, what)


@contextmanager
def _small_disk(folder: Path, *, wanted: bool) -> Iterator[Path | None]:
    """A file system in memory at a folder, and the file that will fill it; None where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(folder)]
    mounted = wanted and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder / "full" if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(file: Path, room: int) -> None:
    """Write a file that leaves so many bytes of its file system."""
    found = os.statvfs(file.parent)
    with file.open("wb") as full:
        os.posix_fallocate(full.fileno(), 0, max(1, found.f_bavail * found.f_frsize - room))


HARNESS = Harness("disks", "long commands on full disks, run again with space", 60, one)
