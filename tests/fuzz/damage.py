"""Files cut, flipped, emptied, swapped and edited by hand: refused in one line, made again, or of no consequence."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz import children
from tests.fuzz.references import Reference, differences, reference
from tests.fuzz.rounds import FAULT, Harness, Outcome
from tests.fuzz.world import BUDGETS, LONG, World, contents, flip, into, without_hashes

LIMIT = 300.0
"""Seconds that a command may take."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: what it is.
        files: where some are, as patterns in the world.
        reader: the line of a command that reads it.
        own: whether this project wrote it, so that a change may not pass in silence. Of others only a wrong form can
            be told.
        named: whether the command names it, or its folder, so that a whole file of its kind in its place is an input
            like any other.
        prints: whether what the command finds is printed, and must be the same too.
    """

    name: str
    files: tuple[str, ...]
    reader: str
    own: bool = True
    named: bool = False
    prints: bool = False


DENSITY = "density --store heldout --train-store acts --out out --models"
COMPARE = LONG["compare"] + " --out run"
SAMPLE = "--n 5 --out out/rows.npy"
KINDS = (
    Kind("manifest of a store", ("acts/manifest.json",), "train pca --store acts --components 20 --out out"),
    Kind("shard of a store", ("acts/*.h5",), "train pca --store acts --components 20 --out out"),
    Kind("part of a store", ("parts/parts/*/*",), "store merge parts"),
    Kind("GLP", ("models/glp/config.json", "models/glp/model.safetensors"), f"sample models/glp {SAMPLE}", named=True),
    Kind("checkpoint of a GLP", ("models/glp/checkpoints/step_00000010/*",),
         "train glp --finetune models/glp --checkpoint step_00000010 --store acts --rows 128 --batch-size 64 "
         "--out out"),
    *(Kind(kind, (f"models/{kind}/*",), f"{DENSITY} models/{kind}", named=True)
      for kind in ("pca", "gaussian")),
    *(Kind(kind, (f"models/{kind}/*",), f"probe --model lm --models models/{kind} --tasks mine.csv --probe-train 60 "
           "--probe-test 30 --context 24 --ks 3 --out out", named=True) for kind in ("sae", "raw", "random")),
    Kind("released format", ("released/*",), f"sample released {SAMPLE}"),
    Kind("direction", ("direction.safetensors",), LONG["generate"]),
    *(Kind("results", (f"results/{suite}/results.json",), f"report results/{suite} --out out", named=True)
      for suite in ("density", "probe")),
    Kind("state of a training", ("stopped/training.state",), into("stopped", LONG["train glp"])),
    Kind("curve of a training", ("stopped/history.parquet",), into("stopped", LONG["train glp"])),
    Kind("cached activations", ("results/probe/cache/**/*",),
         LONG["probe"].replace("out/cache", "results/probe/cache")),
    Kind("kept scores", ("results/probe/scores/*",), into("results/probe", LONG["probe"]) + " --overwrite"),
    Kind("language model", ("other/*",), "direction --model other --positive-texts for.txt "
         "--negative-texts against.txt --out out/way.safetensors", own=False),
    Kind("table of texts", ("texts.csv", "texts.parquet", "texts.jsonl"),
         "collect --model lm --texts texts.csv,texts.parquet,texts.jsonl --context 24 --tokens 300 "
         "--out out", own=False),
    Kind("settings in YAML", ("train.yaml",), "train glp --config train.yaml", own=False),
    Kind("arrays", ("rows.npy",), LONG["store import"], own=False),
    Kind("stage of a comparison", ("run/stages/*.json",), COMPARE),
    Kind("scores of an unfinished comparison", ("run/cache/**/*.json", "run/cache/**/*.jsonl"), COMPARE),
    Kind("results in a comparison", ("run/results/*/results.json",), COMPARE),
    *(Kind(f"features for {name}", ("features/features.json", "features/*/*"), f"features {line} --folder features",
           prints=name == "show")
      for name, line in (("show", "show 1:3 'my sae/7'"), ("page", "page --out out/page.html"),
                         ("dashboards", "export --to saedashboard --out out"),
                         ("directions", "export 1:3 --to directions --out out/way.npy"))),
    *(Kind(f"features of models for {name}", ("built/features.json", "built/*/*"), line, prints=name == "top")
      for name, line in (("scores", LONG["features score"]), ("steering", LONG["features steer"]),
                         ("top", "features top --folder built --model lm --text 'the cat of'"))),
    Kind("unfinished features", ("built/**/*",), into("built", LONG["features build"])),
    *(Kind(f"{name} of a scaling run", files, into("scaled", BUDGETS))
      for name, files in (("cell", ("scaled/cells/*/*",)), ("results", ("scaled/cells/*/results/*/*.json",)),
                          ("model", ("scaled/cells/*/model/*",)), ("stage", ("scaled/stages/*",)),
                          ("table", ("scaled/*.parquet", "scaled/scaling.json")))),
    Kind("cells to choose from", ("scaled/cells.parquet",), "choose scaled --rows 1000", prints=True),
    Kind("what a card tells", ("scaled/cells.parquet", "scaled/cells/glp-w12x2-r640-s0/**/*"),
         "card scaled/cells/glp-w12x2-r640-s0/model --results scaled --out out/card.md"),
    Kind("kept texts of steering", ("results/steer/generations.parquet", "results/steer/cache/**/*"),
         into("results/steer", LONG["steer"]) + " --overwrite"),
    *(Kind(f"kept numbers of {suite}", (f"results/{suite}/cache/**/*",),
           into(f"results/{suite}", LONG[suite]) + " --overwrite") for suite in ("fidelity", "detect", "density")),
)  # fmt: skip


def _empty(path: Path, rng: random.Random, world: Path) -> str:
    path.write_bytes(b"")
    return "emptied"


def _cut(path: Path, rng: random.Random, world: Path) -> str:
    size = rng.randrange(max(1, path.stat().st_size))
    path.write_bytes(path.read_bytes()[:size])
    return f"cut to {size} bytes"


def _flip(path: Path, rng: random.Random, world: Path) -> str:
    byte, bit = rng.randrange(max(1, path.stat().st_size)), rng.randrange(8)
    flip(path, byte, bit)
    return f"bit {bit} of byte {byte} flipped"


def _zero(path: Path, rng: random.Random, world: Path) -> str:
    data = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(data)))
    end = min(len(data), start + rng.randint(1, 4096))
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return f"bytes {start} to {end} set to 0"


def _foreign(path: Path, rng: random.Random, world: Path) -> str:
    path.write_bytes(rng.choice((b"\x89PNG\r\n", b"{}", b"[]", b"null", b"[[[[", b"hello\n", b"\xff\xfe\x00", b"PAR1")))
    return "replaced by something else"


def _delete(path: Path, rng: random.Random, world: Path) -> str:
    path.unlink()
    return "deleted"


def _swap(path: Path, rng: random.Random, world: Path) -> str:
    alike = sorted(other for other in world.rglob(f"*{path.suffix}") if other.is_file() and other != path)
    named = [other for other in alike if other.name == path.name]
    if not alike:
        return _empty(path, rng, world)
    other = rng.choice(named or alike)
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.relative_to(world)}"


def _edit(path: Path, rng: random.Random, world: Path) -> str:
    """A change as someone makes it in an editor: of JSON a value, else a character."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        return _edit_text(path, rng)
    at, words = value, []
    while isinstance(at, dict | list) and at:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        words.append(str(key))
        if not isinstance(at[key], dict | list) or not at[key] or rng.random() < 0.15:
            break
        at = at[key]
    if not words:
        return _foreign(path, rng, world)
    old = at[key]
    changed: Any = rng.choice((None, "seven", -1, 1e9, [], {}, True, "", [old], {"a": old}))
    if isinstance(old, int | float) and rng.random() < 0.5:
        changed = old + rng.choice((1, -1, 0.5))
    if rng.random() < 0.2 and isinstance(at, dict):
        del at[key]
        changed = "nothing"
    else:
        at[key] = changed
    path.write_text(json.dumps(value, indent=2))
    return f"{'.'.join(words)} edited to {changed!r}"[:200]


def _edit_text(path: Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = rng.randrange(max(1, len(data)))
    new = rng.choice(b'0 :,{["x\n')
    data[place : place + 1] = bytes([new])
    path.write_bytes(data)
    return f"byte {place} edited to {chr(new)!r}"


DAMAGES: dict[Callable[[Path, random.Random, Path], str], int] = {
    _flip: 6, _edit: 6, _cut: 3, _zero: 2, _swap: 2, _foreign: 2, _empty: 1, _delete: 1,
}  # fmt: skip
"""What is done to a file, and how often."""


def one(world: World, case: Path, rng: random.Random, number: int) -> Outcome:
    """Damage a file and run what reads it."""
    kinds = [kind for kind in KINDS if _files(world.folder, kind)]
    kind = kinds[number % len(kinds)]
    undisturbed = reference(world, kind.reader)
    world.copy(case)
    path = rng.choice(_files(case, kind))
    place = path.relative_to(case).as_posix()
    before = path.read_bytes()
    damage = rng.choices(list(DAMAGES), list(DAMAGES.values()))[0]
    what = f"glp-lens {kind.reader}, {place} {damage(path, rng, case)}"
    if path.exists() and path.read_bytes() == before:
        return Outcome(kind.name, "same result", what, "the damage changed nothing")
    damaged = contents(case).get(without_hashes(place))
    another = damage is _swap and kind.named
    end = children.run(kind.reader, case, limit=LIMIT)
    if end.fault:
        return Outcome(kind.name, FAULT, what, end.fault[:600])
    if end.code:
        return Outcome(kind.name, "refused", what, end.lines[-1][:300])
    return _succeeded(kind, case, place, damaged, undisturbed, end, what, another=another)


def _succeeded(
    kind: Kind,
    case: Path,
    place: str,
    damaged: str | None,
    undisturbed: Reference,
    end: children.Ended,
    what: str,
    *,
    another: bool,
) -> Outcome:
    """Judge a run that came to its end: it must be as if nothing had been damaged, or say what it did."""
    outcome, want = "made again", undisturbed.contents
    known = without_hashes(place)
    if contents(case).get(known) == damaged:  # it was not written again
        want = {name: digest for name, digest in want.items() if name != known}
        want |= {known: damaged} if damaged else {}
        outcome = "same result"
    printed = "prints something else" if kind.prints and end.out != undisturbed.out else ""
    if not (wrong := differences(case, want) or printed):
        return Outcome(kind.name, outcome, what)
    if another or not kind.own:
        return Outcome(kind.name, "another input", what, wrong[:300])
    if place.endswith(".h5"):  # rows are read without their hashes: `store verify` is what finds them
        verified = children.run(f"store verify {Path(place).parent}", case, limit=LIMIT)
        if verified.code == 2 and not verified.fault:
            return Outcome(kind.name, "found by store verify", what, verified.lines[-1][:300])
    if Path(place).name in end.err + end.out:
        return Outcome(kind.name, "told, another result", what, (end.lines or [""])[-1][:300])
    return Outcome(kind.name, FAULT, what, f"another result, in silence: {wrong}"[:600])


def _files(folder: Path, kind: Kind) -> list[Path]:
    return sorted({path for pattern in kind.files for path in folder.glob(pattern) if path.is_file()})


HARNESS = Harness("damage", "damaged and edited files, read by the commands", 1500, one)
