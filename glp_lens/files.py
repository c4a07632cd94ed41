"""Reading and writing files: a crash or a full disk leaves the old file whole, a damaged file is one clear line."""

from __future__ import annotations

import json
import os
import platform
import tempfile
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
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(_on_cpu(tensors), temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # safetensors writes files that nobody else can read
        os.replace(temporary, path)
        sync_folder(path.parent)
    except SafetensorError as error:
        raise InputError(f"cannot write {path} ({error}): free space or choose another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


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
