"""The state of an interrupted training: weights, optimiser and place, in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from glp_lens.artifacts import write_tensors
from glp_lens.errors import InputError
from glp_lens.types import Json


@dataclass(frozen=True)
class Place:
    """Where a training stopped.

    Attributes:
        pending: sum and number of the losses since the last entry of the history.
    """

    step: int
    history: list[Json]
    seconds: float
    pending: tuple[float, int] = (0.0, 0)


def save(path: Path, key: Json, module: nn.Module, optimizer: Optimizer, place: Place) -> None:
    """Write the state atomically; a crash leaves the previous one."""
    tensors: dict[str, Tensor] = {f"weights.{name}": p for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters():
        for slot, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{slot}.{name}"] = value
    write_tensors(path, tensors, {"place": json.dumps({"key": key, **asdict(place)})})


def load(path: Path, key: Json, module: nn.Module, optimizer: Optimizer) -> Place | None:
    """Put a saved state back into `module` and `optimizer`; None if there is none.

    Raises:
        InputError: the file is damaged, or belongs to a training with other settings or data.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            place, names = json.loads(file.metadata()["place"]), file.keys()
            if place.pop("key") != json.loads(json.dumps(key)):
                raise InputError(
                    f"{path} belongs to a training with other settings or data: delete it, or choose another folder"
                )
            slots = sorted({name.split(".", 2)[1] for name in names if name.startswith("optimizer.")})
            for name, parameter in module.named_parameters():
                parameter.data.copy_(file.get_tensor(f"weights.{name}"))
                optimizer.state[parameter] = {
                    slot: file.get_tensor(f"optimizer.{slot}.{name}").to(parameter.device) for slot in slots
                }
            return Place(**{**place, "pending": tuple(place["pending"])})
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise InputError(f"training state {path} is damaged ({error}): delete it to start afresh") from None
