"""Steering inside language models: with a cache and without, padded on either side, at several layers at once."""

import pytest
import torch

from glp_lens import hooks, lm
from glp_lens.interface import Projector

TEXTS = ["cat dog bird fish horse tree", "sun moon", "red gold blue"]
NEW = 5
POINTS = ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.3.hook_resid_post"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Squash(Projector):
    """Stands in for a prior: not linear, and it depends on its noise."""

    hook, max_norm, d_in = None, None, 24

    def project(self, x, *, noise=None, generator=None):
        return 2 * torch.tanh(x / 2) + 0.3 * noise


WAYS = {
    "add, difference": {"operation": "add", "repair": "difference", "positions": "all"},
    "ablate, orthogonal": {"operation": "ablate", "repair": "orthogonal", "positions": "prompt"},
    "clamp, project": {"operation": "clamp", "repair": "project", "positions": "generated"},
    "rotate, project": {"operation": "rotate", "repair": "project", "positions": "last"},
}


def steering(keys, seed, way, mask=None):
    """A hook of two directions, with noise by key."""
    return hooks.steer(normal(2, 24, seed=3), 2.0, Squash(), noise=hooks.SeededNoise(seed, keys), mask=mask,
                       renormalize="before", centre=normal(24, seed=4), **WAYS[way])  # fmt: skip


def several(keys, way, mask=None):
    """Different hooks at three layers at once."""
    return [(point, steering(keys, seed, way, mask)) for seed, point in enumerate(POINTS)]


def generated(model, prompt, hook_list, *, cached):
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with model.hooks(fwd_hooks=hook_list), torch.no_grad():
        return model.generate(prompt, **options, return_type="tokens", use_past_kv_cache=cached)


@pytest.mark.parametrize("way", WAYS)
def test_texts_are_the_same_with_a_cache_without_and_in_any_batch(tiny_model, way):
    rows = torch.tensor([row[:3] for row in lm.to_ids(tiny_model, TEXTS, 3)])
    keys = ["a", "b", 7]
    cached = generated(tiny_model, rows, several(keys, way), cached=True)
    assert torch.equal(cached, generated(tiny_model, rows, several(keys, way), cached=False))
    assert torch.equal(cached, lm.generate(tiny_model, rows, NEW, hooks=several(keys, way)))
    order = [2, 0]
    other = generated(tiny_model, rows[order], several([keys[i] for i in order], way), cached=True)
    assert torch.equal(other, cached[order])
    assert not torch.equal(cached, generated(tiny_model, rows, [], cached=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_steered_as_if_alone(tiny_model, way, side):
    ids = lm.to_ids(tiny_model, TEXTS, 9)
    width = max(map(len, ids))

    def pad(row, fill):
        padding = [fill] * (width - len(row))
        return padding + row if side == "left" else row + padding

    tokens = torch.tensor([pad(row, 1) for row in ids])
    mask = torch.tensor([pad([1] * len(row), 0) for row in ids]).bool()
    keys = ["a", "b", 7]
    together = tiny_model.run_with_hooks(
        tokens, attention_mask=mask.long(), fwd_hooks=several(keys, way, mask), return_type="logits"
    )
    for i, row in enumerate(ids):
        alone = tiny_model.run_with_hooks(
            torch.tensor([row]), fwd_hooks=several(keys[i : i + 1], way), return_type="logits"
        )
        torch.testing.assert_close(together[i, mask[i]], alone[0], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cached", [True, False])
def test_texts_of_a_left_padded_batch_are_those_of_each_prompt_alone(tiny_bridge, way, cached):
    ids, keys = lm.to_ids(tiny_bridge, TEXTS, 9), ["a", "b", 7]
    width = max(map(len, ids))
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]).bool()
    together = generated(tiny_bridge, TEXTS, several(keys, way, mask), cached=cached)
    for i, row in enumerate(ids):
        alone = generated(tiny_bridge, torch.tensor([row]), several(keys[i : i + 1], way), cached=cached)
        assert together[i, width:].tolist() == alone[0, len(row) :].tolist()


def test_the_stream_keeps_its_dtype_and_strength_zero_changes_no_text(tiny_folder):
    model = lm.open_model(str(tiny_folder), dtype="bfloat16")
    tokens, mask = lm.pad(lm.to_ids(model, TEXTS, 9))
    seen = []
    watch = ("blocks.1.hook_resid_post", lambda x, *, hook: seen.append(x.dtype) or x)
    clean = lm.token_nll(model, tokens, mask)
    fn = hooks.steer(normal(24), torch.zeros(3), Squash(), "all", repair="difference", mask=mask)
    assert torch.equal(lm.token_nll(model, tokens, mask, [(POINTS[0], fn), watch]), clean)
    assert seen == [torch.bfloat16]
