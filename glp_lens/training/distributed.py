"""One training on several processes: who does which rows, and how gradients and weights come together.

Everything here is the identity in a process of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def running() -> bool:
    """Whether this process is one of several that train together."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Which of the processes this is."""
    return distributed.get_rank() if running() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if running() else 1


def is_main() -> bool:
    """Whether this is the process that reports and writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if running():
        distributed.barrier()


def mean(value: Tensor) -> Tensor:
    """Mean over the processes."""
    if not running():
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / world_size()


def agreed(answer: bool) -> bool:
    """The main process's answer, for all."""
    if not running():
        return answer
    told = [answer]
    distributed.broadcast_object_list(told, src=0)
    return told[0]


def wrap(module: nn.Module) -> nn.Module:
    """The module to run, whose gradients are averaged over the processes; its parameters are the given module's."""
    if not running() or any(isinstance(p, DTensor) for p in module.parameters()):
        return module  # sharded modules see to it themselves
    return DistributedDataParallel(module)


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Where gradients are added up without an exchange: for all parts of an accumulated step but the last."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor, on the device of `sharded` and in its parts."""
    moved = tensor.to(sharded.device)
    if not isinstance(sharded, DTensor) or tensor.ndim == 0:
        return moved
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements)
