"""Sampling: rows drawn from a trained model, as a file."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glp_lens.arguments import checked
from glp_lens.errors import InputError, counted
from glp_lens.limits import MOST_STEPS
from glp_lens.pipeline.inputs import ResultSettings, RunSettings
from glp_lens.pipeline.stages import check_output
from glp_lens.settings import option

if TYPE_CHECKING:
    from torch import Tensor

    from glp_lens.artifacts import ActivationModel
    from glp_lens.types import Acts, Json

_SUFFIXES = (".npy", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class SampleJob(ResultSettings, RunSettings):
    """Settings of `sample`."""

    essentials = ("n", "steps", "solver", "fast", "class_label", "seed", "device", "out")

    panel = "Sampling"

    folder: str
    """Folder or Hub id of a trained model that can sample: a GLP, a Gaussian, PCA, or raw activations."""
    n: int = option(1024, min=1, memory=True)
    """Rows to draw."""
    steps: int | None = option(None, min=1, max=MOST_STEPS)
    """Of a GLP: steps from noise to data; by default 20."""
    solver: str | None = None
    """Of a GLP: how steps are taken; by default euler."""
    grid: str | None = None
    """Of a GLP: how noise levels are spaced; by default released."""
    fast: bool = False
    """Of a GLP: the accuracy of the default with a third of its network calls."""
    class_label: float | None = option(None, flag="--class")
    """Of a GLP trained with --condition: the class of all rows, as the store's label has it."""
    guidance: float | None = None
    """Of --class: its weight, 1 as trained, more to exaggerate it."""
    layer: int | None = option(None, min=0)
    """Of a GLP of many layers: the layer."""
    out: Path = option(Path("rows.npy"), panel="Run")
    """File for the rows: .npy, or .safetensors with the tensor 'activations'."""

    def __post_init__(self) -> None:
        """Refuse what could not be written, or has nothing to act on."""
        super().__post_init__()
        if self.out.suffix not in _SUFFIXES:
            raise InputError(f"--out must be a {' or '.join(_SUFFIXES)} file, got {self.out}")
        if self.guidance is not None and self.class_label is None:
            raise InputError("--guidance is the weight of a class: pass --class too")


@checked
def sample(settings: SampleJob, *, say: Callable[[str], None] = print) -> Acts:
    """Draw rows from a trained model into a file; equal seeds give equal rows.

    Args:
        say: prints a line.

    Returns:
        The rows `(n, d_in)`, float32, in activation units.

    Raises:
        InputError: a model that cannot sample or lacks an option, or a file that is already there.
    """
    import torch

    from glp_lens import models
    from glp_lens.interface import Sampler
    from glp_lens.lm import check_device

    check_output(settings.out, overwrite=settings.overwrite)
    check_device(settings.device)
    model = models.load(settings.folder).to(settings.device)
    if not isinstance(model, Sampler):
        raise InputError(f"{settings.folder} is of kind {model.kind}, which cannot sample: pass a GLP, Gaussian or PCA")
    options = _options(settings, model, inspect.signature(model.sample).parameters.keys())
    noise = torch.Generator().manual_seed(settings.seed)
    rows = model.sample(settings.n, generator=noise, **options).detach().float().cpu()
    _write(rows, settings.out, {"model": model.kind, "hook": model.hook or "", "seed": str(settings.seed)})
    say(f"{counted(len(rows), 'row')} of width {rows.shape[1]}: {settings.out}")
    return rows


def _options(settings: SampleJob, model: ActivationModel, known: object) -> Json:
    """The options that were given, as the model's `sample` takes them.

    Raises:
        InputError: one that the model lacks, or a class that it does not know.
    """
    given = {name: getattr(settings, name) for name in ("steps", "solver", "grid", "guidance", "layer")}
    options: Json = {name: value for name, value in given.items() if value is not None}
    if settings.fast:
        options["fast"] = True
    if settings.class_label is not None:
        vectors = getattr(model, "class_vectors", {})
        if settings.class_label not in vectors:
            classes = ", ".join(f"{value:g}" for value in sorted(vectors)) or "none"
            raise InputError(f"this {model.kind} knows no class {settings.class_label:g}: it knows {classes}")
        options["condition"] = vectors[settings.class_label]
    if strange := [name for name in options if name not in known]:  # type: ignore[operator]
        raise InputError(f"a {model.kind} has no option --{strange[0]}: leave it out")
    return options


def _write(rows: Tensor, path: Path, about: dict[str, str]) -> None:
    from glp_lens.files import Kind, write_atomic, write_tensors

    if path.suffix == ".safetensors":
        write_tensors(path, {"activations": rows}, Kind("activations", "sample them again"), about)
        return
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, rows.numpy(), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
