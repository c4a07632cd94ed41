"""The format of the released GLPs, written: what comes back is what was there, and what does not fit is refused."""

import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from glp_lens.errors import InputError
from glp_lens.models import load
from glp_lens.models.denoiser import Denoiser, DenoiserConfig
from glp_lens.models.glp import GLP
from glp_lens.models.normalizer import Normalizer

GOLDEN = Path(__file__).parents[1] / "golden"
MODEL = {"name": "owner/lm (revision 1a)", "weight_processing": "raw", "blocks": "model.layers"}
STORE = {"model": MODEL, "max_norm": 31.5}


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


def blocks_of(folder):
    return kwargs(folder)["tracedict_config"]["layer_prefix"]


@pytest.mark.parametrize("blocks", ["transformer.h", "gpt_neox.layers", "model.decoder.layers", "backbone.layers"])
def test_blocks_are_called_as_the_store_says(blocks, tmp_path):
    store = {"model": MODEL | {"blocks": blocks}, "hook": "blocks.2.hook_resid_post"}
    prior(store).save_released(tmp_path / "a")
    assert blocks_of(tmp_path / "a") == blocks
    GLP.from_pretrained(tmp_path / "a").save_released(tmp_path / "b")  # and go on being called so
    assert blocks_of(tmp_path / "b") == blocks
    prior(store).save_released(tmp_path / "c", layer_prefix="other.h")
    assert blocks_of(tmp_path / "c") == "other.h"


@pytest.mark.parametrize(
    ("prefix", "layers", "blocks"),
    [
        ("transformer.h", [7], "transformer.h"),
        (None, ["gpt_neox.layers.3", "gpt_neox.layers.5"], "gpt_neox.layers"),
        (None, ["a.h.3", "b.h.5"], None),
        ("", [7], None),
    ],
)
def test_a_released_prior_says_what_its_blocks_are_called(prefix, layers, blocks, tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    config = yaml.safe_load((tmp_path / "glp" / "config.yaml").read_text())
    config["glp_kwargs"]["tracedict_config"] = {"layer_prefix": prefix, "layers": layers, "retain": "output"}
    (tmp_path / "glp" / "config.yaml").write_text(yaml.safe_dump(config))
    glp = GLP.from_pretrained(tmp_path / "glp")
    assert glp.provenance["store"]["model"].get("blocks") == blocks
    if blocks and len(layers) == 1:
        assert blocks_of(glp.save_released(tmp_path / "again")) == blocks


def test_where_blocks_are_called_is_not_known_a_warning_says_so(tmp_path):
    old = {"model": {"name": "gpt2", "weight_processing": "raw"}, "hook": "blocks.2.hook_resid_post"}
    with pytest.warns(UserWarning, match="'model.layers' is written; pass layer_prefix") as told:
        prior(old).save_released(tmp_path / "a")
    assert len(told) == 1
    assert blocks_of(tmp_path / "a") == "model.layers"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior(old).save_released(tmp_path / "b", layer_prefix="transformer.h")
        prior().save_released(tmp_path / "c")
    for strange in ("", "model..layers", "model.layers.", "${x}", "a b"):
        with pytest.raises(InputError, match="layer_prefix must be the name of a module"):
            prior().save_released(tmp_path / "d", layer_prefix=strange)
    assert not (tmp_path / "d").exists()


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
        (lambda: prior(multi_layer_n_layers=1), "gives NaN for a prior of one layer"),
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


def test_the_two_formats_are_kept_apart_in_intermediate_checkpoints(tmp_path):
    """The own format is looked for first: weights beside it would never be read."""
    prior().save_pretrained(tmp_path / "checkpoints" / "step_00000512")
    with pytest.raises(InputError, match="own format: choose another folder"):
        prior().save_released(tmp_path, "step_00000512")


def test_a_checkpoint_is_written_where_it_is_read(tmp_path):
    """The released training script saves those named by steps beside the final one."""
    glp, other = prior(), prior()
    with torch.no_grad():
        other.denoiser.in_proj.weight.mul_(0.5)
    glp.save_released(tmp_path)
    shutil.copy(tmp_path / "final.safetensors", tmp_path / "step_7812.safetensors")
    other.save_released(tmp_path, "step_7812")
    got = GLP.from_pretrained(tmp_path, checkpoint="step_7812")
    assert torch.equal(got.denoiser.in_proj.weight, other.denoiser.in_proj.weight)


def released_place(name, checkpoint):
    """Where the released `load_glp` reads from a folder: it goes to the Hub unless it sees an entry of that name."""
    if not os.path.exists(f"{name}/{checkpoint}"):
        return None
    return [f"{name}/{file}" for file in ("config.yaml", "rep_statistics.pt", f"{checkpoint}.safetensors")]


@pytest.mark.parametrize("checkpoint", ["final", "checkpoints/epoch_0012"])
@pytest.mark.parametrize("name", ["glp", "owner/glp"])
def test_the_released_code_opens_a_folder_of_ours_without_the_hub(name, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    glp = prior()
    glp.save_released(name, checkpoint)
    assert all(Path(file).is_file() for file in released_place(name, checkpoint))
    glp.save_released(name, checkpoint)  # once more, over it
    assert torch.equal(GLP.from_pretrained(name, checkpoint).mean, glp.mean)
    with pytest.raises(InputError, match="is not in .*: there are"):
        GLP.from_pretrained(name, checkpoint="epoch_0099")


def test_an_entry_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "final").mkdir()
    prior().save_released(tmp_path)
    assert released_place(tmp_path, "final")
    assert list((tmp_path / "final").iterdir()) == []


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "a ${x} b", r"\${x}", "${", "${}", "$", r"\u0024", "caf\u00e9 \u2028 \ud800"]
)
def test_texts_that_the_released_code_would_fill_in_come_back(text, tmp_path):
    """It fills in `${...}` everywhere, and stops at one that it cannot read, escaped or not: none may be there."""
    glp = prior({"model": MODEL | {"name": text}, "hook": "blocks.2.hook_resid_post", "corpus": {text: [text]}})
    glp.save_released(tmp_path)
    config = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"\$\{.*", config) == ["${rep_statistic}"]
    assert GLP.from_pretrained(tmp_path).provenance == glp.provenance


def test_provenance_written_as_a_mapping_is_still_read(tmp_path):
    glp = prior()
    glp.save_released(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["glp_lens"] = {"provenance": glp.provenance}  # as earlier versions wrote it
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match="read unchecked"):
        assert GLP.from_pretrained(tmp_path).provenance == glp.provenance


class Trap:
    """Whether anything was made of a tag."""

    sprung = False

    def __init__(self, *arguments, **named):
        Trap.sprung = True


def trap(*arguments, **named):
    Trap.sprung = True


TAGS = [
    "output_path: !!python/object/apply:pathlib.PosixPath\n- runs\n- glp\n",  # as the released script writes it
    "output_path: !!python/object/apply:pathlib._local.PosixPath [runs, glp]\n",  # Python 3.13
    f"a: !!python/object/apply:{__name__}.trap [1]\nb: !!python/object/new:{__name__}.Trap {{args: [1]}}\n",
    f"a: !!python/name:{__name__}.Trap\nb: !!python/module:os\nc: !!python/object:{__name__}.Trap {{x: 1}}\n",
    "a: !!python/object/apply:os.system ['exit 3']\nb: !own {k: !other [1, !third x]}\n",
    "train_dataset: !!python/tuple [a, b]\n",
]


@pytest.mark.parametrize("extra", TAGS)
def test_tags_are_passed_over_and_nothing_is_made_of_them(extra, tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    config = (tmp_path / "glp" / "config.yaml").read_text()
    (tmp_path / "glp" / "config.yaml").write_text(extra + config)
    got, want = GLP.from_pretrained(tmp_path / "glp"), GLP.from_pretrained(GOLDEN / "single_layer")
    assert got.fingerprint() == want.fingerprint()
    assert not Trap.sprung


def test_a_tagged_value_is_the_plain_one(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    config = (tmp_path / "glp" / "config.yaml").read_text()
    config = config.replace("d_mlp: 96", "d_mlp: !!int 96").replace("layers: [7]", "layers: !!python/tuple [7]")
    config = config.replace("model_name: example/llm", "model_name: !!python/object/apply:pathlib.PosixPath [a, llm]")
    (tmp_path / "glp" / "config.yaml").write_text(config)
    glp = GLP.from_pretrained(tmp_path / "glp")
    assert glp.hook == "blocks.7.hook_resid_post"
    assert glp.provenance["store"]["model"]["name"] is None


@pytest.mark.parametrize(
    "text",
    ["a: !!timestamp x", "a: !!int ''", "a: !!bool x", "? !!python/tuple [a]\n: 1", "a: " + "[" * 5000, "a: &a [*a]"],
)
def test_yaml_that_cannot_be_read_is_one_line(text, tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    (tmp_path / "glp" / "config.yaml").write_text(text)
    with pytest.raises(InputError, match="config of a released GLP") as caught:
        GLP.from_pretrained(tmp_path / "glp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "name"), [("normalizer_config", "normalization_method"), ("denoiser_config", "d_condition")]
)
def test_settings_that_the_released_code_does_not_know_are_refused(part, name, tmp_path):
    """Another way to normalise, as forks have, would be read as the released one."""
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    config = yaml.safe_load((tmp_path / "glp" / "config.yaml").read_text())
    config["glp_kwargs"][part][name] = "log_norm"
    (tmp_path / "glp" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=f"sets '{name}', which the released code does not know"):
        GLP.from_pretrained(tmp_path / "glp")


def test_a_released_prior_of_one_conditioned_layer_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    config = (tmp_path / "glp" / "config.yaml").read_text()
    (tmp_path / "glp" / "config.yaml").write_text(config.replace("n_layers: null", "n_layers: 1"))
    with pytest.raises(InputError, match="for which the released code gives NaN"):
        GLP.from_pretrained(tmp_path / "glp")


@pytest.mark.parametrize("shape", [{}, {"multi_layer_n_layers": 4}], ids=["single", "multi"])
def test_what_nothing_varied_in_can_be_divided_by(shape, tmp_path):
    """The released code divides by the square root of the variance: 0 would be NaN there."""
    hooks = {"hooks": {"blocks.1.hook_resid_post": {}, "blocks.3.hook_resid_post": {}}}
    glp, layer = prior(hooks if shape else None, **shape), 3 if shape else None
    glp.var[..., 2] = 0.0
    if shape:
        glp.mean[0] = glp.var[0] = float("nan")  # a layer it was not trained on
    glp.save_released(tmp_path)
    glp.save_released(tmp_path, "epoch_0012")  # no other prior
    kept = torch.load(tmp_path / "rep_statistics.pt", weights_only=True)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    mean, var = (kept[name][3] if shape else kept[name] for name in ("mean", "var"))
    assert torch.equal((x - mean) / var.sqrt(), glp.normalize(x, layer))
    assert torch.equal(kept["mean"].isnan(), glp.mean.isnan())
    assert torch.equal(GLP.from_pretrained(tmp_path).project(x, u=0.5, layer=layer), glp.project(x, u=0.5, layer=layer))


def test_tensors_in_one_memory_are_saved(tmp_path):
    one, two = torch.full((5,), 0.5), torch.stack([torch.full((5,), 0.5), torch.full((5,), 2.0)])
    for mean, var in ((one, one), two.unbind(), (two[0], two[0])):
        glp = GLP(prior().denoiser, mean, var)
        for again in (glp.save_pretrained(tmp_path / "own"), glp.save_released(tmp_path / "released")):
            assert torch.equal(load(again).mean, mean)
            assert torch.equal(load(again).var, var)


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
    other.normalizer = Normalizer(other.mean + 1, other.var)
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


def test_statistics_that_are_missing_are_told_by_name(tmp_path):
    shutil.copytree(GOLDEN / "single_layer", tmp_path / "glp")
    (tmp_path / "glp" / "rep_statistics.pt").unlink()
    with pytest.raises(InputError, match=r"rep_statistics\.pt is missing: .*mean and variance .* fetch the whole"):
        GLP.from_pretrained(tmp_path / "glp")
