"""One prior for several layers of a language model: collected, trained, and used at each of its hook points."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens import provenance
from glp_lens.activations.stream import open_all
from glp_lens.errors import InputError
from glp_lens.evals import fidelity, probing
from glp_lens.evals.entries import Entry
from glp_lens.evals.probing.tasks import build
from glp_lens.models.glp import GLP
from glp_lens.pipeline import DensityJob, run_suite
from glp_lens.training.config import RunOptions, TrainConfig
from tests.conftest import tiny_texts

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1, 3)]
GOLDEN = Path(__file__).parents[1] / "golden"
SETTINGS = TrainConfig(rows=50 * 20, batch_size=50, lr=1e-3)
TINY = {"d_model": 14, "d_mlp": 22, "n_layers": 2}
TOKENS = torch.tensor([[0, 5, 6, 7, 9], [0, 8, 3, 2, 4]])


@pytest.fixture(scope="module")
def stores(tiny_bridge, tmp_path_factory):
    return gl.collect(tiny_bridge, tiny_texts(60), hooks=HOOKS, out=tmp_path_factory.mktemp("acts") / "acts")


@pytest.fixture(scope="module")
def glp(stores):
    return GLP.fit(stores, SETTINGS, **TINY)


def test_it_learns_how_many_layers_there_are_and_which_it_saw(glp, stores):
    assert glp.denoiser.config.multi_layer_n_layers == 4
    assert glp.layers == [0, 1, 3]
    for hook in HOOKS:
        assert provenance.trained_on(glp.at(hook)) == stores[hook].provenance()
        assert glp.at(hook).max_norm == stores[hook].provenance()["max_norm"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_projects_with_its_own_layer(glp, tiny_model, hook):
    seen = []
    record = (hook, lambda tensor, hook: seen.append(tensor.clone()))
    tiny_model.run_with_hooks(TOKENS, fwd_hooks=[record])
    noise = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    projected = glp.projection_hook(hook, sigma=0.3, noise=lambda texts, positions, width: noise)
    tiny_model.run_with_hooks(TOKENS, fwd_hooks=[projected, record])
    want = glp.project(seen[0][:, -1], sigma=0.3, noise=noise, layer=int(hook.split(".")[1]))
    torch.testing.assert_close(seen[1][:, -1], want)
    assert torch.equal(seen[1][:, :-1], seen[0][:, :-1])


def test_the_language_model_is_checked_at_each_hook_point(glp, tiny_bridge):
    assert glp.projection_hook(HOOKS[2], model=tiny_bridge)[0] == HOOKS[2]
    with pytest.raises(InputError, match="trained on layers 0, 1, 3, got blocks.2.hook_resid_post"):
        glp.projection_hook("blocks.2.hook_resid_post", model=tiny_bridge)
    _, fn = glp.projection_hook(HOOKS[1])
    with pytest.raises(InputError, match=r"trained at blocks\.1\.hook_resid_post, here is blocks\.3"):
        tiny_bridge.run_with_hooks(TOKENS, fwd_hooks=[(HOOKS[2], fn)])


def test_a_view_steers_and_goes_through_suites(glp, tiny_bridge, stores):
    view = glp.at(3)
    steer = gl.hooks.steer(torch.ones(24), 2.0, view, sigma=0.2)
    moved = tiny_bridge.run_with_hooks(TOKENS, fwd_hooks=[(HOOKS[2], steer)])
    assert not torch.allclose(moved, tiny_bridge(TOKENS))
    task = build("t", tiny_texts(40), [0, 1] * 20, range(30), range(30, 40))
    activations = probing.collect(tiny_bridge, [task], HOOKS[2])
    settings = probing.ProbingSettings(resamples=20)
    assert probing.run([Entry("glp", view)], probing.ProbingData([task], activations), settings).failures == []
    here, elsewhere = (
        fidelity.FidelityData(tiny_bridge, hook, tiny_texts(3), stores[HOOKS[2]].stats.mean)
        for hook in (HOOKS[2], HOOKS[1])
    )
    assert fidelity.run([Entry("glp", view)], here).failures == []
    with pytest.raises(InputError, match=r"trained at blocks\.3"):
        fidelity.run([Entry("glp", view)], elsewhere)


def test_the_command_line_takes_the_layer_of_the_store(glp, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glp.save_pretrained("prior")
    pd.DataFrame({"text": tiny_texts(9, seed=5)}).to_csv("texts.csv", index=False)

    def run(line):
        return CliRunner().invoke(app, line.replace("LM", f"--model {tiny_folder}").split())

    for hook in (HOOKS[1], "blocks.2.hook_resid_post"):
        line = f"collect LM --texts texts.csv --out {hook} --hook {hook} --context 24 --lm-dtype float32"
        assert run(line).exit_code == 0
    line = "fidelity LM --models prior --texts texts.csv --documents 3 --context 24 --lm-dtype float32 --out"
    done = run(f"{line} results --store {HOOKS[1]}")
    assert done.exit_code == 0, done.output
    assert "delta_nll" in done.output
    assert f"none of the models was trained on {HOOKS[1]}, whose statistics are the reference" in done.output
    refused = run(f"{line} other --store blocks.2.hook_resid_post")
    assert refused.exit_code != 0
    assert "trained on layers 0, 1, 3" in str(refused.exception) + refused.output


def test_density_refuses_each_store_that_a_prior_of_many_layers_was_trained_on(glp, stores, tmp_path):
    glp.save_pretrained(tmp_path / "prior")
    for hook in HOOKS:
        job = DensityJob(models=(str(tmp_path / "prior"),), store=stores[hook].path, out=tmp_path / "density")
        with pytest.raises(InputError, match="is the store that model 'prior' was trained on"):
            run_suite(job)


def test_it_trains_while_the_layers_are_collected(tiny_bridge, tmp_path):
    gl.collect(tiny_bridge, tiny_texts(60), hooks=HOOKS[:2], out=tmp_path / "s", window=40)
    streams = open_all(tmp_path / "s", patience=5)
    one = GLP.fit(streams, SETTINGS, **TINY, run=RunOptions(state=tmp_path / "state"))
    assert one.layers == [0, 1]
    assert one.at(1).hook == HOOKS[1]
    with pytest.raises(InputError, match="gives no labels"):
        GLP.fit(streams, SETTINGS, **TINY, condition="label")


def test_a_released_prior_of_many_layers_knows_its_hook_points():
    released = GLP.from_pretrained(GOLDEN / "multi_layer")
    assert released.layers == [0, 1, 2, 3, 4]
    assert released.at(3).hook == "blocks.3.hook_resid_post"
    assert released.projection_hook("blocks.2.hook_out")[0] == "blocks.2.hook_out"
    with pytest.raises(InputError, match="allow_mismatch"):
        released.projection_hook("blocks.2.hook_mlp_out")
