"""Training on several processes: joining them, averaging gradients, and sharding weights.

In a single process everything here is the identity, except `shard`, which needs several.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from glp_lens.errors import InputError

_TIMEOUT = timedelta(minutes=10)
"""Time that a process waits for the others before it fails."""


@contextmanager
def session(device: str | None = None) -> Iterator[None]:
    """Context in which the processes that `torchrun` started work together; without torchrun, no change.

    Args:
        device: `cpu` or `cuda`; by default `cuda` where there is a GPU.

    Raises:
        InputError: more processes on this machine than it has GPUs.
    """
    if running() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield
        return
    cuda = device.startswith("cuda") if device else torch.cuda.is_available()
    if cuda:
        local, count = _local_rank(), torch.cuda.device_count()
        if local >= count:
            raise InputError(f"this machine has {count} GPU(s), and more processes: pass --nproc-per-node {count}")
        torch.cuda.set_device(local)
        own = torch.device("cuda", local)
        distributed.init_process_group("cpu:gloo,cuda:nccl", **_meeting_place(), device_id=own)
    else:
        distributed.init_process_group("gloo", **_meeting_place())
    try:
        yield
    except BaseException:
        # Destroying an NCCL group waits for all processes, some of which may be waiting for this one: torchrun ends
        # them once this process has exited.
        if not cuda:
            distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


def device(name: str) -> str:
    """A device by its name; `cuda` becomes this process's own GPU."""
    return f"cuda:{_local_rank()}" if name == "cuda" and running() else name


def _meeting_place() -> dict[str, Any]:
    """The rendezvous of the processes, as arguments of `init_process_group`."""
    store, rank, size = next(iter(rendezvous("env://", timeout=_TIMEOUT)))
    # Processes that torchrun restarts get the store of their predecessors, with addresses of processes that are gone.
    # On one machine all have the same number of restarts, which can serve as a prefix of their own.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"start-{restarts}", store)  # type: ignore[attr-defined]
    return {"store": store, "rank": rank, "world_size": size, "timeout": _TIMEOUT}


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


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
    """The main process's answer, in every process."""
    if not running():
        return answer
    answers = [answer]
    distributed.broadcast_object_list(answers, src=0)
    return answers[0]


def wrap(module: nn.Module) -> nn.Module:
    """The module to run, whose gradients are averaged over the processes; its parameters are the given module's."""
    if not running() or is_sharded(module):
        return module  # sharded modules average by themselves
    return DistributedDataParallel(module)


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Context in which gradients are not exchanged: for all micro-batches of a step but the last."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def shard(module: nn.Module, *, bfloat16: bool) -> nn.Module:
    """A copy of a denoiser whose weights, gradients and optimiser states are spread over the processes (FSDP2).

    The given module's own weights move to the CPU; `gather` brings them up to date.

    Args:
        bfloat16: exchange and use the weights in bfloat16, under autocast; what is kept and summed is float32.

    Raises:
        InputError: there is one process only, or the installed torch has no FSDP2.
    """
    if not running():
        raise InputError(
            "shard_weights spreads a prior over several processes: start them with torchrun --nproc-per-node N"
        )
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:
        raise InputError(f"shard_weights needs torch 2.6 or later, this is {torch.__version__}") from None
    mesh = init_device_mesh(next(module.parameters()).device.type, (world_size(),))
    # Inputs stay as they are: bfloat16 has no room for a noise level's digits. Autocast fits each to its weight.
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if bfloat16
        else MixedPrecisionPolicy()
    )
    copy = deepcopy(module.cpu())
    for norm in [m for m in copy.modules() if isinstance(m, nn.LayerNorm)]:
        # Their weights are near 1, where bfloat16 has steps of 0.8%; autocast leaves them in float32 too.
        fully_shard(norm, mesh=mesh, reshard_after_forward=True)
    for part in (*copy.get_submodule("layers").children(), copy):
        # By default the outermost part would stay gathered after a forward pass without a backward pass.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return copy


@torch.no_grad()
def gather(sharded: nn.Module, into: nn.Module) -> None:
    """Copy the weights of a sharded module into the module that it was made from; every process gets all of them."""
    if not is_sharded(sharded):
        return
    for ours, theirs in zip(into.parameters(), sharded.parameters(), strict=True):
        ours.copy_(whole(theirs.detach()))


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only a part of the module's weights."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """A whole tensor, moved to the device of `sharded` and sharded like it."""
    moved = tensor.to(sharded.device)
    if not hasattr(sharded, "full_tensor") or tensor.ndim == 0:
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(sharded, DTensor)
    return distribute_tensor(moved, sharded.device_mesh, sharded.placements)
