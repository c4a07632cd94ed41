"""Some rounds of each harness with a fixed seed, and that the harnesses see what they look for."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from tests.fuzz import damage, disks, kills, lines
from tests.fuzz.children import Ended
from tests.fuzz.rounds import FAULT, Harness, Outcome, faults, run_rounds, table
from tests.fuzz.world import contents, prepared

pytestmark = pytest.mark.usefixtures("blank_pictures")

QUICK = ("collect", "store merge", "train pca", "direction", "sample", "store export memmaps", "store repair")
"""Long commands that take no longer than a second here."""
READ_QUICKLY = ("manifest of a store", "shard of a store", "GLP", "released format", "results", "table of texts")
SEED = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with prepared(tmp_path_factory.mktemp("fuzz"), full=False) as made:
        yield made


def without_faults(harness, world, rounds):
    """The kinds of the outcomes."""
    outcomes = run_rounds(harness, world, range(rounds), seed=SEED)
    assert not faults(harness, outcomes, SEED)
    return {outcome.kind for outcome in outcomes}


def test_command_lines_succeed_or_are_refused_in_one_line(world):
    assert {"done", "refused"} <= without_faults(lines.HARNESS, world, 30)


def test_killed_commands_go_on(world):
    harness = replace(kills.HARNESS, one=partial(kills.one, names=QUICK))
    assert "went on" in without_faults(harness, world, len(QUICK))


def test_damaged_files_are_refused_or_made_again(world, monkeypatch):
    monkeypatch.setattr(damage, "KINDS", [kind for kind in damage.KINDS if kind.name in READ_QUICKLY])
    assert {"refused", "same result"} <= without_faults(damage.HARNESS, world, 3 * len(READ_QUICKLY))


def test_full_disks_are_told_and_commands_go_on_with_space(world):
    harness = replace(disks.HARNESS, one=partial(disks.one, names=QUICK, small=False))
    assert "went on" in without_faults(harness, world, len(QUICK))


def test_lines_are_made_of_the_options_of_every_command():
    known = lines.commands()
    collect = {option.flag: option for option in known["collect"]}
    assert (collect["--tokens"].kind, collect["--tokens"].limits[0], collect["--hook"].several) == (int, 0, True)
    assert collect["--dedup"].negative == "--no-dedup"
    assert "bridge" in collect["--backend"].choices
    assert {option.flag for option in known["store import"]} >= {"--from", "--hook", "--drop-tokens"}
    assert "--json" in {option.flag for option in known["store info"]}


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        (Ended(0, "", "warning: few rows\n 50%|##   | 1/2\r\n", 1.0), ""),
        (Ended(2, "", "error: no such folder\n", 1.0), ""),
        (Ended(2, "", "error: no such folder\nand more\n", 1.0), "2 lines"),
        (Ended(2, "", "", 1.0), "0 lines"),
        (Ended(1, "", "Traceback (most recent call last):\nValueError: x\n", 1.0), "ValueError: x"),
        (Ended(-9, "", "", 1.0), "exit code -9"),
        (Ended(-9, "", "", 60.0, hung=True), "hung, 60 s"),
    ],
)
def test_faults_are_told(ended, words):
    assert words in ended.fault
    assert bool(words) == bool(ended.fault)


def test_times_are_no_difference_and_values_are(tmp_path):
    def made(name, seconds, value):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.json").write_text(f'{{"seconds": {seconds}, "value": [{{"seconds": 3}}, {value}]}}')
        save_file({"x": torch.full((2, 3), float(value))}, folder / "b.safetensors", {"seconds": str(seconds)})
        return contents(folder)

    one = made("one", 1, 7)
    assert made("two", 2, 7) == one
    assert not set(made("three", 1, 8).values()) & set(one.values())


def draw(world, case, rng, number):
    return Outcome("a", FAULT if number == 2 else "done", f"drew {rng.random()}")


def test_rounds_depend_on_seed_and_number_alone_and_faults_name_both(world):
    harness = Harness("draws", "numbers", 9, draw)
    all_at_once = run_rounds(harness, world, range(4), seed=1, jobs=2)
    assert all_at_once[2:3] == run_rounds(harness, world, [2], seed=1)
    assert all_at_once != run_rounds(harness, world, range(4), seed=2)
    assert faults(harness, all_at_once, 1).startswith("python -m tests.fuzz draws --seed 1 --only 2\n  drew 0.")
    assert table(all_at_once).splitlines()[-1] == "| all | 3 | 1 |"


def test_a_change_that_passes_in_silence_is_found(world, tmp_path, monkeypatch):
    """A kind of file that says nothing of changes: texts, taken for the project's own."""
    (kind,) = (kind for kind in damage.KINDS if kind.name == "table of texts")
    monkeypatch.setattr(damage, "KINDS", [replace(kind, own=True, files=("texts.jsonl",))])
    monkeypatch.setattr(damage, "DAMAGES", {lambda path, *_: path.write_text('{"text": "the cat"}\n'): 1})
    outcome = damage.one(world, tmp_path / "case", random.Random(0), 0)
    assert (outcome.kind, outcome.said.partition(":")[0]) == (FAULT, "another result, in silence")
