"""Results come back where the rows lie, with a model on another device that is only pretended.

A tensor "elsewhere" says it lies on the meta device and keeps its numbers on the CPU. Like a real accelerator it
refuses to compute with tensors that lie on the CPU, and to hold float64.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from glp_lens.activations.writer import write_store
from glp_lens.interface import Featurizer, Projector, Reconstructor, Sampler, Scorer, VelocityField
from tests.unit.test_models_conformance import FITS, rows

THERE, HERE = torch.device("meta"), torch.device("cpu")


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device."""

    @staticmethod
    def __new__(cls, inner):
        assert inner.dtype != torch.float64, "float64 on a device that has none"
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=THERE
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Pretend(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


def dispatch(func, args, kwargs):
    flat = tree_flatten((args, kwargs))[0]
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, Elsewhere) for t in tensors)
    name = func.overloadpacket.__name__
    moving = name in ("_to_copy", "copy_")
    if there and not moving and "index" not in name:
        for t in tensors:
            assert isinstance(t, Elsewhere) or t.ndim == 0, f"{name} of tensors on two devices"
    device = kwargs.get("device")
    if device is not None:
        there = torch.device(device) == THERE
        kwargs = {**kwargs, "device": HERE}
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, Elsewhere) else t, (args, kwargs))
    out = func(*args, **kwargs)
    return tree_map(lambda t: Elsewhere(t) if there and isinstance(t, torch.Tensor) else t, out)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("devices") / "store", rows(613), hook="h")


@pytest.fixture(scope="module", params=FITS)
def kind(request):
    return request.param


METHODS = {
    Featurizer: ["encode"],
    Reconstructor: ["reconstruct"],
    Projector: ["project"],
    Scorer: ["score"],
    VelocityField: ["normalize", "denormalize"],
}


@pytest.mark.parametrize("where", [HERE, THERE], ids=["rows here", "rows there"])
@pytest.mark.parametrize("home", [HERE, THERE], ids=["model here", "model there"])
def test_results_come_back_where_the_rows_are(kind, store, home, where):
    model = FITS[kind](store)
    x, noise = rows(17, seed=1), torch.randn(17, 14, generator=torch.Generator().manual_seed(3))
    calls = {n: lambda x, n=n: getattr(model, n)(x) for c in METHODS if isinstance(model, c) for n in METHODS[c]}
    for name in calls.keys() & {"encode", "reconstruct", "project", "score"}:
        calls[name] = lambda x, n=name: getattr(model, n)(x, noise=noise)
    if isinstance(model, VelocityField):
        calls["velocity"] = lambda x: model.velocity(x, 0.3)
        calls["velocity by row"] = lambda x: model.velocity(x, torch.linspace(0.1, 0.9, 17))
    want = {name: call(x) for name, call in calls.items()}
    drawn = model.sample(17, noise=noise) if isinstance(model, Sampler) else None
    with Pretend(), torch.no_grad():
        move(model, home)
        given = x.to(where)
        for name, call in calls.items():
            got = call(given)
            assert got.device == where, name
            torch.testing.assert_close(got.to(HERE), want[name], rtol=1e-5, atol=1e-4, msg=name)
        if drawn is not None:
            got = model.sample(17, noise=noise)
            assert got.device == home
            torch.testing.assert_close(got.to(HERE), drawn, rtol=1e-5, atol=1e-4)


def move(model, device):
    """`model.to(device)`, for modules too, whose parameters do not take foreign tensors."""
    for value in vars(model).values():
        if isinstance(value, torch.nn.Module):
            for module in value.modules():
                for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                    if tensor is not None:
                        module._parameters.pop(name, None)
                        module._buffers.pop(name, None)
                        module.__dict__[name] = tensor.detach().to(device)
    for name, value in vars(model).items():
        if isinstance(value, torch.Tensor):
            setattr(model, name, value.to(device))
