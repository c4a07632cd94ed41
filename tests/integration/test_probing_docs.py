"""What docs/probing.md shows: its commands parse, its Python runs."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import glp_lens as gl
from glp_lens.activations import write_store
from glp_lens.errors import InputError
from glp_lens.evals import probing
from glp_lens.evals.entries import Entry
from tests.conftest import tiny_texts

TEXT = (Path(__file__).parents[2] / "docs" / "probing.md").read_text()
HOOK = "blocks.1.hook_resid_post"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


@pytest.fixture(scope="module")
def names(tiny_bridge, tmp_path_factory):
    """What the examples take as given."""
    rows = torch.randn(700, 24, generator=torch.Generator().manual_seed(0))
    store = write_store(tmp_path_factory.mktemp("docs") / "acts", rows, hook=HOOK)
    glp = gl.GLP.fit(store, gl.recipe("fast", rows=256, batch_size=64), d_model=12, d_mlp=20, n_layers=2)
    return {"model": tiny_bridge, "hook": HOOK, "glp": glp, "pca": gl.PCA.fit(store)}


def test_the_example_of_a_run(names, tmp_path, monkeypatch):
    code, changed = re.subn(r'probing\.names\("\*agnews\*"\)', 'probing.names("162_agnews_1")', blocks("python")[0])
    assert changed
    small = probing.build("small", tiny_texts(60), [i % 2 for i in range(60)], range(40), range(40, 60))
    monkeypatch.setattr(probing, "load", lambda name: small)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/probing.md", "exec"), given := dict(names))
    assert set(given["results"].config["entries"]) == {"glp", "pca"}
    assert Path("results/probing/metrics.csv").exists()


def test_the_example_of_another_harness(names):
    from sae_probes import run_sae_evals

    called = []
    harness = SimpleNamespace(
        run_sae_evals=lambda *a, **k: called.append(inspect.signature(run_sae_evals).bind(*a, **k))
    )
    exec(compile(blocks("python")[1], "docs/probing.md", "exec"), {**names, "sae_probes": harness})
    (call,) = called
    assert (call.arguments["model_name"], call.arguments["hook_name"]) == ("gpt2", HOOK)
    assert call.arguments["sae"].encode(torch.zeros(3, 24)).shape == (3, 40)


@pytest.mark.filterwarnings(r"ignore:\s*This SAE has non-empty")
def test_the_example_of_a_published_autoencoder(open_layernorm, monkeypatch):
    import sae_lens
    import transformer_lens

    own = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=24, d_sae=29))
    asked = {"center_writing_weights": True}
    vars(own.cfg.metadata).update(hook_name=HOOK, model_name="gpt2-small", model_from_pretrained_kwargs=asked)
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *_, **__: own)
    tasks = [probing.build("small", tiny_texts(60), [i % 2 for i in range(60)], range(40), range(40, 60))]

    def run(open_it):
        loader = SimpleNamespace(from_pretrained_no_processing=open_it)
        monkeypatch.setattr(transformer_lens, "HookedTransformer", loader)
        given = {"gl": gl, "probing": probing, "Entry": Entry, "tasks": tasks}
        exec(compile(blocks("python")[2].replace(', cache="cache"', ""), "docs/probing.md", "exec"), given)
        return given["results"]

    assert set(run(open_layernorm).config["entries"]) == {"sae"}
    with pytest.raises(InputError, match=r"with centred weights \(here raw\)"):
        run(lambda name, **_: open_layernorm(name))
