"""Commands in forked children, which inherit all imports, and what can happen to them at each change of the disk."""

import builtins
import errno
import io
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

Act = Callable[..., None]
"""Called with the number of a change of the disk, the name of the call, whether it was made or is about to be, and the
arguments of the call."""

SPACE = ("open", "posix_fallocate", "fsync", "mkdir")
"""Changes that a full disk refuses."""
CHANGES = ("open", "posix_fallocate", "fsync", "mkdir", "replace", "rename", "unlink", "rmdir")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: its exit status; minus the signal that killed it.
        out, err: what it printed.
        seconds: wall-clock time.
        changes: how often it changed the disk; 0 if it was killed.
        layers: linear layers computed, a measure of the work it did; 0 if it was killed.
        hung: whether it was killed for taking too long.
    """

    code: int
    out: str
    err: str
    seconds: float
    changes: int = 0
    layers: int = 0
    hung: bool = False

    @property
    def lines(self) -> list[str]:
        """What it said on standard error, without progress bars, among them those of no known length."""
        said = re.split(r"[\r\n]+", self.err.replace("\x1b[A", ""))  # one bar below another moves up again
        return [line for line in said if line.strip() and not re.search(r"\d+%\||\d+it \[", line)]

    @property
    def fault(self) -> str:
        """What no command may do, whatever it was given; empty if it succeeded or was refused in one line."""
        errors = [line for line in self.lines if not line.startswith(("warning: ", "note: "))]
        if self.hung:
            return f"hung, {self.seconds:.0f} s"
        if "Traceback (most recent call last)" in self.err or self.code not in (0, 2):
            return f"exit code {self.code}: {errors[-1] if errors else 'nothing said'}"
        if self.code == 2 and (len(errors) != 1 or not errors[0].startswith("error: ")):
            return f"{len(errors)} lines: {errors}"
        return ""


def watch(act: Act, names: Sequence[str] = CHANGES) -> None:
    """Call `act` before and after each call of this process that changes the disk, as far as Python makes it.

    Args:
        names: of the calls that count.
    """
    number = 0

    def watched(name: str, call: Any, changes: Callable[..., bool]) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal number
            if not changes(*arguments, **options):
                return call(*arguments, **options)
            number += 1
            mine = number
            act(mine, name, False, *arguments)
            result = call(*arguments, **options)
            act(mine, name, True, *arguments)
            return result

        return wrapped

    for name in set(names) - {"open"}:
        setattr(os, name, watched(name, getattr(os, name), lambda *_, **__: True))
    if "open" not in names:
        return
    os.open = watched("open", os.open, lambda _, flags, *__, **___: bool(flags & _WRITING))
    builtins.open = io.open = watched(
        "open", io.open, lambda file, mode="r", *_, **__: not isinstance(file, int) and bool(set(mode) & set("wax+"))
    )


def kill_at(step: int, after: bool) -> Act:
    """Kill this process at a change of the disk, before or after it is made."""

    def act(number: int, name: str, done: bool, *_: Any) -> None:
        if number == step and done == after:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def kill_after_renaming(name: str, times: int = 1) -> Act:
    """Kill this process when it has given a file this name, for the given time."""
    seen = 0

    def act(number: int, call: str, done: bool, *arguments: Any) -> None:
        nonlocal seen
        if call == "replace" and done and os.path.basename(arguments[1]) == name:
            seen += 1
            if seen == times:
                os.kill(os.getpid(), signal.SIGKILL)

    return act


def no_space_from(step: int) -> Act:
    """The disk is full from a change on."""

    def act(number: int, name: str, done: bool, *_: Any) -> None:
        if number >= step and name in SPACE and not done:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a full disk")

    return act


def fork(work: Callable[[], None]) -> int:
    """Start `work` in a forked process, which ends with status 0 if it returns; the process's id."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())  # the usual one is shared with the parent, which a killed child would stop
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def wait(pid: int) -> int:
    """Wait for a process: its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(
    line: str, folder: Path, *, act: Act | None = None, prepare: Callable[[], None] = lambda: None,
    limit: float = 300.0, kill_after: float | None = None,
) -> Ended:  # fmt: skip
    """Run a command line in a folder.

    Args:
        act: see `watch`.
        prepare: called first.
        limit: seconds after which it is said to hang.
        kill_after: seconds after which it is killed on purpose.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as told:
        counts = {"changes": 0, "layers": 0}

        def count(number: int, *call: Any) -> None:
            counts["changes"] = number
            if act is not None:
                act(number, *call)

        def linear(*arguments: Any, usual: Any = torch.nn.functional.linear, **options: Any) -> Any:
            counts["layers"] += 1
            return usual(*arguments, **options)

        def work() -> None:
            os.setpgid(0, 0)
            os.chdir(folder)
            os.environ["GLP_LENS_CACHE"] = str(folder / "cache")
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            prepare()
            torch.nn.functional.linear = linear  # hooks of modules would be seen: texts are read another way then
            watch(count)
            code = _command(line)
            os.write(told.fileno(), json.dumps(counts).encode())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        began = time.monotonic()
        pid = fork(work)
        hung = False
        while not (waited := os.waitpid(pid, os.WNOHANG))[0]:
            spent = time.monotonic() - began
            hung = spent > limit
            if hung or (kill_after is not None and spent > kill_after):
                os.kill(pid, signal.SIGKILL)
                waited = os.waitpid(pid, 0)
                break
            time.sleep(0.002)
        for file in (out, err, told):
            file.seek(0)
        return Ended(
            os.waitstatus_to_exitcode(waited[1]), out.read(), err.read(), time.monotonic() - began,
            **json.loads(told.read() or "{}"), hung=hung,
        )  # fmt: skip


def _command(line: str) -> int:
    """Run the command line in this process; its exit status."""
    from glp_lens_cli import app

    sys.argv = ["glp-lens", *shlex.split(line)]
    try:
        app(prog_name="glp-lens")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
