"""Model cards: the numbers that were measured of a model, of that model alone, and its place in a scaling run."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from glp_lens_cli import app
from typer.testing import CliRunner

import glp_lens as gl
from glp_lens import hub
from glp_lens.activations import write_store
from glp_lens.errors import InputError
from glp_lens.evals.results import Results
from glp_lens.pipeline import CardJob, DensityJob, card, card_sections, run_suite
from glp_lens.report.card import measured
from glp_lens.scaling.cells import Cell, write_cells

D, HOOK = 6, "blocks.1.hook_resid_post"
PUBLISHED = Path(__file__).parents[2] / "docs" / "results"
ABOUT = {"kind": "pca", "d_in": D, "model": {}, "provenance": {}, "versions": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two models, a suite that measured one of them by another name, and a third that no suite has seen."""
    root = tmp_path_factory.mktemp("card")
    x = torch.randn(700, D, generator=torch.Generator().manual_seed(0)) * 3 + 5
    store = write_store(root / "acts", x[:400], hook=HOOK)
    write_store(root / "heldout", x[400:], hook=HOOK, columns={"doc_id": np.arange(300) // 10})
    gl.GLP.fit(store, gl.recipe("fast", rows=320, batch_size=32), d_model=8, d_mlp=10, n_layers=2).save_pretrained(
        root / "glp"
    )
    gl.Gaussian.fit(store).save_pretrained(root / "gaussian")
    gl.PCA.fit(store, n_components=4).save_pretrained(root / "pca")
    models = (f"mine={root / 'glp'}", f"plain={root / 'gaussian'}")
    run_suite(DensityJob(models=models, store=root / "heldout", out=root / "density"), say=lambda _: None)
    return root


def written(root, name, *results, **more):
    """The card of a model, and what was printed."""
    said = []
    settings = CardJob(saved=root / name, results=results, out=root / "cards" / "card.md", overwrite=True, **more)
    return card(settings, say=said.append).read_text(encoding="utf-8"), "\n".join(said)


def test_a_card_has_the_numbers_of_its_own_model_by_whatever_name_it_was_measured(root):
    results = Results.load(root / "density")
    losses = {m.model: m for m in results.metrics if m.metric == "flow_loss" and str(m.setting) == "sigma=all"}
    for name, label in (("glp", "mine"), ("gaussian", "plain")):
        text, said = written(root, name, root / "density")
        own = losses[label]
        assert f"{own.value:.3f} [{own.ci_low:.3f}, {own.ci_high:.3f}] (n = {own.n})" in text
        assert [line.split(" |")[0] for line in text.splitlines() if line.startswith("| ")][2:] == [f"| {label}"]
        assert "note" not in said
    assert "## Results" in text
    assert text.index("## Training") < text.index("## Results") < text.index("## Use")


def test_results_of_other_models_are_refused(root):
    with pytest.raises(InputError, match="density has no results of this model: .*there: mine, plain"):
        written(root, "pca", root / "density")
    another = gl.load(root / "glp")
    another.denoiser.out_proj.bias.data += 1
    with pytest.raises(InputError, match="no results of this model"):
        card_sections(another, [root / "density"], saved=root / "mine")


def test_a_training_repeated_to_the_same_weights_has_the_results_of_the_first(root):
    store = gl.ActivationStore.open(root / "acts")
    again = gl.GLP.fit(store, gl.recipe("fast", rows=320, batch_size=32), d_model=8, d_mlp=10, n_layers=2)
    assert again.fingerprint() != gl.load(root / "glp").fingerprint()  # it took another time
    sections = card_sections(again, [root / "density"], saved=root / "again")
    assert "| mine |" in sections["Results"]


def test_results_of_earlier_versions_are_taken_by_the_name_of_the_folder(root, tmp_path):
    results = Results.load(root / "density")
    del results.data["trained"]
    results.save(tmp_path / "old")
    with pytest.raises(InputError, match="no results of this model"):
        written(root, "glp", tmp_path / "old")
    said = []
    sections = card_sections(gl.load(root / "glp"), [tmp_path / "old"], saved=tmp_path / "mine", say=said.append)
    assert "held-out flow-matching loss" in sections["Results"]
    assert said == ["note: results of density do not say which models they are of: 'mine' there is taken"]


@pytest.mark.parametrize(
    ("suite", "told", "not_told"),
    [
        ("density", ["1.190 [1.170, 1.212] (n = 340)", "16.8 [15.3, 18.2]", "1.203 [1.127, 1.276]"], ["1.460 [1.435"]),
        ("steering", ["| GLP σ = 0.3 |", "0.879 [", "+0.052 [−0.068, +0.196]"], ["float32", "| SAE"]),
        ("fidelity", ["0.354 [0.296, 0.413]", "| GLP σ = 0.2 | 0.048", "−0.056 [−0.084, −0.026]"], ["| noise"]),
        ("detect", ["GLP, steered | 0.973 [0.930, 0.990]", "+0.203 [+0.153, +0.255]"], ["σ = 0.5", "| SAE"]),
        ("generation", ["| GLP fast | 0.593 [0.561, 0.624]", "0.345 [0.315, 0.374]"], ["| PCA", "steps = 20"]),
    ],
)
def test_the_numbers_are_those_that_the_pages_of_results_publish(suite, told, not_told):
    with gzip.open(PUBLISHED / suite / "results.json.gz") as file:
        value = json.load(file)
    value.pop("format")
    text = measured([(Results.from_json(value), "glp")])
    text = text.replace("\u202f", " ")
    text = " ".join(text.split(" "))
    assert [each for each in told if each not in text] == []
    assert [each for each in not_told if each in text.split("\n- ", 1)[0]] == []


def test_another_language_model_than_in_training_is_named():
    results = Results("fidelity", data={"model": {"name": "lab/chat"}})
    results.add("pca", "heldout", "k=4", "delta_nll", 0.25, ci_low=0.125, ci_high=0.5, n=7)
    assert "Measured on another language model: lab/chat." in measured([(results, "pca")], "lab/base")
    for name in ("lab/chat", None):
        assert "lab/chat" not in measured([(results, "pca")], name)


def test_nothing_measured_is_no_section_and_a_model_is_not_taken_for_one_of_a_longer_name():
    results = Results("fidelity")
    results.add("pca_raw", "heldout", "", "delta_nll", 0.25, n=7)
    assert measured([(results, "pca")]) == ""
    assert measured([]) == ""
    assert "## Results" not in hub.card(ABOUT, "lab/pca", sections={"Results": ""})
    assert "## Results\n\nnone yet\n" in hub.card(ABOUT, "lab/pca", sections={"Results": "none yet"})


def test_a_card_that_is_there_is_replaced_only_if_asked(root, tmp_path):
    settings = CardJob(saved=root / "pca", out=tmp_path / "README.md", repository="lab/pca", license="mit")
    text = card(settings, say=lambda _: None).read_text(encoding="utf-8")
    assert 'gl.load("lab/pca")' in text
    assert "license: mit" in text
    with pytest.raises(InputError, match="already exists"):
        card(settings, say=lambda _: None)
    assert card(replace(settings, overwrite=True), say=lambda _: None).exists()
    with pytest.raises(InputError, match="is no repository id"):
        card(replace(settings, repository="a/b/c", overwrite=True))


def test_the_command_writes_into_the_folder_of_the_model_which_still_opens(root):
    done = CliRunner().invoke(app, ["card", str(root / "gaussian"), "--results", str(root / "density")])
    assert done.exit_code == 0, done.output
    text = (root / "gaussian" / "README.md").read_text(encoding="utf-8")
    assert f'gl.load("{root / "gaussian"}")' in text
    assert "### Density" in text
    assert gl.load(root / "gaussian").kind == "gaussian"
    done = CliRunner().invoke(app, ["card", str(root / "pca"), "--results", str(root / "acts")])
    assert done.exit_code == 2
    assert "holds no results.json of a suite" in " ".join(done.output.split())


def test_a_checkpoint_of_another_program_has_no_versions_of_this_machine_and_code_that_names_its_model(root, tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "single_layer"
    settings = CardJob(saved=golden, out=tmp_path / "card.md")
    text = card(settings, say=lambda _: None).read_text(encoding="utf-8")
    assert "## Versions" not in text
    assert torch.__version__ not in text
    assert 'gl.open_model("example/llm")' in text
    assert "in the format of the released GLPs" in text


def test_versions_are_those_that_the_model_was_saved_with(root, tmp_path):
    model = gl.load(root / "gaussian")
    assert f"- torch: {torch.__version__}" in model.card("lab/gaussian")
    folder = model.save_pretrained(tmp_path / "gaussian")
    config = json.loads((folder / "config.json").read_text())
    del config["glp_lens"]
    config["versions"] = {"torch": "1.2.3"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="read unchecked"):
        text = gl.load(folder).card("lab/gaussian")
    assert "- torch: 1.2.3" in text
    assert torch.__version__ not in text


# -- scaling runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def scaled(root, tmp_path):
    """A scaling run of six cells, one of which is the model in `root`."""
    training = gl.load(root / "glp").provenance["training"]
    own = Cell(
        "glp-w8x2-r320-s0", "glp", training["parameters"], training["rows_seen"] + 9, 0.8, 1e6, 2.0,
        d_model=8, d_mlp=10, n_layers=2, seed=0, trunk="glp-w8x2-s0", loss=1.2,
    )  # fmt: skip
    cells = [
        own,
        replace(own, cell="glp-w8x2-r320-s1", seed=1, loss=1.25),
        replace(own, cell="glp-w8x2-r960-s0", rows=960, flops=3e6, loss=1.1),
        replace(own, cell="glp-w4x2-r640-s0", rows=640, parameters=99, d_model=4, flops=9e5, loss=1.3),
        Cell("gaussian", "gaussian", 42, 400, 1.0, 1e3, 0.1, loss=1.5),
        Cell("pca-4", "pca", 30, 400, 1.0, 1e3, 0.1, rank=4),
    ]
    write_cells(tmp_path, cells)
    return tmp_path, cells


def test_the_card_tells_the_place_of_a_cell_in_its_run(root, scaled):
    folder, cells = scaled
    text, _ = written(root, "glp", folder)
    section = text.split("## Place in its scaling run\n\n")[1].split("\n\n## ")[0]
    assert "`glp-w8x2-r320-s0`, one of 4 glp cells (beside 1 gaussian, 1 pca)" in section
    assert "loss 1.200" in section
    assert "20.0% below the least that any Gaussian can reach (1.500); 2 of 4 by loss" in section
    assert "Other seeds of it: 1.250." in section
    assert "No cell of the run reaches that for as much compute or less." in section
    better = replace(cells[3], loss=1.15)
    write_cells(folder, [*cells[:3], better, *cells[4:]])
    text, _ = written(root, "glp", folder)
    assert "For no more compute `glp-w4x2-r640-s0` has 1.150 (9.0 × 10⁵ FLOPs)." in text


def test_a_cell_alone_of_its_kind_is_not_ranked(root, scaled):
    folder, _ = scaled
    gl.load(root / "gaussian").save_pretrained(folder / "cells" / "gaussian" / "model")
    settings = CardJob(saved=folder / "cells" / "gaussian" / "model", results=(folder,))
    text = card(settings, say=lambda _: None).read_text(encoding="utf-8")
    section = text.split("## Place in its scaling run\n\n")[1].split("\n\n## ")[0]
    assert "`gaussian`, the only gaussian cell (beside 4 glp, 1 pca)" in section
    assert section.endswith("Held-out flow-matching loss 1.500, the same rows and noise for all cells.")


def test_the_results_of_the_own_cell_are_read_and_of_no_other(root, scaled):
    folder, _ = scaled
    for cell, loss in (("glp-w8x2-r320-s0", 1.2), ("glp-w8x2-r320-s1", 1.25)):
        results = Results("density")
        results.add("glp", "heldout", "sigma=all", "flow_loss", loss, n=30)
        results.save(folder / "cells" / cell / "results" / "density")
    text, _ = written(root, "glp", folder)
    assert "| GLP | 1.200 (n = 30) |" in text
    assert "1.250 (n" not in text


def test_a_model_in_the_folder_of_its_cell_is_that_cell(root, scaled):
    folder, _ = scaled
    gl.load(root / "glp").save_pretrained(folder / "cells" / "glp-w4x2-r640-s0" / "model")
    settings = CardJob(saved=folder / "cells" / "glp-w4x2-r640-s0" / "model", results=(folder,))
    assert "`glp-w4x2-r640-s0`, one of" in card(settings, say=lambda _: None).read_text(encoding="utf-8")


def test_a_model_of_no_cell_is_refused(root, scaled):
    folder, cells = scaled
    write_cells(folder, [replace(cells[0], rows=2 * cells[0].rows), *cells[1:]])
    with pytest.raises(InputError, match="no cell of .* is this model"):
        written(root, "glp", folder)
    with pytest.raises(InputError, match="no cell of .* is this model"):
        written(root, "gaussian", folder)
