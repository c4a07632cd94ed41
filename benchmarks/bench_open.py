"""Opening models and results, digests checked, against the same files without a digest, as earlier versions wrote."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from by_row import random_prior
from conftest import OURS, Sized, turns
from safetensors.torch import load_file, save_file

from glp_lens import models
from glp_lens.evals.results import Results
from glp_lens.files import ENTRY
from glp_lens.models.pca import PCA

UNCHECKED = "without a digest"


def prior(folder: Path) -> None:
    random_prior(576, 6).save_pretrained(folder)


def pca(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2048, 2048, generator=generator)).Q
    one = torch.ones(2048)
    PCA(one, one, basis, one, discarded_variance=0.0, k=512).save_pretrained(folder)


def results(folder: Path) -> None:
    made = Results("probing", extras={"curves": [[i / 7 for i in range(50)] for _ in range(400)]})
    for i in range(5000):
        made.add("glp", f"task {i}", f"split=dedup;k={i % 9}", "auc", i / 5000, ci_low=0.1, ci_high=0.9, n=12)
    made.save(folder)


WORK: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], str, Callable[[Any], Any]]] = {
    "open a GLP, d = 576, 6 blocks": (prior, models.load, "config.json", lambda m: m.fingerprint()),
    "open a PCA, d = 2048": (pca, models.load, "config.json", lambda m: m.fingerprint()),
    "open results, 5000 metrics": (results, Results.load, "results.json", lambda r: len(r.metrics)),
}


@pytest.mark.parametrize("work", WORK)
def test_open(work: str, tmp_path: Path, sized: Sized) -> None:
    write, read, name, about = WORK[work]
    write(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    value = json.loads((tmp_path / "old" / name).read_text())
    (tmp_path / "old" / name).write_text(
        json.dumps({key: each for key, each in value.items() if key not in (ENTRY, "weights")}, indent=2)
    )
    if (weights := tmp_path / "old" / "model.safetensors").exists():
        save_file(load_file(tmp_path / "new" / weights.name), weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ways = {OURS: lambda: read(tmp_path / "new"), UNCHECKED: lambda: read(tmp_path / "old")}
        seconds, opened = turns(ways, rounds=9)
    assert about(opened[OURS]) == about(opened[UNCHECKED])
    for way, each in seconds.items():
        sized(work, way, 1 / each, "times/s")
