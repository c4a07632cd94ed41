"""A steering direction: a unit vector at a hook point, what made it, and how well it tells texts apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from glp_lens.arguments import checked
from glp_lens.errors import InputError, first_line
from glp_lens.files import Kind, check_tensors, is_number, read_tensors, write_tensors
from glp_lens.intervals import Interval
from glp_lens.types import Json

KEY = "glp_lens_direction"
"""Under this key the metadata of a safetensors file holds everything but the vector, as JSON."""
_FILE = Kind("direction", "make or copy it again")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says in one line (InputError) that a file, or its folder, cannot be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path} ({first_line(error)}): choose another folder") from None


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction to steer along.

    Attributes:
        vector: `(d,)` float32 on the CPU, of norm 1.
        hook: the hook point it belongs to, in TransformerLens's names.
        name: what results call it.
        method: what made it, for example `mean`.
        auroc: how well the projection on it tells held-out positive texts from negative ones, with its 95%
            interval (DeLong); None where no labelled texts were held out.
        provenance: where it came from: the language model, the texts, the options.
        norm: length of the vector before it was scaled to 1, in activation units: of a difference of means the
            distance of the means. Files of other packages hold `norm * vector`.
    """

    vector: Tensor = field(repr=False)
    hook: str
    name: str
    method: str
    auroc: Interval | None = None
    provenance: Json = field(default_factory=dict, repr=False)
    norm: float = 1.0

    @classmethod
    @checked
    def of(
        cls,
        vector: Tensor,
        hook: str,
        *,
        name: str,
        method: str,
        auroc: Interval | None = None,
        provenance: Json | None = None,
    ) -> Direction:
        """A direction from a vector `(d,)` of any length, dtype and device.

        Raises:
            InputError: the vector is no vector, not finite, or 0.
        """
        if vector.ndim != 1 or not len(vector):
            raise InputError(f"a direction is one vector (d,), got the shape {tuple(vector.shape)}")
        exact = vector.detach().cpu().double()
        norm = float(exact.norm())
        if not torch.isfinite(exact).all() or norm == 0:
            what = "is 0 everywhere" if norm == 0 else "holds values that are not finite"
            raise InputError(f"direction {name!r} at {hook} {what}: it points nowhere")
        return cls((exact / norm).float(), hook, name, method, auroc, provenance or {}, norm)

    @property
    def d_in(self) -> int:
        """Width of the activations it belongs to."""
        return len(self.vector)

    @checked
    def save(self, path: str | Path) -> Path:
        """Write it as a safetensors file: the tensor `vector`, and the rest as JSON in the file's metadata.

        Raises:
            InputError: the name does not end in `.safetensors`, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"a direction is saved as a .safetensors file, got {path}")
        about = self.to_json()
        del about["vector"]
        with writing(path):
            write_tensors(path, {"vector": self.vector}, _FILE, {KEY: json.dumps(about, allow_nan=False)})
        return path

    def to_json(self) -> Json:
        """As JSON, the vector as numbers."""
        return {
            "vector": self.vector.tolist(), "hook": self.hook, "name": self.name, "method": self.method,
            "norm": self.norm, "auroc": None if self.auroc is None else self.auroc._asdict(),
            "provenance": self.provenance,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Json) -> Direction:
        """What `to_json` gave; ValueError, KeyError or TypeError if it is something else."""
        auroc = None if value["auroc"] is None else Interval(**value["auroc"])
        vector = torch.as_tensor(value["vector"], dtype=torch.float32)
        if vector.ndim != 1 or not len(vector) or not vector.isfinite().all() or not is_number(value["norm"]):
            raise ValueError("expected a vector (d,) of finite numbers, and its norm")
        if auroc is not None and not all(map(is_number, auroc)):
            raise ValueError("its auroc is no interval")
        hook, name, method = (str(value[key]) for key in ("hook", "name", "method"))
        return cls(vector, hook, name, method, auroc, dict(value["provenance"]), float(value["norm"]))

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Direction:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, damaged, or another kind of safetensors file.
        """
        path = Path(path)
        metadata, _ = check_tensors(path)
        about = metadata.get(KEY)
        if about is None:
            raise InputError(
                f"{path} was not saved by this package: read it with glp_lens.directions.read(path, hook=...)"
            )
        try:
            return cls.from_json({**json.loads(about), "vector": read_tensors(path, _FILE)["vector"]})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"direction is damaged: {path}: {first_line(error)}") from None
