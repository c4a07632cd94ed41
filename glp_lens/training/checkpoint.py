"""The state of an unfinished training: weights, optimisers, weight average and progress, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from glp_lens.errors import InputError
from glp_lens.files import Kind, check_tensors, write_tensors
from glp_lens.training import distributed
from glp_lens.training.config import FREE, TrainConfig
from glp_lens.types import Json

_FILE = Kind("training state", "delete it to start afresh")
_DEFAULTS = {f.name: f.default for f in fields(TrainConfig) if f.name not in FREE}
"""What settings were in states of builds that did not have them."""


class OtherTrainingError(InputError):
    """A state belongs to a training with other settings or data."""


@dataclass(frozen=True)
class Place:
    """How far a training has come.

    Attributes:
        step: steps done.
        history: entries so far.
        seconds: wall-clock time so far.
        pending: sums of losses and gradient norms since the last entry of the history, and their number.
    """

    step: int = 0
    history: list[Json] = field(default_factory=list)
    seconds: float = 0.0
    pending: tuple[float, float, int] = (0.0, 0.0, 0)


@dataclass(frozen=True)
class Parts:
    """Everything whose tensors are saved.

    Attributes:
        module: the denoiser in training.
        optimizers: each updates some of its parameters.
        average: running average of the weights by the name of the parameter; empty if there is none.
    """

    module: nn.Module
    optimizers: list[Optimizer]
    average: dict[str, Tensor]

    def owned(self) -> Iterator[tuple[str, nn.Parameter, Optimizer]]:
        """Each parameter with its name and the optimiser that updates it."""
        owner = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, parameter in self.module.named_parameters():
            yield name, parameter, owner[parameter]


def save(path: Path, key: Json, parts: Parts, place: Place) -> None:
    """Write the state atomically; a crash leaves the previous one. All processes must call it, and one writes."""
    tensors: dict[str, Tensor] = {}
    for name, parameter, optimizer in parts.owned():
        tensors[f"weights.{name}"] = distributed.whole(parameter.detach())
        for slot, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{slot}.{name}"] = distributed.whole(value)
    for name, value in parts.average.items():
        tensors[f"average.{name}"] = distributed.whole(value)
    if distributed.is_main():
        write_tensors(path, tensors, _FILE, {"place": json.dumps({"key": key, **asdict(place)})})
    distributed.barrier()


def load(path: Path, key: Json, parts: Parts) -> Place | None:
    """Load a saved state into its parts; None if there is none.

    Raises:
        InputError: the file is damaged, belongs to a training with other settings or data, or is seen by some of the
            processes only.
    """
    if not distributed.agreed(path.exists()):
        return None
    if not path.exists():
        raise InputError(
            f"process {distributed.rank()} does not see {path}: put it in a folder that all machines share"
        )
    try:
        metadata, _ = check_tensors(path, _FILE)
        with safe_open(path, framework="pt") as file:
            place, names = json.loads(metadata["place"]), set(file.keys())
            before, now = place.pop("key"), json.loads(json.dumps(key))
            before["config"] = {name: _DEFAULTS[name] for name in now["config"] if name in _DEFAULTS} | before["config"]
            if before != now:
                other = [name for part in now for name in now[part] if before[part].get(name) != now[part][name]]
                raise OtherTrainingError(
                    f"{path} belongs to a training with other settings or data ({', '.join(other)}): delete it, or "
                    "choose another folder"
                )
            slots: dict[str, list[str]] = {}
            for name in names:
                if name.startswith("optimizer."):
                    _, slot, parameter_name = name.split(".", 2)
                    slots.setdefault(parameter_name, []).append(slot)
            for name, parameter, optimizer in parts.owned():
                parameter.data.copy_(distributed.like(file.get_tensor(f"weights.{name}"), parameter))
                own = optimizer.state[parameter]
                for slot in slots.get(name, []):
                    value = distributed.like(file.get_tensor(f"optimizer.{slot}.{name}"), parameter)
                    own[slot] = own[slot].copy_(value) if slot in own else value
            for name, value in parts.average.items():
                value.copy_(distributed.like(file.get_tensor(f"average.{name}"), value))
            return Place(**{**place, "pending": tuple(place["pending"])})
    except InputError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"training state {path} is damaged ({error}): delete it to start afresh") from None


def key_of(path: Path) -> Json:
    """What a saved state says it belongs to.

    Raises:
        InputError: the file is damaged, or no state.
    """
    metadata, _ = check_tensors(path, _FILE)
    try:
        key: Json = json.loads(metadata["place"])["key"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"training state {path} is damaged ({error}): make it again") from None
    return key


def history(path: Path) -> list[Json]:
    """The history in a saved state; empty if there is none or it is damaged, which `load` refuses."""
    try:
        metadata, _ = check_tensors(path)
        return list(json.loads(metadata["place"])["history"])
    except (KeyError, TypeError, ValueError):  # InputError is a ValueError
        return []
