"""Cells of a scaling run that several machines make: Ray actors, and the processes of torchrun."""

import shlex
import subprocess
import sys

import pytest
import torch

import glp_lens as gl
from glp_lens.activations import write_store
from glp_lens.errors import InputError
from glp_lens.pipeline import ScaleJob, scale
from glp_lens.scaling.cells import read_cells
from tests.unit.toy_training import D, rows

NAME = "glp-w12x2-r640-s0"
LINE = "scale --store acts --heldout heldout --widths 12 --layers 2 --rows 320,640 --glp-batch 64 --keep-models"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A training and a held-out store, of Gaussian rows."""
    folder = tmp_path_factory.mktemp("work")
    for name, n, seed in (("acts", 900, 0), ("heldout", 150, 1)):
        write_store(folder / name, rows(n, seed), hook="blocks.1.hook_resid_post")
    return folder


def job(work, out, **changes):
    """The settings of `LINE`, without suites."""
    return ScaleJob(
        store=work / "acts", heldout=work / "heldout", widths=(12,), layers=(2,), rows=(320, 640), glp_batch=64,
        keep_models=True, suites=(), out=out, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(work):
    """What one process makes."""
    return scale(job(work, work / "alone"), say=lambda _: None)


def weights(out):
    return gl.load(out / "cells" / NAME / "model").denoiser.state_dict()


def test_ray_actors_make_the_cells_of_one_process(work, alone, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        said = []
        scale(job(work, tmp_path / "out", ray=2), say=said.append)
        with pytest.raises(InputError, match=r"other settings .*glp_lr None -> 0.001"):
            scale(job(work, tmp_path / "out", ray=1, glp_lr=1e-3), say=said.append)
    finally:
        ray.shutdown()
    assert any("all 4 cells are done" in line for line in said)
    own, expected = weights(tmp_path / "out"), weights(alone)
    assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_torchrun_trains_each_prior_on_all_its_processes(work, alone):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    (work / "grid.yaml").write_text("suites: []\n")
    line = f"glp_lens_cli {LINE} --config grid.yaml --out together"
    done = subprocess.run([*start, *shlex.split(line)], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all 4 cells are done" in done.stdout
    own, expected = weights(work / "together"), weights(alone)
    assert all(torch.allclose(own[name], expected[name], atol=1e-3) for name in expected)  # sums of bfloat16 products
    one, other = (read_cells(out).set_index("cell").loss for out in (work / "together", alone))
    assert one[NAME] == pytest.approx(other[NAME], rel=1e-3)
    assert one["glp-w12x2-r320-s0"] == pytest.approx(other["glp-w12x2-r320-s0"], rel=1e-3)
    assert gl.load(alone / "cells" / NAME / "model").d_in == D
