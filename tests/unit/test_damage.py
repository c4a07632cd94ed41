"""Files that were damaged or edited: one line, or what was written; never another value, never a traceback."""

import json
import pickle
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from glp_lens import hub, lm, models
from glp_lens.activations import write_store
from glp_lens.activations.convert import export_arrays, import_arrays
from glp_lens.activations.stats import Stats
from glp_lens.activations.totals import Total, Totals
from glp_lens.directions import Direction
from glp_lens.errors import InputError
from glp_lens.evals.cache import ResultCache
from glp_lens.evals.results import Results
from glp_lens.evals.steering.texts import read_generations, write_generations
from glp_lens.files import ENTRY
from glp_lens.models.gaussian import Gaussian
from glp_lens.models.glp import GLP
from glp_lens.models.pca import PCA
from glp_lens.pipeline.report import ReportJob, report
from glp_lens.pipeline.stages import Stage, run_stages, stage_seconds
from glp_lens.training import checkpoint
from glp_lens.training.history import read_history, write_history
from tests.unit.steering_frame import steering_frame
from tests.unit.toy_training import denoiser

HOOK = "blocks.3.hook_resid_post"
FLIPS = 80
"""Bits that are flipped in each file, spread over all of it."""
ODD = (None, True, -1, 10**400, "words", [], [[[]]], {"a": [1]})
"""What an edit may put in the place of any value."""


def rows(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def results():
    made = Results("probing", config={"seed": 3}, failures=["sae: skipped"], seconds=1.5, data={"rows": 3})
    made.add("glp", "all", "sigma=0.1;k=5", "auc", 0.75, ci_low=0.7, ci_high=0.8, n=12)
    made.add("sae", "agnews", "", "auc", 0.5)
    made.extras["curve"] = [1.0, 2.5]
    return made


def pca(folder):
    return PCA.fit(write_store(folder / "store", rows(60, 7), hook=HOOK)).save_pretrained(folder / "model")


def released(folder):
    prior = GLP(denoiser(), torch.zeros(6), torch.ones(6), {"store": {"hook": HOOK, "model": {"name": "tiny"}}})
    return prior.save_released(folder / "model", layer_prefix="model.layers")


def totals(folder):
    x = rows(40, 3)
    one = Total.of(x, Stats.of(x))
    return Totals(2).add(one).add(one).write(folder)


def parts():
    module = torch.nn.Linear(3, 5)
    return checkpoint.Parts(module, [torch.optim.SGD(module.parameters(), lr=0.1)], {})


def state(folder):
    place = checkpoint.Place(4, [{"step": 4, "loss": 1.5}], 2.0, (0.5, 0.25, 1))
    checkpoint.save(folder / "training.state", {"config": {"lr": 1e-3}, "identity": {}}, parts(), place)


def read_state(folder):
    into = parts()
    place = checkpoint.load(folder / "training.state", {"config": {"lr": 1e-3}, "identity": {}}, into)
    assert checkpoint.history(folder / "training.state") == place.history
    return place, [p.tolist() for p in into.module.parameters()]


def stages(folder):
    def work():
        (folder / "out").write_text("made")

    run_stages([Stage("one", ("a",), (), ("out",), work)], {"a": 3}, folder, overwrite=False, say=lambda _: None)


def kept(folder):
    return ResultCache(folder).get("task", list, lambda: {"auc": 0.75}, dict)


def records(folder):
    ResultCache(folder).records("texts", list).add({"a": {"score": 0.5}, "b": 3})


def read_records(folder):
    """With those that are made again: what is kept must be what was."""
    return {"a": {"score": 0.5}, "b": 3} | ResultCache(folder).records("texts", list).values


def imported(folder):
    shutil.rmtree(folder / "back", ignore_errors=True)
    return import_arrays([folder / "rows.safetensors"], folder / "back", hook=HOOK).rows().tolist()


FILES = {
    "results": (lambda f: results().save(f), lambda f: Results.load(f).to_json(), ["results.json"]),
    "model": (pca, lambda f: PCA.from_pretrained(f / "model").fingerprint(),
              ["model/config.json", "model/model.safetensors"]),
    "released prior": (released, lambda f: GLP.from_pretrained(f / "model").fingerprint(),
                       ["model/config.yaml", "model/rep_statistics.pt", "model/final.safetensors"]),
    "training state": (state, read_state, ["training.state"]),
    "training curve": (lambda f: write_history(f, [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.5}]),
                       lambda f: read_history(f).to_dict("list"), ["history.parquet"]),
    "generations": (lambda f: write_generations(steering_frame({"glp": 0.1}, prompts=2), f),
                    lambda f: read_generations(f).to_csv(), ["generations.parquet"]),
    "direction": (lambda f: Direction.of(rows(1, 5)[0], HOOK, name="n", method="mean").save(f / "d.safetensors"),
                  lambda f: Direction.load(f / "d.safetensors").to_json(), ["d.safetensors"]),
    "statistics": (totals, lambda f: str(Totals.read(f, 2)), ["statistics.safetensors"]),
    "stage mark": (stages, stage_seconds, ["stages/one.json"]),
    "cached result": (kept, kept, ["task-*.json"]),
    "records": (records, read_records, ["texts-*.jsonl"]),
    "exported rows": (lambda f: export_arrays(write_store(f / "s", rows(9, 4), hook=HOOK), f / "rows.safetensors"),
                      imported, ["rows.safetensors"]),
}  # fmt: skip
"""Of each kind of file: what writes it, what reads it, and its names."""


def outcome(read, folder):
    """What is read, or the one line that refuses it; notes on what is unchecked are let pass."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(folder)
    except InputError as error:
        found = error
    assert "\n" not in str(found)
    return found


@pytest.mark.parametrize("kind", FILES)
def test_a_flipped_bit_is_found_or_harmless(kind, tmp_path):
    write, read, names = FILES[kind]
    write(tmp_path)
    want, draw = read(tmp_path), random.Random(kind)
    assert outcome(read, tmp_path) == want
    for name in names:
        (path,) = tmp_path.glob(name)
        content, found = path.read_bytes(), 0
        ends = {*range(12), *range(len(content) - 12, len(content))}
        for at in sorted(ends | {int((i + draw.random()) * len(content) / FLIPS) for i in range(FLIPS)}):
            flipped = bytearray(content)
            flipped[at] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            got = outcome(read, tmp_path)
            found += isinstance(got, InputError)
            assert isinstance(got, InputError) or got == want, (name, at, content[at], flipped[at])
        assert found or kind in ("cached result", "records")  # those are made again
        path.write_bytes(content)


@pytest.mark.parametrize("kind", FILES)
def test_a_cut_file_and_another_kind_of_file_are_told(kind, tmp_path):
    write, read, names = FILES[kind]
    write(tmp_path)
    want = read(tmp_path)
    (path,) = tmp_path.glob(names[-1])
    content = path.read_bytes()
    others = [b"", content[:1], content[: len(content) // 2], content[:-1], content + b"\0", b"\xff" * 400]
    for other in others:
        path.write_bytes(other)
        assert isinstance(got := outcome(read, tmp_path), InputError) or got == want
    if path.suffix == ".json":
        results().save(tmp_path / "other")
        path.write_bytes((tmp_path / "other" / "results.json").read_bytes())
        if kind not in ("results", "cached result"):
            with pytest.raises(InputError, match="holds what another file is for"):
                read(tmp_path)


def edits(value):
    """Copies of a JSON value with one of its parts changed, left out, or added."""
    text = json.dumps(value)

    def places(node, path=()):
        yield path
        for key, below in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            yield from places(below, (*path, key))

    for path in places(value):
        if not path or path[0] == ENTRY:
            continue
        for odd in (*ODD, ...):
            copy = json.loads(text)
            *above, last = path
            parent = copy
            for key in above:
                parent = parent[key]
            if odd is ...:
                del parent[last]
            else:
                parent[last] = odd
            yield copy
    yield {**value, "more": 3}


def use_model(folder):
    model = models.load(folder / "model")
    x = torch.ones(5, model.d_in)
    model.project(x)
    model.fingerprint()
    hub.card(model._about(), "a/b")
    return "usable"


EDITED = {
    "results.json": (FILES["results"][0], FILES["results"][1]),
    "stages/one.json": (stages, lambda f: (stages(f), stage_seconds(f))),
    "model/config.json": (pca, use_model),
}


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_file_is_told_and_read_without_its_entry_or_told_what_is_wrong(name, tmp_path):
    write, read = EDITED[name]
    write(tmp_path)
    path = tmp_path / name
    original = path.read_bytes()
    for number, edited in enumerate(edits(json.loads(original))):
        path.write_text(json.dumps(edited))
        if number % 7 == 0:
            assert "edited" in str(outcome(read, tmp_path))
        del edited[ENTRY]
        path.write_text(json.dumps(edited))
        outcome(read, tmp_path)
        path.write_bytes(original)
    for text in ('{"a": NaN}', '{"a": ' * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}', "[]", "\xff"):
        path.write_text(text, encoding="latin-1")
        assert isinstance(outcome(read, tmp_path), InputError), text[:20]


def test_results_that_were_edited_on_purpose_are_read_unchecked(tmp_path):
    path = results().save(tmp_path) / "results.json"
    about = json.loads(path.read_text())
    assert about[ENTRY].items() >= {"file": "results", "version": 1}.items()
    path.write_text(path.read_text().replace("0.75", "0.76"))
    with pytest.raises(InputError, match=f"edited since it was written.* delete its '{ENTRY}' entry"):
        Results.load(tmp_path)
    del about[ENTRY]
    about["metrics"][0]["value"] = 0.76
    path.write_text(json.dumps(about))
    with pytest.warns(UserWarning, match="results in .* without a digest.*: read unchecked"):
        assert Results.load(tmp_path).metrics[0].value == 0.76


def test_a_report_of_edited_results_says_which_cannot_be_shown(tmp_path, monkeypatch):
    path = results().save(tmp_path) / "results.json"

    def broken(*_):
        raise KeyError("curves")

    monkeypatch.setattr("glp_lens.report.write_report", broken)
    with pytest.raises(InputError, match=r"no page could be made \('curves'\), all numbers are saved: \S+json$"):
        report(ReportJob(folders=(tmp_path,), out=tmp_path / "page"))
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != ENTRY}))
    with (
        pytest.warns(UserWarning, match="unchecked"),
        pytest.raises(InputError, match=r"no page could be made \('curves'\).*results.json carries no digest"),
    ):
        report(ReportJob(folders=(tmp_path,), out=tmp_path / "page"))


def test_a_record_of_another_task_is_not_taken(tmp_path):
    cache = ResultCache(tmp_path)
    cache.records("scores-sports", list).add({"a text": 0.5})
    assert cache.get("sports", list, lambda: 0.5, float) == 0.5
    for old in [*tmp_path.iterdir()]:
        new = cache._path(old.name.rpartition("-")[0].replace("sports", "world"), list).with_suffix(old.suffix)
        shutil.copy(old, new)
    assert cache.records("scores-sports", list).values == {"a text": 0.5}
    assert cache.records("scores-world", list).values == {}
    assert cache.get("world", list, lambda: 0.25, float) == 0.25


def test_config_and_weights_of_two_models_are_not_put_together(tmp_path):
    one = PCA.fit(write_store(tmp_path / "a", rows(60, 7), hook=HOOK)).save_pretrained(tmp_path / "one")
    two = PCA.fit(write_store(tmp_path / "b", rows(60, 7, 1), hook=HOOK)).save_pretrained(tmp_path / "two")
    shutil.copy(one / "model.safetensors", two)
    with pytest.raises(InputError, match="not the file that was written with the config beside it"):
        models.load(two)


def test_what_earlier_versions_wrote_is_read_and_said_to_be_unchecked(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Gaussian.fit(write_store(tmp_path / "a", rows(60, 7), hook=HOOK)).save_pretrained(tmp_path / "m")
    want, config = models.load(folder).fingerprint(), json.loads((folder / "config.json").read_text())
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in (ENTRY, "weights")}))
    with pytest.warns(UserWarning, match="unchecked") as told:
        assert models.load(folder).fingerprint() == want
    assert {str(each.message) for each in told} == {
        f"model config in {folder} without a digest, as earlier versions wrote them: read unchecked"
    }


def test_edited_metadata_of_an_autoencoder_is_told(tmp_path):
    pytest.importorskip("sae_lens")
    from glp_lens.models.sae import SAE

    made = SAE.fit(write_store(tmp_path / "a", rows(64, 6), hook=HOOK), n_latents=9, k=2, rows=64, batch_size=16)
    path = made.save_pretrained(tmp_path / "model") / "config.json"
    config = json.loads(path.read_text())
    del config[ENTRY]
    for about in edits(config["model"]):
        path.write_text(json.dumps({**config, "model": about}))
        outcome(use_model, tmp_path)


class Trap:
    """A pickle of it makes a file when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_language_model_that_is_a_pickle_is_told_and_not_executed(tiny_folder, tmp_path):
    for name, save in (("plain", lambda trap, file: file.write_bytes(pickle.dumps(trap))), ("torch", torch.save)):
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        (folder / "model.safetensors").unlink()
        save(Trap(tmp_path / "sprung"), folder / "pytorch_model.bin")
        told = outcome(lm.open_model, str(folder))
        assert "a pickle of Python objects" in str(told)
        assert "weights_only" not in str(told)  # torch's message says how to run what is in it
        assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_hidden_layers", "four"), ("num_key_value_heads", 0), ("dtype", "float99"), ("architectures", 3),
     ("vocab_size", None)],
)  # fmt: skip
def test_an_edited_config_of_a_language_model_is_told(name, value, tiny_folder, tmp_path):
    folder = tmp_path / "edited"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    assert isinstance(told := outcome(lm.open_model, str(folder)), InputError) or name == "architectures", told
