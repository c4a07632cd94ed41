"""Texts read by the modules of the weights alone: the activations and losses of the model's own forward pass."""

from dataclasses import replace

import pytest
import torch

from glp_lens import lm
from glp_lens.lm import decoder, trial
from glp_lens.lm.decoder import Decoder
from tests import architectures

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.hook_out", "blocks.2.hook_in"]
LENGTHS = [17, 3, 11, 17, 1]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens a tiny model of an architecture."""
    models = {}

    def of(name, dtype="float32", **settings):
        key = (name, dtype, *settings.items())
        if key not in models:
            with pytest.MonkeyPatch.context() as patch:
                made = architectures.ARCHITECTURES[name]
                other = replace(made, settings={**made.settings, **settings})
                patch.setitem(architectures.ARCHITECTURES, name, other)
                folder = architectures.make(name, tmp_path_factory.mktemp("models") / "model")
            models[key] = lm.open_model(str(folder), backend="bridge", check=False, dtype=dtype)
        return models[key]

    return of


@pytest.fixture(params=["products", "torch's attention"])
def attention(request, monkeypatch):
    """Both ways of attention, whatever the length."""
    if request.param != "products":
        monkeypatch.setattr(decoder, "_SHORT", 0)


def texts(model):
    generator = torch.Generator().manual_seed(0)
    return lm.pad([torch.randint(3, model.cfg.d_vocab, (n,), generator=generator).tolist() for n in LENGTHS], pad_id=1)


def off(a, b, mask):
    """Largest distance of rows of real tokens over their mean norm."""
    return float((a - b)[mask].norm(dim=-1).max() / b[mask].norm(dim=-1).mean())


def no_usual_way(model, monkeypatch):
    monkeypatch.setattr(model, "run_with_hooks", lambda *_, **__: pytest.fail("the model's own forward pass was run"))


@pytest.mark.usefixtures("attention")
@pytest.mark.parametrize(
    ("name", "settings"),
    [("Llama", {}), ("Llama with biases", {}), ("Mistral", {"sliding_window": 17}), ("Qwen2", {}), ("Qwen3", {}),
     ("Gemma", {}), ("Gemma3", {"sliding_window": 40})],
)  # fmt: skip
def test_activations_are_those_of_the_models_own_forward_pass(opened, monkeypatch, name, settings):
    model = opened(name, **settings)
    tokens, mask = texts(model)
    want = lm.activations(model, tokens, mask, HOOKS, "model")
    assert lm.way_of_reading(model, HOOKS, tokens.shape[1]) == "modules"
    no_usual_way(model, monkeypatch)
    got = lm.activations(model, tokens, mask, HOOKS)
    assert set(got) == set(HOOKS)
    for hook in HOOKS:
        assert off(got[hook], want[hook], mask) < 1e-5


def test_products_that_round_otherwise_for_one_position_are_no_other_computation(opened, monkeypatch):
    """As those of some processors in bfloat16; what a wrong activation makes is more."""
    model = opened("Llama", "bfloat16", num_hidden_layers=12, hidden_size=48)
    advance, random, pushed = decoder._advance, torch.Generator().manual_seed(1), []

    def rounding(block, x, *args):
        out = advance(block, x, *args)
        if x.shape[1] == 1:
            pushed.append(block)
            eps = torch.finfo(out.dtype).eps
            out = out + out * (2 * torch.rand(out.shape, generator=random).to(out.dtype) - 1) * eps
        return out

    monkeypatch.setattr(decoder, "_advance", rounding)
    assert trial._agrees(model, Decoder.of(model))
    assert len(pushed) >= 12 * 2
    whole = Decoder.of(model)
    other = [replace(block, activation=torch.nn.GELU(approximate="tanh")) for block in whole.blocks]
    assert not trial._agrees(model, replace(whole, blocks=other))


@pytest.mark.usefixtures("attention")
def test_rounding_to_bfloat16_is_no_larger_than_in_the_models_own_forward_pass(opened):
    models = {dtype: opened("Llama", dtype, num_hidden_layers=8, hidden_size=48) for dtype in ("float32", "bfloat16")}
    hook = "blocks.6.hook_resid_post"
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, models["float32"].cfg.d_vocab, (41, 24), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    truth = lm.activations(models["float32"], tokens, mask, [hook], "model")[hook]

    def error(way):
        rows = lm.activations(models["bfloat16"], tokens, mask, [hook], way)[hook].float()
        return float((rows - truth).norm(dim=2).mean() / truth.norm(dim=2).mean())

    assert 1e-4 < error(None) < 1.05 * error("model")


def test_the_pass_ends_at_the_last_hook_point(opened):
    model = opened("Qwen2")
    tokens, mask = texts(model)
    ran = []
    points = [block.hook_in for block in model.blocks] + [block.hook_out for block in model.blocks]
    handles = [point.register_forward_hook(lambda module, *_: ran.append(module)) for point in points]
    try:
        lm.activations(model, tokens, mask, ["blocks.1.hook_resid_pre"])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [model.blocks[0].hook_in, model.blocks[0].hook_out, model.blocks[1].hook_in]


@pytest.mark.parametrize("point", ["blocks.0.hook_resid_post", "blocks.0.mlp.hook_out"])
def test_hooks_that_are_set_on_the_model_count(opened, point):
    model = opened("Llama")
    tokens, mask = texts(model)
    plain = lm.activations(model, tokens, mask, HOOKS)
    with model.hooks(fwd_hooks=[(point, lambda tensor, hook: 3 * tensor)]):
        got = lm.activations(model, tokens, mask, HOOKS)
        want = lm.activations(model, tokens, mask, HOOKS, "model")
        assert lm.way_of_reading(model, HOOKS, 17) == ("model" if "mlp" in point else "modules")
    for hook in HOOKS:
        assert off(got[hook], want[hook], mask) < 1e-5
    assert off(got[HOOKS[1]], plain[HOOKS[1]], mask) > 0.1


@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "StableLm", "GPT2"])
def test_what_computes_something_else_is_run_by_itself(opened, name):
    """Windows shorter than the text, capped logits, partial rotary positions, another shape."""
    model = opened(name)
    assert lm.way_of_reading(model, HOOKS[:2], 17) == "model"


def test_other_hook_points_and_padding_on_the_left_are_left_to_the_model(opened, monkeypatch):
    model = opened("Llama")
    tokens, mask = texts(model)
    assert lm.way_of_reading(model, [HOOKS[1], "blocks.1.mlp.hook_out"], 17) == "model"
    want = lm.activations(model, tokens.flip(1), mask.flip(1), HOOKS, "model")
    monkeypatch.setattr(Decoder, "read", lambda *_: pytest.fail("padding on the left"))
    got = lm.activations(model, tokens.flip(1), mask.flip(1), HOOKS)
    for hook in HOOKS:
        assert torch.equal(got[hook], want[hook])


@pytest.mark.usefixtures("attention")
def test_losses_are_those_of_the_models_own_forward_pass(opened, monkeypatch):
    model = opened("Qwen3")
    tokens, mask = texts(model)
    edits = [[], [("blocks.1.hook_resid_post", lambda tensor, hook: 2 * tensor.flip(2))]]
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "of", lambda _: None)
        want = [lm.token_nll(model, tokens, mask, hooks) for hooks in edits]
    lm.way_of_reading(model, HOOKS, 17)  # tried before the model's own forward pass is forbidden
    no_usual_way(model, monkeypatch)
    got = [lm.token_nll(model, tokens, mask, hooks) for hooks in edits]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (want[0] - want[1]).abs().max() > 0.1
