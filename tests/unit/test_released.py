"""The format of the released GLPs, written: what comes back is what was there, and what does not fit is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from glp_lens.errors import InputError
from glp_lens.models import load
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.glp import GLP

GOLDEN = Path(__file__).parents[1] / "golden"
STORE = {"model": {"name": "owner/lm (revision 1a)", "weight_processing": "raw"}, "max_norm": 31.5}


def prior(store=None, **shape):
    """A small prior with random weights, trained on `store`."""
    config = DenoiserConfig(5, 8, 11, 2, **shape)
    g = torch.Generator().manual_seed(3)
    denoiser = Denoiser(config)
    for p in denoiser.parameters():
        p.data = torch.randn(p.shape, generator=g) / 3
    size = (5,) if config.multi_layer_n_layers is None else (config.multi_layer_n_layers, 5)
    mean, var = torch.randn(size, generator=g), torch.rand(size, generator=g) + 0.1
    return GLP(denoiser, mean, var, {"store": STORE | (store or {"hook": "blocks.2.hook_resid_post"})})


def kwargs(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["glp_kwargs"]


@pytest.mark.parametrize("name", ["single_layer", "multi_layer"])
def test_a_released_folder_is_written_as_it_was(name, tmp_path):
    GLP.from_pretrained(GOLDEN / name).save_released(tmp_path)
    got, want = load_file(tmp_path / "final.safetensors"), load_file(GOLDEN / name / "final.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)
    got, want = (torch.load(folder / "rep_statistics.pt", weights_only=True) for folder in (tmp_path, GOLDEN / name))
    assert list(got) == list(want) == ["mean", "var"]
    assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)
    assert kwargs(tmp_path) == kwargs(GOLDEN / name)
    got, want = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (tmp_path, GOLDEN / name))
    assert got["model_name"] == want["model_name"]


def test_the_config_is_filled_in_as_the_released_code_does(tmp_path):
    """It puts the folder's path at the top, fills in what points there, and takes all of glp_kwargs as arguments."""
    prior().save_released(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert "rep_statistic" in config
    assert config["glp_kwargs"].keys() <= {"normalizer_config", "denoiser_config", "tracedict_config"}
    assert config["glp_kwargs"]["normalizer_config"] == {"rep_statistic": "${rep_statistic}"}
    shape = {"d_input": 5, "d_model": 8, "d_mlp": 11, "n_layers": 2, "multi_layer_n_layers": None}
    assert config["glp_kwargs"]["denoiser_config"] == shape
    assert (tmp_path / "config.yaml").read_text().count("${") == 1


@pytest.mark.parametrize(
    ("store", "trace"),
    [
        ({"hook": "blocks.2.hook_resid_post"}, ("model.layers", [2], "output")),
        ({"hook": "blocks.2.hook_out"}, ("model.layers", [2], "output")),
        ({"hook": "blocks.0.hook_resid_pre"}, ("model.layers", [0], "input")),
        (
            {"hooks": {"blocks.1.hook_resid_post": {}, "blocks.3.hook_resid_post": {}}},
            ("model.layers", [1, 3], "output"),
        ),
    ],
)
def test_hook_points_are_modules_there(store, trace, tmp_path):
    prior(store).save_released(tmp_path)
    assert tuple(kwargs(tmp_path)["tracedict_config"].values()) == trace
    assert kwargs(tmp_path)["tracedict_config"].keys() == {"layer_prefix", "layers", "retain"}


def test_blocks_of_another_architecture(tmp_path):
    kept = prior().save_released(tmp_path, layer_prefix="transformer.h")
    assert kwargs(kept)["tracedict_config"]["layer_prefix"] == "transformer.h"


@pytest.mark.parametrize("shape", [{}, {"multi_layer_n_layers": 4}], ids=["single", "multi"])
def test_a_prior_comes_back_whole(shape, tmp_path):
    hooks = {"hooks": {"blocks.1.hook_resid_post": {"rows": 9}, "blocks.3.hook_resid_post": {"rows": 9}}}
    glp = prior(hooks if shape else None, **shape)
    glp.provenance["training"] = {"rows_seen": 40}
    glp.save_released(tmp_path / "glp")
    x, layer = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)), 3 if shape else None
    for again in (GLP.from_pretrained(tmp_path / "glp"), load(tmp_path / "glp")):
        assert torch.equal(again.project(x, u=0.5, layer=layer), glp.project(x, u=0.5, layer=layer))
        assert torch.equal(again.mean, glp.mean)
        assert torch.equal(again.var, glp.var)
        assert again.provenance == glp.provenance
        assert again.max_norm == 31.5


def test_intermediate_checkpoints_stand_beside_the_final_one(tmp_path):
    glp, early = prior(), prior()
    with torch.no_grad():
        early.denoiser.in_proj.weight.mul_(0.5)
    early.save_released(tmp_path, "epoch_0012")
    with pytest.raises(InputError, match="'final' is not in .*: there are epoch_0012"):
        GLP.from_pretrained(tmp_path)
    glp.save_released(tmp_path)
    assert (tmp_path / "checkpoints" / "epoch_0012.safetensors").is_file()
    for name, want in {"epoch_0012": early, "checkpoints/epoch_0012": early, "final": glp}.items():
        got = GLP.from_pretrained(tmp_path, checkpoint=name)
        assert torch.equal(got.denoiser.in_proj.weight, want.denoiser.in_proj.weight)


def test_intermediate_checkpoints_of_the_own_format_are_folders(tmp_path):
    glp, early = prior(), prior()
    with torch.no_grad():
        early.denoiser.in_proj.weight.mul_(0.5)
    early.save_pretrained(tmp_path / "checkpoints" / "step_00000512")
    with pytest.raises(InputError, match="'final' not found in .*: there are step_00000512"):
        GLP.from_pretrained(tmp_path)
    glp.save_pretrained(tmp_path)
    for name, want in {"step_00000512": early, "final": glp}.items():
        got = GLP.from_pretrained(tmp_path, checkpoint=name)
        assert torch.equal(got.denoiser.in_proj.weight, want.denoiser.in_proj.weight)
    with pytest.raises(InputError, match="'step_1' not found in .*: there are step_00000512"):
        GLP.from_pretrained(tmp_path, checkpoint="step_1")


@pytest.mark.parametrize(
    "name", ["../final", "checkpoints/../x", "checkpoints/checkpoints/x", "/tmp/x", "..", "a.b", ""]
)
def test_a_checkpoint_name_cannot_leave_the_folder(name, tmp_path):
    with pytest.raises(InputError, match="must be a plain name"):
        prior().save_released(tmp_path / "glp", name)
    with pytest.raises(InputError, match="must be a plain name"):
        GLP.from_pretrained(GOLDEN / "single_layer", checkpoint=name)
    assert not (tmp_path / "glp").exists()


@pytest.mark.parametrize(
    ("glp", "words"),
    [
        (lambda: prior(d_condition=3), "no place for a prior conditioned on a vector"),
        (lambda: prior({"hook": "blocks.2.attn.hook_z"}), "inputs or the outputs of whole blocks.* got blocks.2.attn"),
        (lambda: prior({"hook": "blocks.2.hook_mlp_out"}), "inputs or the outputs of whole blocks"),
        (
            lambda: prior({"hooks": {"blocks.2.hook_resid_pre": {}, "blocks.3.hook_resid_post": {}}}),
            "inputs or the outputs of whole blocks",
        ),
        (lambda: prior({"model": {"weight_processing": "folded+centred"}}), "raw weights, .* folded\\+centred"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(glp, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        glp().save_released(tmp_path / "glp")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "glp").exists()


def test_the_two_formats_are_kept_apart(tmp_path):
    """Two models in one folder, of which one is read, would be a trap."""
    glp = prior()
    glp.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="choose another folder"):
        glp.save_released(tmp_path)


def test_a_dimension_without_variance_stays_where_it_is(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    statistics = torch.load(tmp_path / "glp" / "rep_statistics.pt", weights_only=True)
    statistics["var"][3] = 0.0
    torch.save(statistics, tmp_path / "glp" / "rep_statistics.pt")
    glp = GLP.from_pretrained(tmp_path / "glp")
    x = load_file(GOLDEN / "single_layer" / "expected.safetensors")["activations"]
    x[:, 3] = statistics["mean"][3]
    assert torch.equal(glp.normalize(x)[:, 3], torch.zeros(len(x)))
    assert torch.equal(glp.denormalize(glp.normalize(x))[:, 3], x[:, 3])
    for found in (glp.project(x, u=0.5), glp.sample(4), glp.encode(x), glp.score(x)):
        assert found.isfinite().all()


def test_negative_variances_are_refused(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    torch.save({"mean": torch.zeros(24), "var": -torch.ones(24)}, tmp_path / "glp" / "rep_statistics.pt")
    with pytest.raises(InputError, match="variances of at least 0"):
        GLP.from_pretrained(tmp_path / "glp")


def test_a_folder_holds_checkpoints_of_one_prior(tmp_path):
    """They share the file of the normaliser: another prior's would change what the first one means."""
    first, other = prior(), prior()
    other.mean = other.mean + 1
    first.save_released(tmp_path)
    with pytest.raises(InputError, match=r"holds final.safetensors of a prior of other data: choose another folder"):
        other.save_released(tmp_path, "epoch_0012")
    assert torch.equal(GLP.from_pretrained(tmp_path).mean, first.mean)
    other.save_released(tmp_path)  # nothing is left of the first
    assert torch.equal(GLP.from_pretrained(tmp_path).mean, other.mean)


@pytest.mark.parametrize("part", ["mean", "var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(part, value, tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    statistics = torch.load(tmp_path / "glp" / "rep_statistics.pt", weights_only=True)
    statistics[part][3] = value
    torch.save(statistics, tmp_path / "glp" / "rep_statistics.pt")
    with pytest.raises(InputError, match="expected finite means"):
        GLP.from_pretrained(tmp_path / "glp")


@pytest.mark.parametrize(
    "damage", [b"", b"\x80", b"\xce\xff no text", b"PK\x03\x04", b"hello\n", b"\x80\x02}q\x00\xff."]
)
def test_damaged_statistics_are_told_in_one_line(damage, tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    whole = (tmp_path / "glp" / "rep_statistics.pt").read_bytes()
    for data in (damage, b"\xce\xff" + damage + whole[64:]):
        (tmp_path / "glp" / "rep_statistics.pt").write_bytes(data)
        with pytest.raises(InputError, match=r"rep_statistics\.pt") as caught:
            GLP.from_pretrained(tmp_path / "glp")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("provenance", [3, ["store"], {"store": "mine"}, {"training": [1]}])
def test_provenance_of_another_form_is_refused(provenance, tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    config = yaml.safe_load((tmp_path / "glp" / "config.yaml").read_text())
    config["glp_lens"] = {"provenance": provenance}
    (tmp_path / "glp" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="expected objects as provenance"):
        GLP.from_pretrained(tmp_path / "glp")


def test_hook_points_that_are_both_ends_are_not_known(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    config = yaml.safe_load((tmp_path / "glp" / "config.yaml").read_text())
    config["glp_kwargs"]["tracedict_config"]["retain"] = ["input", "output"]
    (tmp_path / "glp" / "config.yaml").write_text(yaml.safe_dump(config))
    assert GLP.from_pretrained(tmp_path / "glp").hook is None


def test_statistics_are_read_as_the_released_code_saves_them(tmp_path):
    """As buffers of a module, with a leading axis of one."""
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    plain = torch.load(tmp_path / "glp" / "rep_statistics.pt", weights_only=True)
    buffers = {name: torch.nn.Buffer(value[None]) for name, value in plain.items()}
    torch.save(buffers, tmp_path / "glp" / "rep_statistics.pt")
    glp = GLP.from_pretrained(tmp_path / "glp")
    assert torch.equal(glp.mean, plain["mean"])
    assert torch.equal(glp.var, plain["var"])


def test_a_checkpoint_saved_by_steps_is_found_beside_the_final_one(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    weights = load_file(tmp_path / "glp" / "final.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, tmp_path / "glp" / "step_7812.safetensors")
    got = GLP.from_pretrained(tmp_path / "glp", checkpoint="step_7812")
    assert torch.equal(got.denoiser.out_proj.bias, 2 * weights["model.out_proj.bias"])
