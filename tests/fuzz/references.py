"""Undisturbed runs of the long commands, each made once, with which others are compared."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.fuzz import children
from tests.fuzz.world import World, contents


@dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Attributes:
        changes: how often it changed the disk.
        written: bytes that it added.
        seconds: how long it took.
        contents: of the folder that it was run in, see `world.contents`.
        out: what it printed.
    """

    changes: int
    written: int
    seconds: float
    contents: dict[str, str]
    out: str


def reference(world: World, line: str) -> Reference:
    """The undisturbed run of a command line, made when first asked for."""
    name = hashlib.sha256(line.encode()).hexdigest()[:16]
    kept = world.folder.parent / "references" / f"{name}.json"
    if not kept.exists():
        case = world.copy(kept.parent / f"{name} {os.getpid()}")
        try:
            before = _bytes(case)
            end = children.run(line, case)
            if end.code:
                raise RuntimeError(f"glp-lens {line} failed undisturbed: {end.err}")
            made = Reference(end.changes, max(0, _bytes(case) - before), end.seconds, contents(case), end.out)
        finally:
            shutil.rmtree(case)
        temporary = kept.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(made)))
        temporary.replace(kept)
    return Reference(**json.loads(kept.read_text()))


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def differences(case: Path, want: dict[str, str]) -> str:
    """In which files a folder differs from an undisturbed run's, in words; empty if in none."""
    found = contents(case)
    words = {
        "missing": sorted(want.keys() - found.keys()),
        "left over": sorted(found.keys() - want.keys()),
        "other than undisturbed": sorted(file for file in want.keys() & found.keys() if want[file] != found[file]),
    }
    return "; ".join(f"{what}: {', '.join(files)}" for what, files in words.items() if files)
