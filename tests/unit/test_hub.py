"""Publishing models and fetching them again, with a stand-in for the Hub that this test starts on this machine.

The Hub's client reads its settings when it is imported, so what is tested runs in processes of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load as parse

from glp_lens import hub
from glp_lens.artifacts import CONFIG, WEIGHTS
from glp_lens.errors import InputError
from glp_lens.evals.results import Results
from glp_lens.models.glp import GLP
from glp_lens.models.raw import Raw
from tests.unit.fake_hub import FakeHub, Repository

GOLDEN = Path(__file__).parents[1] / "golden"

START = """
import json, sys
import torch
import glp_lens as gl
from glp_lens.errors import InputError
golden, work = sys.argv[1:]
x = torch.randn(7, 24, generator=torch.Generator().manual_seed(0))
found = {}

def told(call):
    try:
        return call()
    except InputError as error:
        return str(error)

def same(a, b):
    return type(a) is type(b) and torch.equal(a.encode(x), b.encode(x)) and a.provenance == b.provenance
"""

ONLINE = """
single = gl.GLP.from_pretrained(golden + "/single_layer")
multi = gl.GLP.from_pretrained(golden + "/multi_layer")
raw, glp = gl.Raw.from_pretrained(work + "/raw"), gl.GLP.from_pretrained(work + "/glp")

found["address"] = single.push_to_hub("owner/own", private=True, license="mit", commit_message="first")
found["own"] = same(gl.GLP.from_pretrained("owner/own"), single) and same(gl.load("owner/own"), single)
single.push_to_hub("owner/released", format="released")
found["released"] = same(gl.GLP.from_pretrained("owner/released"), single) and same(gl.load("owner/released"), single)
raw.push_to_hub("raw")
found["raw"] = same(gl.load("me/raw"), raw) and same(gl.Raw.from_pretrained("me/raw"), raw)

glp.push_to_hub("owner/own", revision="second")
second = gl.load("owner/own", revision="second")
found["branch"] = same(second, glp) and same(gl.load("owner/own"), single) and second.history == glp.history

single.push_to_hub("owner/turned", format="released")
multi.push_to_hub("owner/turned")
turned = gl.load("owner/turned")
found["turned"] = torch.equal(turned.mean, multi.mean)

found["published"] = same(gl.GLP.from_pretrained("lab/prior", "epoch_0012"), single)
found["intermediate"] = same(gl.GLP.from_pretrained("lab/steps", "step_00000512"), glp)

from glp_lens_cli import app
from typer.testing import CliRunner
options = ["--format", "released", "--results", work + "/results"]
done = CliRunner().invoke(app, ["push", golden + "/single_layer", "lab/of-command", *options])
found["command"] = [done.exit_code, done.output]
options = ["--format", "released", "--layer-prefix", "transformer.h"]
CliRunner().invoke(app, ["push", golden + "/single_layer", "lab/of-gpt2", *options])
done = CliRunner().invoke(app, ["push", golden + "/single_layer", "lab/of-command", "--format", "onnx"])
found["bad command"] = [done.exit_code, done.output]

found["errors"] = {
    "no such repository": told(lambda: gl.load("owner/nothing")),
    "no such revision": told(lambda: gl.load("owner/own", revision="third")),
    "no model there": told(lambda: gl.load("lab/empty")),
    "no such checkpoint": told(lambda: gl.GLP.from_pretrained("lab/prior", "epoch_0099")),
    "another kind": told(lambda: gl.PCA.from_pretrained("owner/own")),
    "unknown token": told(lambda: single.push_to_hub("owner/new", token="hf_other")),
    "token to read with": told(lambda: single.push_to_hub("owner/new", token="hf_read")),
    "read token, repository there": told(lambda: single.push_to_hub("owner/own", token="hf_read")),
    "malformed id": told(lambda: single.push_to_hub("owner/a/b")),
    "malformed name": told(lambda: single.push_to_hub("owner/a b")),
    "unknown format": told(lambda: single.push_to_hub("owner/own", format="onnx")),
    "prefix of the own format": told(lambda: single.push_to_hub("owner/own", layer_prefix="transformer.h")),
    "format of a prior only": told(lambda: raw.push_to_hub("owner/own", format="released")),
}

from huggingface_hub import constants
constants.ENDPOINT = "http://127.0.0.1:9"
found["errors"] |= {
    "no network to load": told(lambda: gl.load("owner/unseen")),
    "no network to push": told(lambda: single.push_to_hub("owner/unseen")),
}
"""

OFFLINE = """
found["cached"] = same(gl.load("owner/released"), gl.GLP.from_pretrained(golden + "/single_layer"))
found["not cached"] = told(lambda: gl.load("owner/unseen"))
found["push"] = told(lambda: gl.load("owner/released").push_to_hub("owner/released"))
"""


def client(script, work, **settings):
    """What a script found in a process of its own."""
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **settings}
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    code = START + script + '\nprint("FOUND", json.dumps(found))'
    done = subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN), str(work)],
        env=environment | settings, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND ")[2])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Models to publish, and the client's cache."""
    folder = tmp_path_factory.mktemp("hub")
    store = {
        "model": {"name": "lab/lm (revision 12ab)", "weight_processing": "raw"},
        "hook": "blocks.3.hook_resid_post", "rows": 90_001, "max_norm": 77.5,
        "corpus": {"name": "lab/texts", "documents": 410}, "excluded": {"bos": 410, "massive": 3},
    }  # fmt: skip
    rows = torch.randn(31, 24, generator=torch.Generator().manual_seed(2))
    raw = Raw(rows)
    raw.provenance = {"store": store}
    raw.save_pretrained(folder / "raw")
    glp = GLP.from_pretrained(GOLDEN / "single_layer")
    glp.denoiser.out_proj.bias.data += 1
    glp.provenance = {"store": store, "training": {"rows_seen": 123_456, "recipe": "AdamW lr 5e-05", "seconds": 9.5}}
    glp.history = [{"step": 1, "loss": 1.75}, {"step": 30, "loss": 1.25, "validation_loss": 1.375}]
    glp.save_pretrained(folder / "glp")
    results = Results("density")
    results.add("single_layer", "heldout", "sigma=all", "flow_loss", 1.3125, ci_low=1.25, ci_high=1.375, n=17)
    results.save(folder / "results")
    return folder


@pytest.fixture(scope="module")
def server():
    with FakeHub() as fake:
        yield fake


@pytest.fixture(scope="module")
def online(server, work):
    """What a client with a token found, that published models and fetched them."""
    golden = {path.name: path.read_bytes() for path in (GOLDEN / "single_layer").iterdir()}
    tree = {name: golden[name] for name in ("config.yaml", "rep_statistics.pt")} | {
        "final.safetensors": b"of many gigabytes",
        "checkpoints/epoch_0011.safetensors": b"likewise",
        "checkpoints/epoch_0012.safetensors": golden["final.safetensors"],
        "optimizer_state.pt": b"likewise",
    }
    server.repositories["lab/prior"] = Repository(False, {"a" * 40: tree}, {"main": "a" * 40})
    server.repositories["lab/steps"] = Repository(
        False,
        {
            "c" * 40: {
                WEIGHTS: b"of many gigabytes",
                CONFIG: b"{}",
                f"checkpoints/step_00000512/{CONFIG}": (work / "glp" / CONFIG).read_bytes(),
                f"checkpoints/step_00000512/{WEIGHTS}": (work / "glp" / WEIGHTS).read_bytes(),
                f"checkpoints/step_00001024/{WEIGHTS}": b"likewise",
            }
        },
        {"main": "c" * 40},
    )
    server.repositories["lab/empty"] = Repository(False, {"b" * 40: {"README.md": b"hello"}}, {"main": "b" * 40})
    return client(ONLINE, work, HF_ENDPOINT=server.endpoint, HF_HOME=str(work / "home"), HF_TOKEN="hf_write")


@pytest.mark.parametrize("what", ["own", "released", "raw", "branch", "turned", "published", "intermediate"])
def test_what_is_fetched_is_what_was_pushed(online, what):
    assert online[what] is True


def test_the_repository_holds_the_model_and_its_card(online, server):
    own, released = (server.repositories[f"owner/{name}"] for name in ("own", "released"))
    assert (own.private, released.private) == (True, False)
    assert own.messages[0] == "first"
    assert own.tree().keys() == {CONFIG, WEIGHTS, "README.md"}
    assert released.tree().keys() == {"config.yaml", "rep_statistics.pt", "final.safetensors", "final", "README.md"}
    want = parse((GOLDEN / "single_layer" / "final.safetensors").read_bytes())
    for tree, file in ((own.tree(), WEIGHTS), (released.tree(), "final.safetensors")):
        got = parse(tree[file])
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert online["address"].startswith(f"{server.endpoint}/owner/own/commit/")


def test_another_format_takes_the_place_of_the_one_before(online, server):
    assert server.repositories["owner/turned"].tree().keys() == {CONFIG, WEIGHTS, "README.md"}


def test_only_what_is_needed_is_downloaded(online, server):
    wanted = {path for name, path in server.downloads if name == "lab/prior"}
    assert wanted == {"config.yaml", "rep_statistics.pt", "checkpoints/epoch_0012.safetensors"}
    wanted = {path for name, path in server.downloads if name == "lab/steps"}
    assert wanted == {f"checkpoints/step_00000512/{file}" for file in (CONFIG, WEIGHTS)}
    assert not [path for _, path in server.downloads if path == "README.md"]


def test_the_card_tells_what_the_model_is(online, server):
    tree = server.repositories["owner/own"].tree("second")
    _, header, body = tree["README.md"].decode().split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["library_name"] == "glp-lens"
    assert header["base_model"] == "lab/lm"
    assert header["datasets"] == ["lab/texts"]
    assert "glp" in header["tags"]
    assert "license" not in header
    facts = ["lab/lm (revision 12ab)", "blocks.3.hook_resid_post", "90,001", "3 massive", "77.5", "123,456",
             "AdamW lr 5e-05", "final validation loss: 1.375", 'gl.load("owner/own")', torch.__version__]  # fmt: skip
    assert [fact for fact in facts if fact not in body] == []
    first = server.repositories["owner/own"].tree()["README.md"].decode()
    assert yaml.safe_load(first.split("---\n")[1])["license"] == "mit"


def test_the_card_of_a_prior_of_which_little_is_known():
    glp = GLP.from_pretrained(GOLDEN / "multi_layer")
    glp.provenance = {}
    text = hub.card(glp._about(), "someone/prior")
    assert "None" not in text
    assert "Trained on" in text
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "glp-lens"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            "no such repository",
            "'owner/nothing' is no folder and cannot be fetched .*no such repository, or .* private",
        ),
        ("no such revision", "no revision 'third'"),
        ("no model there", "model config not found"),
        ("no such checkpoint", "checkpoint 'epoch_0099' is not in"),
        ("another kind", "holds a model of kind 'glp', expected 'pca'"),
        ("unknown token", "cannot push to 'owner/new' .*no token, or one that may not write .*hf auth login"),
        ("token to read with", "cannot push to 'owner/new' .*no token, or one that may not write"),
        ("read token, repository there", "cannot push to 'owner/own' .*no token, or one that may not write"),
        ("malformed id", "'owner/a/b' is no repository id: expected 'owner/name'"),
        ("malformed name", "'owner/a b' is no repository id"),
        ("unknown format", "format of a glp must be one of own, released, got 'onnx'"),
        ("no network to load", "cannot be fetched from the Hub .*is there a network"),
        ("no network to push", "cannot push to 'owner/unseen' .*is there a network"),
        ("prefix of the own format", "layer_prefix is of the released format, got format 'own'"),
        ("format of a prior only", "format of a raw must be one of own, got 'released'"),
    ],
)
def test_mistakes_are_told_in_one_line(online, what, words):
    line = online["errors"][what]
    assert isinstance(line, str)
    assert "\n" not in line
    with pytest.raises(InputError, match=words):
        raise InputError(line)


def test_the_command_publishes(online, server):
    code, output = online["command"]
    assert code == 0, output
    assert f"{server.endpoint}/lab/of-command/commit/" in output
    tree = server.repositories["lab/of-command"].tree()
    assert "final.safetensors" in tree
    assert "1.312 [1.250, 1.375] (n = 17)" in tree["README.md"].decode()
    written = yaml.safe_load(server.repositories["lab/of-gpt2"].tree()["config.yaml"])
    assert written["glp_kwargs"]["tracedict_config"]["layer_prefix"] == "transformer.h"
    code, output = online["bad command"]
    assert code == 2
    assert "'onnx' is not one of 'own', 'released'" in " ".join(output.split())


def test_without_going_online_the_cache_is_read(online, server, work):
    found = client(OFFLINE, work, HF_ENDPOINT=server.endpoint, HF_HOME=str(work / "home"), HF_HUB_OFFLINE="1")
    assert found["cached"] is True
    for what in ("not cached", "push"):
        assert "HF_HUB_OFFLINE is set" in found[what]
        assert "\n" not in found[what]


def test_a_folder_has_no_revisions():
    with pytest.raises(InputError, match="leave it out"):
        GLP.from_pretrained(GOLDEN / "single_layer", revision="main")
