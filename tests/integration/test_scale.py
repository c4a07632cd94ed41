"""A scaling run on a tiny model: branches that equal trainings of their own, tables, resuming, several processes."""

import dataclasses
import shutil

import pytest
import torch

import glp_lens as gl
from glp_lens.activations import ActivationStore
from glp_lens.activations.writer import locked
from glp_lens.errors import InputError
from glp_lens.evals.results import Results
from glp_lens.pipeline import CollectJob, ScaleJob, collect, scale
from glp_lens.pipeline.scale_run import Run
from glp_lens.scaling import training
from glp_lens.scaling.cells import Cell, read_cells, read_utilities
from glp_lens.scaling.grid import planned
from tests.conftest import tiny_texts

pytestmark = pytest.mark.usefixtures("blank_pictures")

GRID = {
    "widths": (12,), "layers": (2,), "rows": (640, 1280, 2560), "glp_batch": 64, "warmup_rows": 128, "mlp_ratio": 1.5,
    "sae_latents": (40,), "sae_rows": (640,), "sae_k": 5, "pca_ranks": (5,), "suites": ("density",),
}  # fmt: skip
NAMES = ["gaussian", "raw", "pca-5", "sae-40-r640-s0", *(f"glp-w12x2-r{rows}-s0" for rows in GRID["rows"])]
SHORT = "glp-w12x2-r640-s0"
FEW = {"rows": (640,), "sae_latents": (), "pca_ranks": ()}
"""One prior and the baselines that are always there."""


@pytest.fixture(scope="module")
def work(tiny_folder, tmp_path_factory):
    """A training and a held-out store."""
    folder = tmp_path_factory.mktemp("scale")
    for split, tokens in (("train", 2000), ("heldout", 200)):
        job = CollectJob(model=str(tiny_folder), context=24, tokens=tokens, split=split, out=folder / split)
        collect(job, texts=tiny_texts(400), say=lambda _: None)
    return folder


def settings(work, out, **changes):
    return ScaleJob(**{**GRID, "store": work / "train", "heldout": work / "heldout", "out": out, **changes})


def go(job):
    """One call; gives back the lines it said."""
    said = []
    assert scale(job, say=said.append) == job.out
    return said


@pytest.fixture(scope="module")
def run(work, tmp_path_factory):
    """A finished run whose models were kept."""
    job = settings(work, tmp_path_factory.mktemp("run") / "out", keep_models=True)
    return job, go(job)


def same(a, b):
    """Whether two saved priors have the same weights, bit for bit."""
    one, other = (gl.load(folder).denoiser.state_dict() for folder in (a, b))
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_cell_is_in_the_tables_with_what_it_cost(run):
    job, said = run
    cells = read_cells(job.out).set_index("cell")
    assert sorted(cells.index) == sorted(NAMES)
    assert "all 7 cells are done" in said[-2]
    assert (job.out / "scaling.json").exists()
    assert sum(line.startswith("[") for line in said) == 7
    for name in NAMES:
        about = gl.load(job.out / "cells" / name / "model").provenance["training"]
        assert cells.flops[name] == about["flops"]
        assert cells.parameters[name] == about["parameters"]
    for plan in planned(job, seed=0, d_in=24, stored=2000):
        if plan.kind in ("glp", "sae"):
            assert plan.parameters == cells.parameters[plan.cell]
        if plan.kind == "glp":
            assert plan.flops == cells.flops[plan.cell]
    losses = cells.loss[[f"glp-w12x2-r{rows}-s0" for rows in GRID["rows"]]]
    assert losses.is_monotonic_decreasing
    assert cells.loss[["raw", "pca-5", "sae-40-r640-s0"]].isna().all()
    assert cells.loss["gaussian"] == gl.load(job.out / "cells" / "gaussian" / "model").optimal_loss_mean()
    assert not (job.out / "trunks").exists() or not any((job.out / "trunks").iterdir())


def test_the_loss_is_the_mean_of_its_bands_and_near_that_of_the_density_suite(run):
    job, _ = run
    cells, utilities = read_cells(job.out).set_index("cell"), read_utilities(job.out)
    bands = cells.filter(like="loss:sigma=").loc[SHORT]
    assert len(bands) == 10
    assert bands.mean() == pytest.approx(cells.loss[SHORT], rel=0.02)  # about as many rows in each
    of_suite = utilities.query("cell == @SHORT and metric == 'flow_loss' and setting == 'sigma=all'")
    assert of_suite.value.item() == pytest.approx(cells.loss[SHORT], rel=0.1)
    assert set(utilities.cell) == set(NAMES) - {"raw"}  # which has no density


def test_a_branch_is_the_training_made_for_its_budget(run, work, tmp_path):
    job, _ = run
    alone = settings(work, tmp_path / "alone", rows=(640,), sae_latents=(), pca_ranks=(), suites=(), keep_models=True)
    go(alone)
    assert same(job.out / "cells" / SHORT / "model", alone.out / "cells" / SHORT / "model")
    one, other = (Cell.load(folder / "cells" / SHORT) for folder in (job.out, alone.out))
    assert dataclasses.replace(one, seconds=other.seconds) == other


def test_a_second_call_does_nothing_and_another_suite_is_added(run, tmp_path):
    job, _ = run
    out = tmp_path / "out"
    shutil.copytree(job.out, out)
    again = dataclasses.replace(job, out=out, keep_models=False, **FEW)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("cell.json")}
    assert "3 of 3 cells are done already" in go(again)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("cell.json")} == before
    assert not (out / "cells" / SHORT / "model").exists()  # no longer wanted
    more = dataclasses.replace(again, suites=("density", "generation"), samples=150, sampling=())
    go(more)  # whose models are trained again, since they were deleted
    found = read_utilities(out)
    assert set(found[found.suite == "generation"].cell) == {"gaussian", SHORT}
    assert set(found[found.suite == "density"].cell) == {*NAMES} - {"raw"}
    assert set(read_cells(out).cell) == {*NAMES}  # also of the larger grid that was there


def test_other_settings_are_refused_and_redone_when_asked(run, tmp_path):
    job, _ = run
    out = tmp_path / "out"
    shutil.copytree(job.out, out)
    changed = dataclasses.replace(job, out=out, glp_lr=1e-3, **FEW)
    loss = Cell.load(out / "cells" / SHORT).loss
    with pytest.raises(InputError, match=r"other settings \(glp-w12x2-r640-s0: glp_lr None -> 0.001\)"):
        go(changed)
    assert Cell.load(out / "cells" / SHORT).loss == loss
    said = go(dataclasses.replace(changed, overwrite=True))
    assert Cell.load(out / "cells" / SHORT).loss != loss
    note = next(line for line in said if "other settings" in line)
    assert note.endswith("other settings: glp-w12x2-r1280-s0 (glp_lr None -> 0.001) and 1 more")
    same_settings = {*NAMES} - {"glp-w12x2-r1280-s0", "glp-w12x2-r2560-s0"}
    assert set(read_cells(out).cell) == same_settings
    assert set(read_utilities(out).cell) == same_settings - {"raw"}
    go(dataclasses.replace(changed, glp_lr=None, suites=(), overwrite=True))
    assert set(read_utilities(out).cell) == {*NAMES} - {"raw", SHORT}  # measured before it was trained again


def test_results_that_are_damaged_or_deleted_are_told_and_made_again(run, tmp_path):
    job, _ = run
    out = tmp_path / "out"
    shutil.copytree(job.out, out)
    results = out / "cells" / SHORT / "results" / "density" / "results.json"
    results.write_bytes(results.read_bytes()[:-9])
    again = dataclasses.replace(job, out=out, **FEW)
    with pytest.raises(InputError, match="delete the file and run again"):
        go(again)
    results.unlink()
    go(again)
    order = ["cell", "task", "setting", "metric", "value"]
    one, other = (read_utilities(folder).sort_values(order, ignore_index=True)[order] for folder in (out, job.out))
    assert one.equals(other)


def test_grids_in_one_folder_share_its_tables(run, tmp_path):
    job, _ = run
    grid = dataclasses.replace(job, out=tmp_path / "out", keep_models=False, sae_latents=(), rows=(640,))
    go(grid)
    said = go(dataclasses.replace(grid, widths=(30,), pca_ranks=(7,)))
    assert "all 4 cells are done" in said[-2]
    want = {"gaussian", "raw", "pca-5", "pca-7", SHORT, "glp-w30x2-r640-s0"}
    assert set(read_cells(grid.out).cell) == want
    utilities = read_utilities(grid.out)
    assert set(utilities.cell) == want - {"raw"}
    go(grid)
    assert set(read_cells(grid.out).cell) == want
    again = read_utilities(grid.out)
    order = ["cell", "task", "setting", "metric"]
    assert again.sort_values(order, ignore_index=True).equals(utilities.sort_values(order, ignore_index=True))
    assert Results.load(grid.out, "scaling.json").data["priors"] == 2


class Stop(BaseException):
    """As a kill, in that nothing catches it."""


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_stopped_in_a_ladder_goes_on_from_the_states_it_kept(run, work, tmp_path, monkeypatch, after):
    job, _ = run
    again = dataclasses.replace(job, out=tmp_path / "out", sae_latents=(), pca_ranks=(), suites=())
    begun, real = [], training.train_cell

    def stopping(cell, *args, **options):
        begun.append(cell.cell)
        if len(begun) > after:
            raise Stop
        real(cell, *args, **options)

    monkeypatch.setattr(training, "train_cell", stopping)
    with pytest.raises(Stop):
        go(again)
    trunk = again.out / "trunks" / "glp-w12x2-s0"
    assert len(list(trunk.glob("step_*.state"))) == 2
    assert sorted(read_cells(again.out).cell) == sorted(begun[:after])
    monkeypatch.setattr(training, "train_cell", real)
    starts = starts_of_fits(monkeypatch)
    go(again)
    assert len(starts) == 3 - after
    assert all(starts)  # each left was a branch
    assert same(again.out / "cells" / SHORT / "model", job.out / "cells" / SHORT / "model")
    assert not trunk.exists()


def starts_of_fits(monkeypatch):
    """A list that each training of a prior adds its first state to."""
    starts = []
    monkeypatch.setattr(gl.GLP, "fit", classmethod(lambda cls, *a, _fit=gl.GLP.fit.__func__, **k: (
        starts.append(k["run"].start and k["run"].start.name), _fit(cls, *a, **k))[1]))  # fmt: skip
    return starts


def test_a_larger_budget_goes_on_from_the_state_that_was_kept(run, work, tmp_path, monkeypatch):
    job, _ = run
    few = {"sae_latents": (), "pca_ranks": (), "suites": (), "keep_states": True}
    small = dataclasses.replace(job, out=tmp_path / "out", rows=(640, 1280), **few)
    go(small)
    trunk, held = small.out / "trunks" / "glp-w12x2-s0", job.config(1280, 0).steps_held
    assert [path.name for path in trunk.iterdir()] == [f"step_{held:08d}.state"]
    starts, large = starts_of_fits(monkeypatch), dataclasses.replace(small, rows=job.rows)
    go(large)
    assert starts == [f"step_{held:08d}.state"]
    for rows in job.rows:
        name = f"glp-w12x2-r{rows}-s0"
        assert same(large.out / "cells" / name / "model", job.out / "cells" / name / "model")
    longest = f"step_{job.config(2560, 0).steps_held:08d}.state"
    assert [path.name for path in trunk.iterdir()] == [longest]
    go(small)  # which has less to keep
    assert [path.name for path in trunk.iterdir()] == [longest]
    assert len(starts) == 1
    go(dataclasses.replace(large, keep_states=False))
    assert not trunk.exists()


def test_a_state_of_other_settings_is_refused_and_with_overwrite_replaced(work, tmp_path, monkeypatch):
    job = settings(work, tmp_path / "out", suites=(), keep_models=True, keep_states=True, **FEW)
    go(job)
    starts = starts_of_fits(monkeypatch)
    other = dataclasses.replace(job, rows=(1280,), glp_lr=1e-4)
    with pytest.raises(InputError, match=r"step_\d+\.state belongs to a training with other settings"):
        go(other)
    go(dataclasses.replace(other, overwrite=True))
    assert [start is None for start in starts] == [False, False, True]


def test_a_dry_run_tells_what_is_left(work, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "seconds_per_flop", lambda *_, **__: 1e-6)
    job = settings(work, tmp_path / "out", suites=("density",), keep_models=True, keep_states=True, **FEW)
    go(job)
    more = dataclasses.replace(job, rows=(640, 2560), dry_run=True)
    lines = {line.split()[0]: line.split() for line in go(more)}
    assert lines[SHORT][4] == lines["gaussian"][4] == "done"
    cell = next(cell for cell in planned(more, seed=0, d_in=24, stored=2000) if cell.rows == 2560)
    begun = job.config(640, 0).steps_held / job.config(2560, 0).steps
    assert float(lines[cell.cell][4]) == pytest.approx(1e-6 * cell.flops * (1 - begun), abs=0.5)
    assert lines["3"][:6] == ["3", "of", "them", "are", "done;", "left:"]
    again = {line.split()[0]: line.split() for line in go(dataclasses.replace(more, suites=("probing",)))}
    assert again[SHORT][4] == "0"  # to be measured only
    gone = dataclasses.replace(more, rows=(640,), keep_states=False, keep_models=False, dry_run=False)
    go(gone)
    short = next(cell for cell in planned(gone, seed=0, d_in=24, stored=2000) if cell.rows == 640)
    lines = {line.split()[0]: line.split() for line in go(dataclasses.replace(gone, suites=("probing",), dry_run=True))}
    assert float(lines[SHORT][4]) == pytest.approx(1e-6 * short.flops, abs=0.5)  # its model was deleted


def test_parts_of_an_array_and_processes_side_by_side_make_the_same_cells(run, work, tmp_path):
    job, _ = run
    out = tmp_path / "out"
    parts = [dataclasses.replace(job, out=out, sae_latents=(), suites=(), shard=(i, 2), jobs=1 + i) for i in range(2)]
    first, second = map(go, parts)
    assert "of 6 cells are done" in first[-1]
    assert "all 6 cells are done" in second[-2]
    assert same(out / "cells" / SHORT / "model", job.out / "cells" / SHORT / "model")
    one, other = (
        read_cells(folder).drop(columns="seconds").set_index("cell").sort_index() for folder in (out, job.out)
    )
    assert one.equals(other.loc[one.index])


def test_a_dry_run_tells_the_cost_and_writes_nothing(work, tmp_path):
    job = settings(work, tmp_path / "out", dry_run=True)
    said = go(job)
    assert not job.out.exists()
    assert {line.split()[0] for line in said} >= set(NAMES)
    # held for 0.6 of what follows the rise: a smaller budget adds its last 0.4
    ladder = next(line for line in said if "ladder" in line)
    parts = float(ladder.split("costs ")[1].split()[0])
    assert 1 + 0.3 * (640 + 1280) / 2560 < parts < 1 + 0.42 * (640 + 1280) / 2560
    assert f"{(640 + 1280 + 2560) / 2560:.2f}" in ladder


def test_a_cell_is_the_prior_that_its_settings_train(run, work):
    job, _ = run
    store = ActivationStore.open(work / "train")
    glp = gl.GLP.fit(store, job.config(640, 0), d_model=12, d_mlp=18, n_layers=2)
    saved = gl.load(job.out / "cells" / SHORT / "model")
    assert torch.equal(glp.sample(3, noise=torch.ones(3, 24)), saved.sample(3, noise=torch.ones(3, 24)))


def test_a_smaller_budget_is_not_trained_with_another_warmup_unasked(work, tmp_path):
    job = settings(work, tmp_path / "out", warmup_rows=None, suites=("none",), **FEW)
    go(job)
    smaller = dataclasses.replace(job, rows=(320, 640))
    with pytest.raises(InputError, match=r"rise over 64 rows, and here over 32.*--warmup-rows 64"):
        go(smaller)
    said = go(dataclasses.replace(smaller, warmup_rows=64))
    assert not any("left out" in line for line in said)
    assert {"glp-w12x2-r320-s0", SHORT} <= set(read_cells(job.out).cell)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": (32,)}, "at least one whole batch: rows=32, batch_size=64"),
        ({"rows": (640, 640)}, "must differ"),
        ({"warmup_rows": 640}, "less than the smallest of rows"),
        ({"glp_seeds": (1, 2)}, "one for each of 1 widths"),
        ({"shapes": ("12x1", "30x2"), "glp_seeds": (1, 2, 3)}, "one for each of 2 shapes"),
        ({"shapes": ("12", "30x2")}, "pairs of width and blocks, such as 768x3, got '12'"),
        ({"shapes": ("12x1", "12x1")}, "must differ"),
        ({"sae_k": 41}, "at most the smallest of sae_latents"),
        ({"suites": ("speed",)}, "suites must be some of density"),
        ({"ray": 2, "jobs": 2}, "--ray splits the work itself"),
        ({"most_flops": 10.0}, "no training of a GLP takes at most"),
        ({"pca_ranks": (25,)}, "at most 24"),
    ],
)
def test_grids_that_cannot_be_made_are_refused_at_once(work, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        go(settings(work, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_shapes_are_trained_in_place_of_widths_with_layers(work, tmp_path):
    job = settings(work, tmp_path, shapes=("12x1", "30x2"), glp_seeds=(2, 1), most_flops=5e12)
    cells = [cell for cell in planned(job, seed=3, d_in=24, stored=2000) if cell.kind == "glp"]
    assert {(cell.d_model, cell.n_layers, cell.seed) for cell in cells} == {(12, 1, 3), (12, 1, 4), (30, 2, 3)}
    assert len(cells) == 3 * len(GRID["rows"])


def test_a_dry_run_refuses_what_the_run_would(work, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        go(settings(work, tmp_path / "out", dry_run=True, heldout=work / "nowhere"))


def test_a_denoiser_narrower_than_the_activations_is_told_once_before_it_is_trained(run, work, tmp_path):
    assert sum("a denoiser of width 12 cannot" in line for line in run[1]) == 1
    said = go(settings(work, tmp_path, dry_run=True, sae_latents=()))
    notes = [line for line in said if line.startswith("note:")]
    assert len(notes) == 1
    assert "width 12" in notes[0]
    assert "24 dimensions" in notes[0]
    assert "0.50 above" in notes[0]


def test_training_rows_are_no_held_out_rows(work, tmp_path):
    with pytest.raises(InputError, match="is the training store"):
        go(settings(work, tmp_path / "out", heldout=work / "train"))


def test_a_cell_at_work_elsewhere_is_not_touched_and_the_others_are_made(work, tmp_path):
    job = settings(work, tmp_path / "out", sae_latents=())
    with (
        locked(job.out / "trunks" / "glp-w12x2-s0"),
        pytest.raises(InputError, match="another process is at work on glp-w12x2-s0 in"),
    ):
        go(job)
    assert set(read_cells(job.out).cell) == {"gaussian", "raw", "pca-5"}


def test_what_is_done_needs_nothing_of_a_process_at_work_beside_it(run, tmp_path):
    job, _ = run
    out = tmp_path / "out"
    shutil.copytree(job.out, out)
    with locked(out / "trunks" / "glp-w12x2-s0"), locked(out / "trunks" / "gaussian"):
        said = go(dataclasses.replace(job, out=out, keep_models=False, **FEW))
    assert "all 3 cells are done" in said[-2]
    assert (out / "cells" / SHORT / "model").exists()  # which the other may need


def test_a_prior_that_processes_trained_together_is_not_trained_again(work, tmp_path, monkeypatch):
    job = settings(work, tmp_path / "out", **FEW)
    fitted, real = [], training.train_cell
    monkeypatch.setattr(training, "train_cell", lambda cell, *args, **options: (
        fitted.append(cell.cell), real(cell, *args, **options)))  # fmt: skip
    together = Run(job)
    together.train_together(together.units)
    go(job)
    assert sorted(fitted) == ["gaussian", SHORT, "raw"]
