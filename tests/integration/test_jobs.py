"""A job by itself, the same job in a comparison, and its command give the same: stores, models and numbers."""

import hashlib
import shlex
from types import SimpleNamespace

import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens.errors import InputError
from glp_lens.pipeline import CollectJob, CompareJob, FidelityJob, collect, compare, run_suite
from glp_lens.pipeline.stages import Stage, run_stages
from tests.conftest import tiny_texts
from tests.integration.toy_steering import steer_in_the_toy_language

pytestmark = pytest.mark.usefixtures("blank_pictures")

SIZES = {
    "tokens": 3000, "heldout_tokens": 300, "context": 24, "rows": 1280, "glp_width": 12, "glp_mlp": 20,
    "glp_layers": 2, "glp_batch": 64, "sae_latents": 40, "sae_k": 5, "sae_batch": 64, "probe_train": 130,
    "probe_test": 30, "ks": (3,), "sigmas": (0.1, 0.5), "strengths": (0.5, 1.0), "prompts": 4, "new_tokens": 6,
    "documents": 5, "fit_rows": 1000, "controls": ("shrink",),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """A comparison of files of the user's: texts, and a task; and what runs a command beside it."""
    root = tmp_path_factory.mktemp("jobs")
    (root / "texts.csv").write_text("text\n" + "\n".join(tiny_texts(700)))
    rows = [f"{text},{'game' if i % 2 else 'war'}" for i, text in enumerate(tiny_texts(180, seed=3))]
    (root / "mine.csv").write_text("text,label\n" + "\n".join(rows))

    def command(line):
        words = {"LM": f"--model {tiny_folder}", "R": str(root)}
        result = CliRunner().invoke(app, [w for part in shlex.split(line) for w in words.get(part, part).split()])
        assert result.exit_code == 0, (result.exception, result.stderr)
        return result.stdout

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        steer_in_the_toy_language(patch)
        settings = CompareJob(
            model=str(tiny_folder), texts="texts.csv", tasks=("5_hist_fig_ismale", "mine.csv"), out="runs", **SIZES
        )
        compare(settings, say=lambda _line: None)
        yield SimpleNamespace(root=root, command=command, settings=settings)


def models(*names):
    return ",".join(f"runs/models/{name}" for name in names)


@pytest.mark.parametrize(
    ("suite_name", "line"),
    [
        (
            "density",
            f"density --models {models('glp', 'sae', 'pca', 'gaussian')} --store runs/acts/heldout "
            "--train-store runs/acts/train --fit-rows 1000",
        ),
        (
            "probing",
            f"probe LM --models {models('glp', 'sae', 'pca', 'gaussian', 'raw', 'random')} "
            "--tasks 5_hist_fig_ismale,mine.csv --probe-train 130 --probe-test 30 --ks 3 --sigmas 0.1,0.5 --context 24",
        ),
        (
            "steering",
            f"steer LM --models {models('glp', 'sae', 'pca', 'gaussian')} --store runs/acts/train --strengths 0.5,1 "
            "--prompts 4 --new-tokens 6 --texts-per-side 128 --repairs difference --controls shrink",
        ),
        (
            "fidelity",
            f"fidelity LM --models {models('glp', 'sae', 'pca', 'pca_raw', 'gaussian')} --store runs/acts/train "
            "--texts texts.csv --documents 5 --context 24",
        ),
    ],
)
def test_a_command_and_the_comparison_give_equal_numbers(run, suite_name, line):
    said = run.command(f"{line} --out alone/{suite_name}")
    alone, together = (run.root / folder / suite_name for folder in ("alone", "runs/results"))
    assert (alone / "metrics.csv").read_bytes() == (together / "metrics.csv").read_bytes()
    titles = {
        "probing": "Sparse probing",
        "steering": "Steering",
        "fidelity": "Fidelity",
        "density": "Density",
    }
    assert f"<title>{titles[suite_name]}</title>" in (alone / "report.html").read_text()
    assert f"alone/{suite_name}/report.html" in said


def test_commands_collect_and_train_what_the_comparison_does(run):
    run.command("collect LM --texts texts.csv --tokens 3000 --context 24 --out alone/acts")
    ours, theirs = (gl.ActivationStore.open(folder) for folder in ("alone/acts", "runs/acts/train"))
    assert torch.equal(ours.rows(), theirs.rows())
    assert ours.provenance() == theirs.provenance()
    run.command("collect LM --texts texts.csv --split heldout --tokens 300 --context 24 --out alone/heldout")
    glp = "--width 12 --mlp 20 --layers 2 --validation alone/heldout"
    sae = "--latents 40 --k 5 --validation alone/heldout"
    for kind, options in {"glp": glp, "sae": sae, "pca": "", "gaussian": "", "random": "--features 40"}.items():
        sizes = "--rows 1280 --batch-size 64" if kind in ("glp", "sae") else ""
        run.command(f"train {kind} --store alone/acts {options} {sizes} --out alone/models/{kind}")
        one, other = (gl.load(f"{folder}/models/{kind}") for folder in ("alone", "runs"))
        one, other = one._tensors(), other._tensors()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_fidelity_is_measured_on_held_out_texts_whoever_names_them(run):
    texts = [f"{text} {i}" for i, text in enumerate(tiny_texts(400, seed=9))]
    settings = FidelityJob.of(
        run.settings, models="runs/models/pca", store="runs/acts/train", out="elsewhere", texts=()
    )
    results = run_suite(settings, texts=texts, say=lambda _line: None)
    heldout = [document.text for document in gl.corpus.split_documents(texts, "heldout")][: settings.documents]
    assert results.data["documents_hash"] == hashlib.sha256("\0".join(heldout).encode()).hexdigest()[:16]


def test_a_task_file_that_changes_is_probed_anew(run):
    said, text = [], (run.root / "mine.csv").read_text()
    compare(run.settings, say=said.append)
    assert sum(line.endswith("already done") for line in said) == 9
    (run.root / "mine.csv").write_text(text.replace(",game", ",peace"))
    with pytest.raises(InputError, match="probing: tasks"):
        compare(run.settings, say=said.append)
    (run.root / "mine.csv").write_text(text)


def test_what_is_in_memory_is_never_passed_over(tiny_bridge, tmp_path):
    """Neither read anew by workers nor filtered by settings of files."""
    texts = tiny_texts(50)
    for changes in ({"ray": 2}, {"labels": ("score",)}, {"dedup": False}):
        with pytest.raises(InputError):
            collect(CollectJob(out=tmp_path / "acts", **changes), model=tiny_bridge, texts=texts)
    settings = CollectJob(out=tmp_path / "acts", documents=3, split="all", context=24, tokens=0)
    (store,) = collect(settings, model=tiny_bridge, texts=texts, say=lambda _line: None)
    assert len(set(store.column("doc_id").tolist())) == 3


def test_a_folder_of_an_earlier_version_with_fewer_settings_goes_on(tmp_path):
    work = {name: [] for name in ("collect", "probe", "report")}

    def go(settings, **more):
        probe = ("tasks", "draws") if "draws" in settings else ("tasks",)
        stages = [
            Stage("collect", ("tokens",), (), (), lambda: work["collect"].append(1)),
            Stage("probe", probe, ("collect",), ("out",), lambda: work["probe"].append((tmp_path / "out").touch())),
            Stage("report", (), ("probe",), ("page",), lambda: work["report"].append((tmp_path / "page").touch())),
        ]
        run_stages(stages, settings, tmp_path, overwrite=False, say=lambda _line: None, **more)

    go({"tokens": 3, "tasks": "a"})
    go({"tokens": 3, "tasks": "a", "draws": 4}, defaults={"draws": 4})
    assert [len(times) for times in work.values()] == [1, 1, 1]
    with pytest.raises(InputError, match="probe: draws 4 -> 5"):
        go({"tokens": 3, "tasks": "a", "draws": 5}, defaults={"draws": 4})
