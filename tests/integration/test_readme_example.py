"""The library as the README shows it: a user's own model object and texts, and hooks in `generate`."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import glp_lens as gl
from tests.conftest import tiny_texts

README = Path(__file__).parents[2] / "README.md"
LIBRARY = README.parent / "docs" / "library.md"
HOOK = "blocks.1.hook_resid_post"
PROMPT = "the old man looked at the sea and"


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def own(request, tiny_folder, tmp_path_factory):
    """A model object, its store and its prior."""
    model = gl.open_model(str(tiny_folder), backend=request.param, dtype="float32")
    store = gl.collect(model, tiny_texts(300), hooks=[HOOK], out=tmp_path_factory.mktemp("own") / "acts")
    recipe = gl.recipe("fast", rows=4096, batch_size=64)
    return SimpleNamespace(model=model, store=store, glp=gl.GLP.fit(store, recipe, n_layers=2), backend=request.param)


def generate(model, *hooks):
    with torch.inference_mode(), model.hooks(fwd_hooks=list(hooks)):
        return model.generate(
            model.to_tokens(PROMPT), max_new_tokens=12, do_sample=False, stop_at_eos=False, return_type="tokens",
            verbose=False,
        )  # fmt: skip


def logits(model, *hooks):
    with torch.inference_mode():
        return model.run_with_hooks(model.to_tokens(PROMPT), fwd_hooks=list(hooks))


def steer(own, strength, **options):
    """A random direction, of the norm a typical activation has."""
    w = torch.randn(own.store.d_in, generator=torch.Generator().manual_seed(2))
    return HOOK, gl.hooks.steer(own.store.median_norm * w / w.norm(), strength, **options)


def test_the_store_is_of_the_model_and_hook_asked_for(own):
    assert (own.store.hook, own.store.d_in) == (HOOK, 24)
    assert own.store.provenance()["model"]["class"] == type(own.model).__name__
    assert own.glp.projection_hook()[0] == HOOK


def test_projection_in_generate_changes_the_text_and_repeats(own):
    projected = generate(own.model, own.glp.projection_hook(sigma=0.9))
    assert projected.shape == generate(own.model).shape
    assert not torch.equal(projected, generate(own.model))
    assert torch.equal(projected, generate(own.model, own.glp.projection_hook(sigma=0.9)))


def test_steering_with_and_without_repair(own):
    plain, steered = generate(own.model), generate(own.model, steer(own, 3.0))
    repaired = generate(own.model, steer(own, 3.0, projector=own.glp, sigma=0.9))
    assert not torch.equal(steered, plain)
    assert not torch.equal(repaired, steered)


def test_no_noise_and_no_strength_are_the_identity(own):
    for name, fn in (own.glp.projection_hook(sigma=0), steer(own, 0.0), steer(own, 0.0, projector=own.glp)):
        assert torch.equal(logits(own.model, (name, fn)), logits(own.model))
        assert torch.equal(generate(own.model, (name, fn)), generate(own.model))
    unrepaired = steer(own, 1.5, projector=own.glp, sigma=0)
    torch.testing.assert_close(logits(own.model, unrepaired), logits(own.model, steer(own, 1.5)))


@pytest.mark.parametrize("positions", ["last", "all"])
def test_only_the_positions_asked_for_are_edited(own, positions):
    tokens = own.model.to_tokens(PROMPT)
    clean, edited = [], []

    def keep(seen):
        return HOOK, lambda tensor, *, hook=None: seen.append(tensor.clone()) or tensor

    with torch.inference_mode():
        own.model.run_with_hooks(tokens, fwd_hooks=[keep(clean)])
        hook = own.glp.projection_hook(positions=positions, sigma=0.5)
        own.model.run_with_hooks(tokens, fwd_hooks=[hook, keep(edited)])
    changed = (clean[0] != edited[0]).any(-1)[0].tolist()
    n = tokens.shape[1]
    assert changed == ([False] * (n - 1) + [True] if positions == "last" else [False] + [True] * (n - 1))


def test_a_model_in_bfloat16_keeps_its_dtype(own, tiny_folder):
    model = gl.open_model(str(tiny_folder), backend=own.backend, dtype="bfloat16")
    seen = []
    watch = (HOOK, lambda tensor, *, hook=None: seen.append(tensor.dtype) or tensor)
    hooks = [own.glp.projection_hook(sigma=0.5), steer(own, 1.0, projector=own.glp, sigma=0.5), watch]
    assert generate(model, *hooks).shape == generate(model).shape
    assert set(seen) == {torch.bfloat16}
    assert logits(model, *hooks).isfinite().all()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", [README, LIBRARY], ids=["readme", "library"])
def test_the_example_of_the_page_runs(own, page, tmp_path, monkeypatch, capsys):
    """As it stands there, but for the language model, the texts and the sizes."""
    code = next(block for block in python_blocks(page) if "gl.collect" in block)
    ours = {
        r"^from transformer_lens.*$": "",
        r"^model = .*$": "",
        r"^texts = .*$": "",
        r"gl\.corpus\.packaged\(\)": "texts",
        r"blocks\.\d+\.": "blocks.1.",
        r"(?<==)[\d_]{5,}": "256",
        r"\[:200\]": "[:9]",
    }
    for pattern, new in ours.items():
        code = re.sub(pattern, new, code, flags=re.M)
    assert "blocks.1." in code
    assert "=256" in code
    monkeypatch.chdir(tmp_path)
    sides = {"kind_texts": tiny_texts(9, seed=1), "unkind_texts": tiny_texts(9, seed=2)}
    names = {"model": own.model, "texts": tiny_texts(60), **sides}
    exec(compile(code, str(page), "exec"), names)
    assert (names["store"].hook, names["glp"].d_in) == (HOOK, 24)
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_the_readme_shows_what_its_example_prints():
    """One line of output for each text that the example prints: steered, and steered and repaired."""
    output = re.search(r"```text\n(.*?)```", README.read_text(), re.S).group(1)
    prompt = re.search(r'generate\("(.*?)"', python_blocks(README)[0]).group(1)
    assert output.count(prompt) == 2
