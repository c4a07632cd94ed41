"""What is done of a run: stages, and single jobs, each done once and refused where something else was done."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from glp_lens.errors import InputError
from glp_lens.files import Kind, check_writable, is_number, read_json, write_json
from glp_lens.memory import give_back

if TYPE_CHECKING:
    from glp_lens.types import Json

_MARK = Kind("stage mark", "delete it, and the stage runs again")


MARK = "job.json"
"""In the folder of a job's results: which job they are of, and whether it has come to its end."""
_JOB = Kind("mark of a job", "delete it")


@dataclass
class JobInFolder:
    """A job at work in the folder of its results, which are saved before the pages that show them.

    Attributes:
        folder: of the results.
        job: name of the job.
        settings: all that its results depend on.
        files: the state of all files that the settings name; None if something is in memory, and so unknown.
        made: names of the files that it makes, the results first.
        has_results: whether an interrupted run of the same job saved its results, and its files have not changed.
        complete: whether the job is done at the end of the block.
    """

    folder: Path
    job: str
    settings: Json
    files: Json | None
    made: Sequence[str]
    has_results: bool = field(default=False, init=False)
    complete: bool = field(default=True, init=False)

    def saving(self) -> None:
        """To be called before the first result is written: whoever finds it knows whose it is."""
        self._write(None, done=False)

    def saved(self) -> None:
        """To be called once the results are written: the same job goes on from there."""
        self._write(self.files, done=False)

    def done(self) -> None:
        """The last file is there."""
        self._write(self.files, done=True)

    def left(self) -> Json | None:
        """What an unfinished run of the same job left of its mark; None if there was none, or it was finished."""
        try:
            mark = read_json(self.folder / MARK, _JOB, self.job)
        except InputError:
            return None
        if mark.get("settings") != self.settings:
            return None
        if mark.get("done") is False:
            return mark
        deleted = not all((self.folder / name).exists() for name in self.made)
        return mark if deleted and self.files is not None and mark.get("files") == self.files else None

    def _write(self, files: Json | None, *, done: bool) -> None:
        mark = {"settings": self.settings, "files": files, "done": done}
        write_json(self.folder / MARK, mark, _JOB, self.job)


def refuse_existing(*files: Path) -> None:
    """Refuse, before any work, to replace results without being asked to.

    Raises:
        InputError: one of the files is there.
    """
    for file in files:
        if file.exists():
            raise InputError(f"{file} already exists: choose another --out, or pass --overwrite")


def check_output(file: Path, *, overwrite: bool) -> None:
    """Check before the work that the one file that a job makes can be written at its end.

    Args:
        overwrite: whether it may replace one that is there.

    Raises:
        InputError: it is there, or cannot be written.
    """
    if not overwrite:
        refuse_existing(file)
    check_writable(file)


@contextmanager
def job_at_work(job: JobInFolder, *, overwrite: bool) -> Iterator[JobInFolder]:
    """Keep other jobs out of a folder to the end of the block, after which this one is done.

    Args:
        overwrite: whether other results may be replaced.

    Raises:
        InputError: another process is at work in the folder, or it holds results that are not of this job.
    """
    from glp_lens.activations.writer import locked

    with locked(job.folder):
        mark = job.left()
        if mark is None and not overwrite:
            refuse_existing(*(job.folder / name for name in job.made))
        saved = mark is not None and mark.get("files") is not None and mark["files"] == job.files
        job.has_results = saved and (job.folder / job.made[0]).exists()
        yield job
        if job.complete:
            job.done()


def state_of_files(settings: Json) -> Json:
    """Number, bytes and time of the last change of the files that settings name, by the value that names them."""
    found = {}
    for each in settings.values():
        for value in each if isinstance(each, list) else [each]:
            path = value.rpartition("=")[2] if isinstance(value, str) else ""  # of name=folder
            if path and os.path.exists(path):
                files = [Path(path), *Path(path).rglob("*")]
                known = [file.stat() for file in files if file.is_file()]
                newest = max((each.st_mtime_ns for each in known), default=0)
                found[value] = [len(known), sum(each.st_size for each in known), newest]
    return found


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: its name on disk and on screen.
        settings: names of the settings that its output depends on.
        needs: names of the stages whose output it reads.
        outputs: files and folders it writes, relative to the run's folder.
        work: does it.
    """

    name: str
    settings: tuple[str, ...]
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    work: Callable[[], None]


@dataclass(frozen=True)
class StageState:
    """What is there of a stage.

    Attributes:
        inputs: what its output depends on; as recorded where that is the same.
        changed: what it was begun with other than asked for, in words; empty if nothing.
        done: whether it finished with what is asked for, and its output is there.
    """

    inputs: Json
    changed: str
    done: bool


def stage_states(
    stages: Sequence[Stage], settings: Json, folder: Path, *, defaults: Json | None = None
) -> dict[str, StageState]:
    """How each stage stands, by its name; nothing is changed.

    Args:
        settings, defaults: as of `run_stages`.

    Raises:
        InputError: a damaged mark.
    """
    states: dict[str, StageState] = {}
    for stage in stages:
        own = {name: settings[name] for name in stage.settings}
        inputs: Json = {"settings": own, "needs": {n: _digest(states[n].inputs) for n in stage.needs}}
        path, changed, done = _mark(stage.name, folder), "", False
        if path.exists():
            mark = _read(path)
            before = {**(defaults or {}), **mark.get("settings", {})}
            changed = _difference(before, mark.get("needs"), inputs)
            if not changed:  # as recorded, so that what later stages recorded of it stays the same too
                inputs = {key: mark[key] for key in ("settings", "needs")}
                made = [(folder / name).exists() for name in mark.get("made", [])]
                done = mark.get("seconds") is not None and all(made)
        states[stage.name] = StageState(inputs, changed, done)
    return states


def run_stages(
    stages: Sequence[Stage],
    settings: Json,
    folder: Path,
    *,
    overwrite: bool,
    say: Callable[[str], None],
    defaults: Json | None = None,
) -> None:
    """Run the stages in order, each at most once.

    A stage that finished with the same settings is skipped while its output is there. Before any work starts, a
    stage that made something with other settings is refused, or, with `overwrite`, its output is deleted and made
    anew.

    Args:
        settings: all settings by name, JSON-like.
        say: prints one line.
        defaults: what settings were that a run of an earlier version did not have.

    Raises:
        InputError: the folder holds a run with other settings, and `overwrite` is off.
    """
    marks = {stage.name: _mark(stage.name, folder) for stage in stages}
    states = stage_states(stages, settings, folder, defaults=defaults)
    stale = [(stage, changed) for stage in stages if (changed := states[stage.name].changed) and _made(stage, folder)]
    if stale and not overwrite:
        stage, changed = stale[0]
        raise InputError(
            f"{folder} holds a run with other settings ({stage.name}: {changed}): choose another folder, or pass "
            "--overwrite to redo what depends on them"
        )
    for stage, changed in stale:
        say(f"{stage.name}: settings changed ({changed}), starting it afresh")
        for name in stage.outputs:
            _delete(folder / name)
    for stage in stages:
        if states[stage.name].changed:  # also if it failed before it made anything
            marks[stage.name].unlink()

    states = stage_states(stages, settings, folder, defaults=defaults)
    for number, stage in enumerate(stages, 1):
        path, head = marks[stage.name], f"[{number}/{len(stages)}] {stage.name}"
        inputs = states[stage.name].inputs
        if states[stage.name].done:
            say(f"{head}: already done")
            continue
        say(head)
        write_json(path, {**inputs, "seconds": None}, _MARK, stage.name)
        began = time.monotonic()
        stage.work()
        give_back()
        seconds = round(time.monotonic() - began, 1)
        made = {"seconds": seconds, "made": _made(stage, folder)}
        write_json(path, {**inputs, **made}, _MARK, stage.name)
        say(f"{head}: done in {seconds:.0f} s")


def settings_made_with(name: str, folder: Path) -> Json:
    """The settings that a stage was begun with, as far as its output depends on them; empty if it never was.

    Raises:
        InputError: a damaged mark.
    """
    path = _mark(name, folder)
    settings: Json = _read(path).get("settings", {}) if path.exists() else {}
    return settings


def stage_seconds(folder: Path) -> dict[str, float]:
    """Wall-clock seconds of each finished stage."""
    marks = {path.stem: _read(path) for path in sorted((folder / "stages").glob("*.json"))}
    return {name: mark["seconds"] for name, mark in marks.items() if mark.get("seconds") is not None}


def _mark(name: str, folder: Path) -> Path:
    return folder / "stages" / f"{name}.json"


def _read(path: Path) -> Json:
    """The mark of a stage.

    Raises:
        InputError: damaged, of another stage, or holding what no mark does.
    """
    mark = read_json(path, _MARK, path.stem)
    seconds, made = mark.get("seconds"), mark.get("made", [])
    if not (
        all(isinstance(mark.get(name, {}), dict) for name in ("settings", "needs"))
        and (seconds is None or (is_number(seconds) and seconds >= 0))
        and isinstance(made, list)
        and all(isinstance(name, str) for name in made)
    ):
        raise InputError(f"{path} is damaged: it holds what no {_MARK.name} does: {_MARK.remedy}")
    return mark


def _made(stage: Stage, folder: Path) -> list[str]:
    """Those of a stage's outputs that are there, and not empty."""
    paths = {name: folder / name for name in stage.outputs}
    return [name for name, path in paths.items() if path.is_file() or (path.is_dir() and any(path.iterdir()))]


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _difference(before: Json, needs: object, inputs: Json) -> str:
    """Which settings differ, in words; empty if none."""
    after = inputs["settings"]
    changed = [f"{name} {before.get(name)!r} -> {after[name]!r}" for name in after if before.get(name) != after[name]]
    if not changed and needs != inputs["needs"]:
        changed = ["what it reads from earlier stages"]
    return ", ".join(changed)[:300]


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
