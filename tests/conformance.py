"""What every model of activations must do, as reusable checks: one function a capability.

`check_model(model, x, folder)` runs those that apply. `x` is `(n, d_in)` float32 rows like the training data,
best with an odd n; equal or round shapes hide transposes. Works on any implementer of `glp_lens.interface`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.interface import Decoder, Featurizer, Projector, Reconstructor, Sampler, Scorer, VelocityField
from glp_lens.models import load


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], Any]] = {
    "default bfloat16": partial(default_dtype, torch.bfloat16),
    "default float64": partial(default_dtype, torch.float64),
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "autocast not enabled": partial(torch.autocast, "cpu", enabled=False),
    "gradients off": partial(torch.set_grad_enabled, False),
    "inference mode": torch.inference_mode,
}
"""Modes of torch that a caller may have set, none of which may change a number."""
SPLIT = 3
"""Rows in the first part when a batch is split."""


def check_model(model: Any, x: Tensor, folder: Path) -> None:
    """Every check that the model's capabilities call for."""
    assert x.ndim == 2
    assert len(x) > SPLIT + 1
    for capability, check in CHECKS.items():
        if isinstance(model, capability):
            check(model, x)
    check_saved(model, x, folder)
    check_modes(model, x, folder)


def check_featurizer(model: Any, x: Tensor) -> None:
    assert isinstance(model.n_features, int)
    _check_rowwise(model.encode, model, x, width=model.n_features)


def check_decoder(model: Any, x: Tensor) -> None:
    features = model.encode(x)
    decoded, offset = model.decode(features), model.decode(torch.zeros_like(features))
    _check_output(decoded, tuple(x.shape))
    _close(model.decode(3 * features) - offset, 3 * (decoded - offset))
    assert (decoded - x).square().sum() < (x - x.mean(0)).square().sum(), "no nearer to the rows than their mean"


def check_reconstructor(model: Any, x: Tensor) -> None:
    _check_rowwise(model.reconstruct, model, x, width=model.d_in)


def check_projector(model: Any, x: Tensor) -> None:
    _check_rowwise(model.project, model, x, width=model.d_in)
    noise = noise_like(x)
    name, hook = model.projection_hook(
        "blocks.3.hook_resid_post", allow_mismatch=True, noise=lambda texts, positions, width: noise[: len(texts)]
    )
    assert name == "blocks.3.hook_resid_post"
    stream = torch.stack([x[:4], x[1:5], x[:4]]).bfloat16()
    before = stream.clone()
    edited = hook(stream, hook=None)
    assert edited.dtype == torch.bfloat16
    assert torch.equal(stream, before), "the hook changed the stream in place"
    assert torch.equal(edited[:, :-1], stream[:, :-1]), "the hook changed positions before the last"
    precision = {"dtype": torch.bfloat16} if model.takes_dtype else {}
    expected = model.project(stream[:, -1].float(), noise=noise[:3], **precision).bfloat16()
    assert torch.equal(edited[:, -1], expected)


def check_sampler(model: Any, x: Tensor) -> None:
    noise = noise_like(x)
    drawn = model.sample(len(x), noise=noise)
    _check_output(drawn, (len(x), model.d_in))
    assert torch.equal(drawn, model.sample(len(x), noise=noise)), "the same noise gave another sample"
    by_seed = [model.sample(5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(by_seed[0], by_seed[1]), "the same seed gave another sample"
    assert not torch.equal(by_seed[0], by_seed[2]), "another seed gave the same sample"
    with pytest.raises(InputError, match="noise"):
        model.sample(len(x) - 1, noise=noise)


def check_scorer(model: Any, x: Tensor) -> None:
    _check_rowwise(model.score, model, x, width=None)


def check_velocity_field(model: Any, x: Tensor) -> None:
    z = model.normalize(x)
    _check_output(z, tuple(x.shape))
    _close(model.denormalize(z), x)
    one = model.velocity(z, 0.37)
    _check_output(one, tuple(x.shape))
    _close(model.velocity(z, torch.full((len(x),), 0.37)), one)
    mixed = torch.linspace(0.05, 0.95, len(x))
    row = SPLIT + 1
    _close(model.velocity(z, mixed)[row : row + 1], model.velocity(z[row : row + 1], float(mixed[row])))


def check_saved(model: Any, x: Tensor, folder: Path) -> None:
    """A saved model comes back bit for bit, with what is known of its origin."""
    assert isinstance(model, ActivationModel)
    model.save_pretrained(folder)
    model.save_pretrained(folder)
    for again in (type(model).from_pretrained(folder), load(folder)):
        assert type(again) is type(model)
        assert again.provenance == model.provenance
        assert (again.d_in, again.hook, again.max_norm) == (model.d_in, model.hook, model.max_norm)
        _check_same(results(again, x), results(model, x), "saving and loading")


def check_modes(model: Any, x: Tensor, folder: Path) -> None:
    """The caller's modes of torch change nothing, neither in use nor in loading, nor does their mark on the rows."""
    expected = results(model, x)
    for name, mode in MODES.items():
        with mode():
            again = type(model).from_pretrained(folder)
            _check_same(results(model, x.clone()), expected, name)
            rows = x.clone()
        _check_same(results(again, rows), expected, name)


def results(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What each method gives for the rows, by its name."""
    noise = noise_like(x)
    found = {
        method: getattr(model, method)(len(x) if capability is Sampler else x, noise=noise)
        for capability, method in METHODS.items()
        if isinstance(model, capability)
    }
    if isinstance(model, Decoder):
        found["decode"] = model.decode(cast("Featurizer", model).encode(x))
    if isinstance(model, VelocityField):
        found["normalize"] = z = model.normalize(x)
        found["denormalize"], found["velocity"] = model.denormalize(z), model.velocity(z, 0.37)
    return found


def _check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], cause: str) -> None:
    for method, value in found.items():
        assert value.dtype == torch.float32, f"{method} gave {value.dtype} by {cause}"
        assert torch.equal(value, expected[method]), f"{method} was changed by {cause}"
        assert not value.is_inference(), f"{method} gave a tensor that cannot be trained on by {cause}"


def noise_like(x: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _check_rowwise(method: Callable[..., Tensor], model: Any, x: Tensor, width: int | None) -> None:
    """Shape and type, no side effects, rows independent of their batch, and clear refusals."""
    noise = noise_like(x)
    shape = (len(x),) if width is None else (len(x), width)
    before = x.clone()
    out = method(x, noise=noise)
    _check_output(out, shape)
    out_before = out.clone()
    assert torch.equal(out, method(x, noise=noise)), "the same input and noise gave another output"
    out.add_(1)
    assert torch.equal(x, before), "the input was changed, or the output shares its memory"
    _close(
        torch.cat([method(x[:SPLIT], noise=noise[:SPLIT]), method(x[SPLIT:], noise=noise[SPLIT:])]),
        out_before,
    )
    order = torch.arange(len(x) - 1, -1, -1)
    _close(method(x[order], noise=noise[order]), out_before[order])
    low = x.bfloat16()
    _close(method(low, noise=noise), method(low.float(), noise=noise))
    by_seed = [method(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(by_seed[0], by_seed[1]), "the same seed gave another output"
    if not getattr(model, "stochastic", False):
        assert torch.equal(by_seed[0], by_seed[2]), "depends on the seed, but is not declared stochastic"
        assert torch.equal(by_seed[0], method(x)), "depends on noise, but is not declared stochastic"
    for wrong in (x[:, :-1], x[0], x[None], torch.cat([x, x[:, :1]], 1)):
        with pytest.raises(InputError, match="shape"):
            method(wrong)
    with pytest.raises(InputError, match="finite"):
        method(x.index_fill(1, torch.tensor(1), torch.nan))


def _check_output(out: Tensor, shape: tuple[int, ...]) -> None:
    assert tuple(out.shape) == shape
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert not out.requires_grad


def _close(a: Tensor, b: Tensor) -> None:
    """Equal but for the rounding that another order of summation makes."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()) + 1e-6)


CHECKS: dict[type, Callable[[Any, Tensor], None]] = {
    Featurizer: check_featurizer,
    Decoder: check_decoder,
    Reconstructor: check_reconstructor,
    Projector: check_projector,
    Sampler: check_sampler,
    Scorer: check_scorer,
    VelocityField: check_velocity_field,
}
METHODS: dict[type, str] = {
    Featurizer: "encode",
    Reconstructor: "reconstruct",
    Projector: "project",
    Sampler: "sample",
    Scorer: "score",
}
