"""Generation by the modules of the weights alone: same texts as forward passes, every hook runs, else the usual way."""

from dataclasses import replace
from weakref import WeakKeyDictionary

import pytest
import torch

from glp_lens import hooks, lm
from glp_lens.errors import InputError
from glp_lens.lm import generating, trial
from glp_lens.lm.decoder import Decoder
from tests import architectures

NEW = 6


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens a tiny model of an architecture."""
    models = {}

    def of(name, **options):
        if (name, *options.items()) not in models:
            folder = architectures.make(name, tmp_path_factory.mktemp("models") / "model")
            models[name, *options.items()] = lm.open_model(str(folder), check=False, **{"dtype": "float32", **options})
        return models[name, *options.items()]

    return of


@pytest.fixture
def no_usual_way(monkeypatch):
    """Makes the model's own `generate` fail, once its cache has been tried."""

    def forbid(model, prompts):
        lm.generate(model, prompts[:1], 1)
        monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("the model's own generate was called"))

    return forbid


def prompts():
    """Seven prompts, four of them different, so that neither number is another's."""
    distinct = torch.tensor([[0, 5, 9, 11, 4], [0, 7, 3, 8, 21], [0, 2, 2, 2, 2], [0, 5, 9, 11, 13]])
    return distinct[[0, 1, 0, 2, 3, 1, 1]]


def push(model, size=3.0, seed=0, positions="last"):
    """A hook that moves each row its own way, as steering at several strengths does."""
    direction = size * torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return hooks.steer(direction, torch.linspace(-1, 1, 7), positions=positions)


def by_whole_texts(model, fwd_hooks, tokens):
    """Likeliest tokens, each found from a forward pass over the whole text."""
    with torch.no_grad(), model.hooks(fwd_hooks=fwd_hooks):
        for _ in range(NEW):
            logits = model(tokens, return_type="logits")[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


def places(model):
    """Hooks that change nothing, the last position, all of them, and several layers."""
    return [
        [],
        [("blocks.1.hook_resid_post", push(model))],
        [("blocks.0.hook_resid_pre", push(model, positions="all"))],
        [("blocks.0.hook_resid_post", push(model)), ("blocks.2.hook_out", push(model, seed=1, positions="all"))],
    ]


@pytest.mark.parametrize("name", ["Llama", "Llama with biases", "Qwen2", "Qwen3", "Gemma"])
def test_texts_are_those_of_forward_passes_over_whole_texts(opened, no_usual_way, name):
    model = opened(name)
    no_usual_way(model, prompts())
    for here, there in zip(places(model), places(model), strict=True):
        assert torch.equal(lm.generate(model, prompts(), NEW, hooks=here), by_whole_texts(model, there, prompts()))


def test_one_row_and_one_token_and_bfloat16(opened, no_usual_way):
    for dtype in ("float32", "bfloat16"):
        model = opened("Llama", dtype=dtype)
        no_usual_way(model, prompts())
        for tokens in (prompts()[:1], prompts()[:3, :1]):
            assert torch.equal(lm.generate(model, tokens, NEW), by_whole_texts(model, [], tokens))


def test_sampled_texts_are_those_of_the_models_own_generate(opened, monkeypatch):
    model = opened("Llama")
    options = {"temperature": 0.8, "seed": 5, "hooks": [("blocks.1.hook_resid_post", push(model))]}
    fast = lm.generate(model, prompts(), NEW, **options)
    assert torch.equal(fast, lm.generate(model, prompts(), NEW, **options))
    monkeypatch.setattr(Decoder, "of", lambda _: None)
    assert torch.equal(fast, lm.generate(model, prompts(), NEW, **options))


def test_a_hook_that_writes_into_its_tensor_counts(opened, no_usual_way):
    model = opened("Llama")
    no_usual_way(model, prompts())

    def write(x, *, hook):
        x[2, 1] = 4 * x[2, 1].flip(0)  # only row 2, though row 0 has the same prompt, and not the last position

    def written(x, *, hook):
        x = x.clone()
        x[2, 1] = 4 * x[2, 1].flip(0)
        return x

    def once(function):
        return lambda x, *, hook: function(x, hook=hook) if x.shape[1] > 1 else x

    point = "blocks.1.hook_resid_post"
    text = lm.generate(model, prompts(), NEW, hooks=[(point, once(write))])
    assert torch.equal(text, by_whole_texts(model, [(point, written)], prompts()))
    assert not torch.equal(text, lm.generate(model, prompts(), NEW))


def test_hooks_anywhere_else_run_too(opened):
    model = opened("Llama")
    plain = lm.generate(model, prompts(), NEW)
    calls = []

    def double(x, *, hook):
        calls.append(hook.name)
        return 2 * x

    def tripled(_module, _inputs, output):
        calls.append("torch")
        return 3 * output

    point = [("blocks.1.mlp.hook_out", double)]
    text = lm.generate(model, prompts(), NEW, hooks=point)
    with model.hooks(fwd_hooks=point):  # set by the user beforehand
        assert torch.equal(lm.generate(model, prompts(), NEW), text)
        assert torch.equal(by_whole_texts(model, [], prompts()), text)
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", double)]):
        text = lm.generate(model, prompts(), NEW)
        assert torch.equal(text, by_whole_texts(model, [], prompts()))
    assert not torch.equal(text, plain)
    assert set(calls) == {"blocks.1.mlp.hook_out", "blocks.1.hook_out"}
    handle = model.blocks[0].attn.q.original_component.register_forward_hook(tripled)
    text = lm.generate(model, prompts(), NEW)
    assert "torch" in calls
    assert torch.equal(text, by_whole_texts(model, [], prompts()))
    handle.remove()
    assert torch.equal(lm.generate(model, prompts(), NEW), plain)


def test_weights_changed_in_place_count_at_once(opened):
    model = opened("Qwen2")
    before = lm.generate(model, prompts(), NEW)
    weight = model.blocks[1].mlp.out.original_component.weight
    kept = weight.data.clone()
    weight.data.mul_(-3)
    after = lm.generate(model, prompts(), NEW)
    want = by_whole_texts(model, [], prompts())
    weight.data.copy_(kept)
    assert torch.equal(after, want)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", ["Granite", "Mistral", "Gemma3", "StableLm", "GPT2"])
def test_what_computes_something_else_goes_the_usual_way(opened, name, monkeypatch):
    """Scaled residuals, windows shorter than the text, partial rotary positions, another shape."""
    model = opened(name)
    monkeypatch.setattr(Decoder, "generate", lambda *_: pytest.fail("not this model"))
    if name in ("Granite", "StableLm"):  # of the usual shape, so that it is tried
        monkeypatch.undo()
    hook = [("blocks.1.hook_resid_post", push(model))]
    again = [("blocks.1.hook_resid_post", push(model))]
    assert torch.equal(lm.generate(model, prompts(), NEW, hooks=hook), by_whole_texts(model, again, prompts()))


def test_local_and_global_layers_within_the_window(opened, no_usual_way, monkeypatch):
    settings = {**architectures.ARCHITECTURES["Gemma3"].settings, "sliding_window": 40}
    wider = replace(architectures.ARCHITECTURES["Gemma3"], settings=settings)
    monkeypatch.setitem(architectures.ARCHITECTURES, "Gemma3", wider)
    model = opened("Gemma3", backend="bridge")
    no_usual_way(model, prompts())
    hook, again = ([("blocks.1.hook_resid_post", push(model))] for _ in range(2))
    assert torch.equal(lm.generate(model, prompts(), NEW, hooks=hook), by_whole_texts(model, again, prompts()))


def test_modules_that_do_not_fit_together_go_the_usual_way(opened, monkeypatch):
    model = opened("Qwen2")
    want = lm.generate(model, prompts(), NEW)
    monkeypatch.setattr(trial, "_known", WeakKeyDictionary())
    monkeypatch.setattr(Decoder, "generate", lambda *_: torch.ones(2).unsqueeze(5))  # IndexError
    assert torch.equal(lm.generate(model, prompts(), NEW), want)


@pytest.mark.parametrize("way", ["modules", "cached", "whole"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_no_token_is_sampled_from_what_is_not_finite(opened, monkeypatch, way, value):
    model = opened("Qwen2")
    if way != "modules":
        monkeypatch.setattr(generating, "usable_decoder", lambda *_: None)
    if way == "whole":
        monkeypatch.setattr(generating, "caches_keys_and_values", lambda *_: False)
    hook = ("blocks.1.hook_resid_post", lambda tensor, hook: torch.full_like(tensor, value))
    with pytest.raises(InputError, match="not finite, .*a smaller strength, or open the model in float32"):
        lm.generate(model, prompts(), NEW, temperature=1.0, hooks=[hook])
