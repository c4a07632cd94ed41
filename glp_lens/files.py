"""Reading and writing files: a crash or a full disk leaves the old file whole, a damaged file is one clear line."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from glp_lens.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from glp_lens.types import Json

_PACKAGES = ("glp-lens", "torch", "transformer-lens", "sae-lens", "sae-probes", "transformers", "scikit-learn",
             "h5py", "numpy")  # fmt: skip
_SUFFIX = ".tmp"
"""Of temporary files."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; packages not installed are left out."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, never a part."""
    with replaced(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replaced(path: Path, *, by_library: bool = False) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` at the end of the block.

    A crash, a full disk or an exception leaves the old file. The next write of the same file removes the temporary
    one that a killed writer left.

    Args:
        by_library: whether a library writes, which may make a temporary file of its own beside the path: then it has a
            folder for itself.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:40]}."
    _remove_abandoned(path.parent, prefix)
    own, held = _new_temporary(path.parent, prefix, folder=by_library)
    try:
        temporary = own / "new" if by_library else own  # no name that anything looks for
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # temporary files are nobody else's to read
        os.replace(temporary, path)
    finally:
        _remove(own)
        os.close(held)


def _new_temporary(parent: Path, prefix: str, *, folder: bool) -> tuple[Path, int]:
    """A new file or folder, and the descriptor that keeps other processes from taking it for abandoned."""
    while True:
        if folder:
            name = tempfile.mkdtemp(dir=parent, prefix=prefix, suffix=_SUFFIX)
            held = os.open(name, os.O_RDONLY)
        else:
            held, name = tempfile.mkstemp(dir=parent, prefix=prefix, suffix=_SUFFIX)
        if try_lock(held) is not False and os.path.exists(name):
            return Path(name), held
        os.close(held)  # another process took it for abandoned before it was locked


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what writers left that were killed: what nobody has locked."""
    pattern = re.compile("[a-z0-9_]{8}" + re.escape(_SUFFIX))
    for name in os.listdir(parent):
        if name.startswith(prefix) and pattern.fullmatch(name.removeprefix(prefix)):
            try:
                held = os.open(parent / name, os.O_RDONLY)
            except OSError:  # another process has removed it
                continue
            if try_lock(held):
                _remove(parent / name)
            os.close(held)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock a file or folder until the descriptor is closed, or until the process ends, however it ends.

    Returns:
        Whether no other process holds a lock that excludes this one; None where there are no locks.
    """
    try:
        import fcntl  # not on Windows

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a file system without locks
        return None
    return True


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for JSON; refuses NaN and infinity, which JSON cannot hold."""
    write_atomic(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> Json:
    """Read a JSON object; `what` names it in messages.

    Raises:
        InputError: the file is missing or damaged, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{what} not found: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} cannot be read: {path}: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} is damaged: {path} holds {type(value).__name__}, expected a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        InputError: the file is missing, truncated, or of another format.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"weights not found: {path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"weights cannot be read: {path} is truncated or no safetensors file ({error})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that a crash or a full disk leaves the old one.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    from safetensors.torch import save_file

    try:
        with replaced(path, by_library=True) as temporary:
            save_file(_on_cpu(tensors), temporary, metadata)
        sync_folder(path.parent)
    except SafetensorError as error:
        raise InputError(f"cannot write {path} ({error}): free space or choose another folder") from None


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, no two of which overlap in memory: safetensors refuses those that do."""
    taken: list[tuple[int, int]] = []
    copies = {}
    for name, given in tensors.items():
        tensor = given.detach().cpu().contiguous()
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        overlaps = any(start < other_end and other_start < end for other_start, other_end in taken)
        copies[name] = tensor.clone() if overlaps else tensor
        taken.append((start, end))
    return copies
