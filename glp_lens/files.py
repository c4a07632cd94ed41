"""Reading and writing files: a crash or a full disk leaves the old file whole, a damaged file is one clear line.

Files that are read again say what they are for and carry a digest: xxh3-128 of all their bytes, with the digest itself
left blank. It stands under `glp_lens` at the top of JSON, and in the metadata of safetensors and parquet, which other
programs pass over. A file without one, as earlier versions wrote them, is read, and said to be unchecked.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import xxhash
from safetensors import SafetensorError, safe_open

from glp_lens.errors import DISK_FULL, InputError, disk_error, first_line, pass_shortage, readable_size
from glp_lens.limits import check_expansion, check_nesting

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from glp_lens.types import Json

_PACKAGES = ("glp-lens", "torch", "transformer-lens", "sae-lens", "sae-probes", "transformers", "scikit-learn",
             "h5py", "numpy")  # fmt: skip
_SUFFIX = ".tmp"
"""Of temporary files."""
ENTRY = "glp_lens"
"""Where a file says what it is for."""
BLANK = b"xxh3:" + b"-" * 32
"""Stands in place of the digest while that is computed."""
_SAID = re.compile(rb"digest\W{1,5}xxh3:[0-9a-f]{32}")


@dataclass(frozen=True)
class Kind:
    """What a file is for.

    Attributes:
        name: what messages call it, and what the file calls itself.
        remedy: what to do about a damaged one.
        version: of what it holds; another one is refused.
        quiet: not to say of a file without a digest that it was read unchecked.
    """

    name: str
    remedy: str
    version: int = 1
    quiet: bool = False

    def entry(self, key: str = "") -> Json:
        """What a file of this kind says of itself, with room for the digest; `key` tells it from others of its kind."""
        return {"file": self.name, "version": self.version, **({"key": key} if key else {}), "digest": BLANK.decode()}


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
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        with replaced(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise OSError(error.errno, f"{error.strerror} ({room(path, len(data))})", str(path)) from None
        raise


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
    remove_abandoned(path.parent, prefix)
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


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove what writers of `.NAME` left in a folder that were killed: what nobody has locked.

    Args:
        parent: the folder.
        prefix: `.NAME.`, which the temporary names begin with.
    """
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


def room(path: Path, wanted: int) -> str:
    """How much is wanted for a file and how much is free beside it, in words."""
    return f"{readable_size(wanted)} wanted, {readable_size(shutil.disk_usage(path.parent).free)} free"


def make_writable(folder: Path) -> None:
    """Make a folder and check now, not when the first shard is full, that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make folder {folder}: {error.strerror}; choose another folder") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write to folder {folder}: choose another folder")


def check_writable(file: Path) -> None:
    """Check before the work that a file can be written at its end; its folder is made.

    Raises:
        InputError: it is a folder, or its own folder cannot be made or written.
    """
    make_writable(file.parent)
    if file.is_dir():
        raise InputError(f"{file} is a folder, expected the name of a file: choose another")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(content: bytes) -> bytes:
    """The content of a file with its digest filled in."""
    start = content.index(BLANK)
    return content[:start] + _digest(memoryview(content), start) + content[start + len(BLANK) :]


def check(path: Path, content: bytes | mmap.mmap, entry: Any, kind: Kind | None, key: str = "") -> str:
    """Check that a file is whole, and of this kind.

    Args:
        path: its name, for messages.
        content: all its bytes.
        entry: what it says of itself; None if nothing, which is said in a warning.
        kind: None for any.
        key: which of its kind it must be.

    Returns:
        Its digest; empty if it has none.

    Raises:
        InputError: damaged or edited, or for something else.
    """
    if entry is None and isinstance(content, bytes) and _SAID.search(content):
        entry = {}  # what names it was damaged
    if entry is None:
        if kind is not None and not kind.quiet:
            what = f"{kind.name} in {path.parent} without a digest, as earlier versions wrote them"
            warnings.warn(f"{what}: read unchecked", stacklevel=1)  # told once, whoever reads it
        return ""
    try:
        file, version, own, digest = entry["file"], entry["version"], entry.get("key", ""), entry["digest"]
        start = content.find(digest.encode())
    except (KeyError, TypeError, ValueError, AttributeError):
        start = -1
    if start >= 0:
        with memoryview(content) as view:
            whole = len(digest) == len(BLANK) and _digest(view, start) == digest.encode()
    if start < 0 or not whole:
        what = "edited since" if path.suffix in (".json", ".yaml") else "changed since"
        mend = f"; if it was edited on purpose, delete its {ENTRY!r} entry" if path.suffix == ".json" else ""
        mend = "; if it was edited on purpose, delete the 'digest' in it" if path.suffix == ".yaml" else mend
        remedy = "write it again" if kind is None else kind.remedy
        raise InputError(f"{path} is damaged, or was {what} it was written (its digest does not fit): {remedy}{mend}")
    if kind is None:
        return str(digest)
    if file != kind.name:
        raise InputError(f"{path} holds what another file is for ({file}), expected {kind.name}: {kind.remedy}")
    if version != kind.version:
        raise InputError(
            f"{path} has format version {version} of {kind.name}, this release reads {kind.version}: open it with the "
            f"glp-lens release that wrote it, or {kind.remedy}"
        )
    if key and own != key:
        raise InputError(f"{path} is {kind.name} of {own or 'something else'}, expected {key}: {kind.remedy}")
    return str(digest)


def _digest(content: memoryview, start: int) -> bytes:
    """The digest of a file that has it, or room for it, from byte `start` on."""
    digest = xxhash.xxh3_128(content[:start])
    digest.update(BLANK)
    digest.update(content[start + len(BLANK) :])
    return b"xxh3:" + digest.hexdigest().encode()


def write_json(path: Path, value: Json, kind: Kind | None = None, key: str = "") -> None:
    """`write_atomic` for a JSON object; refuses NaN and infinity, which JSON cannot hold.

    Args:
        kind: what the file is for; None for one with checks of its own, which gets no digest.
        key: which of its kind it is.
    """
    about = {} if kind is None else {ENTRY: kind.entry(key)}
    text = json.dumps({**about, **value}, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomic(path, text if kind is None else sealed(text.encode()))


def read_json(path: Path, kind: Kind | str, key: str = "") -> Json:
    """Read a JSON object that `write_json` wrote, without what it says of itself.

    Args:
        kind: what it must be for; for one with checks of its own what messages call it.
        key: which of its kind it must be.

    Raises:
        InputError: the file is missing, damaged, edited, or holds something other than an object of this kind.
    """
    what = kind if isinstance(kind, str) else kind.name
    try:
        content = path.read_bytes()
        value = json.loads(content.decode("utf-8"), parse_constant=_no_number)
        if b"\\ud" in content or b"\\uD" in content:  # half a character, which no file or page could be written with
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise InputError(f"{what} not found: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        remedy = "" if isinstance(kind, str) else f": {kind.remedy}"
        raise InputError(f"{what} cannot be read: {path}: {first_line(error)}{remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} is damaged: {path} holds {type(value).__name__}, expected a JSON object")
    check_nesting(value, content, f"{what} {path}")
    if isinstance(kind, Kind):
        check(path, content, value.pop(ENTRY, None), kind, key)
    return value


def has_digest(path: Path) -> bool:
    """Whether a JSON file says what it is for, and so was checked when it was read."""
    return f'"{ENTRY}"'.encode() in path.read_bytes()


def is_number(value: object) -> bool:
    """Whether a value that was read is a number that float64 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > sys.float_info.max


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"holds {name}, which JSON cannot hold")


def check_archive(path: Path) -> None:
    """Refuse a zip archive, such as `torch.save` writes, that unpacks to very many times its size.

    Raises:
        InputError: it does. Of a file that is no archive nothing is said.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
    except Exception:  # no archive, or a damaged one, which fails in many ways: what reads it tells
        return
    check_expansion(unpacked, path.stat().st_size, str(path))


def write_table(path: Path, frame: pd.DataFrame, kind: Kind) -> None:
    """Write a frame as a parquet file, without its index, atomically."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), ENTRY: json.dumps(kind.entry())})
    content = io.BytesIO()
    parquet.write_table(table, content, compression="zstd")
    write_atomic(path, sealed(content.getvalue()))


def read_table(path: Path, kind: Kind, filters: list[tuple[str, str, Any]] | None = None) -> pd.DataFrame:
    """Read what `write_table` wrote.

    Args:
        filters: which rows, as pyarrow takes them: `[("feature", "in", [3, 4])]`; by default all.

    Raises:
        InputError: the file is missing, damaged, or for something else.
    """
    from pyarrow import parquet

    try:
        content = path.read_bytes()
        opened = parquet.ParquetFile(io.BytesIO(content))
        entry = json.loads((opened.metadata.metadata or {}).get(ENTRY.encode(), b"null"))
        check(path, content, entry, kind)
        rows = opened.read() if filters is None else parquet.read_table(io.BytesIO(content), filters=filters)
        frame: pd.DataFrame = rows.to_pandas()
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{kind.name} not found: {path} does not exist") from None
    except Exception as error:  # damaged bytes fail in the readers of parquet, of JSON or of pandas, each in its way
        raise InputError(f"{path} cannot be read as parquet ({first_line(error)}): {kind.remedy}") from None
    return frame


def read_tensors(path: Path, kind: Kind | None = None, digest: str | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Args:
        kind: what it must be for; None for a file of any origin.
        digest: that the file must have, if known.

    Raises:
        InputError: the file is missing, damaged, of another format, for something else, or of another digest.
    """
    from safetensors.torch import load_file

    _, own = check_tensors(path, kind)
    if digest is not None and own != digest:
        raise InputError(f"{path} is not the file that was written with the config beside it: write both again")
    return load_file(path)


def check_tensors(path: Path, kind: Kind | None = None) -> tuple[dict[str, str], str]:
    """Check a safetensors file; gives its metadata, without what it says of itself, and its digest, empty if none.

    Raises:
        InputError: as `read_tensors`.
    """
    what = "weights" if kind is None else kind.name
    try:
        with safe_open(path, framework="pt") as opened:
            about: dict[str, str] = opened.metadata() or {}
        entry = about.pop(ENTRY, None)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return about, check(path, content, None if entry is None else json.loads(entry), kind)
    except FileNotFoundError:
        raise InputError(f"{what} not found: {path} does not exist") from None
    except InputError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        pass_shortage(error)
        line = f"{path} is damaged, truncated or no safetensors file ({first_line(error)})"
        raise InputError(f"{what} cannot be read: {line}{'' if kind is None else f': {kind.remedy}'}") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], kind: Kind, metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file so that a crash or a full disk leaves the old one; gives its digest.

    Raises:
        InputError: the disk is full or cannot be written.
    """
    from safetensors.torch import save_file

    try:
        with replaced(path, by_library=True) as temporary:
            save_file(_on_cpu(tensors), temporary, {**(metadata or {}), ENTRY: json.dumps(kind.entry())})
            digest = fill_digest(temporary)
        sync_folder(path.parent)
        return digest
    except (SafetensorError, OSError) as error:
        about = f"; {room(path, sum(t.nbytes for t in tensors.values()))}" if disk_error(error) in DISK_FULL else ""
        raise InputError(f"cannot write {path} ({error}{about}): free space or choose another folder") from None


def fill_digest(path: Path) -> str:
    """Fill in the digest of a file; gives it."""
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            start = content.find(BLANK)
            digest = _digest(view, start)
        file.seek(start)
        file.write(digest)
    return digest.decode()


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
