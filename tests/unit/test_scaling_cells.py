"""The tables of a scaling run."""

import pandas as pd
import pytest

from glp_lens.errors import InputError
from glp_lens.scaling.cells import Cell, read_cells, read_utilities, write_cells, write_utilities

PRIOR = Cell("glp-w24x2-r300-s1", "glp", 1234, 300, 0.5, 2.5e9, 1.5, d_model=24, d_mlp=48, n_layers=2, seed=1,
             trunk="glp-w24x2-s1", loss=1.25, bands={"0.0-0.1": 1.9, "0.9-1.0": 0.8})  # fmt: skip
PCA = Cell("pca-8", "pca", 80, 600, 1.0, 0.0, 0.1, rank=8)


def test_a_cell_comes_back_from_its_folder(tmp_path):
    PRIOR.save(tmp_path / PRIOR.cell)
    assert Cell.load(tmp_path / PRIOR.cell) == PRIOR
    (tmp_path / PRIOR.cell).rename(tmp_path / "glp-w24x2-r300-s2")
    with pytest.raises(InputError, match="cell of a scaling run of glp-w24x2-r300-s1, expected glp-w24x2-r300-s2"):
        Cell.load(tmp_path / "glp-w24x2-r300-s2")


def test_what_a_cell_lacks_is_nan_or_empty(tmp_path):
    write_cells(tmp_path, [PRIOR, PCA])
    frame = read_cells(tmp_path).set_index("cell")
    assert frame.loc["pca-8", ["d_model", "loss", "loss:sigma=0.0-0.1", "seed"]].isna().all()
    assert frame.loc["pca-8", "trunk"] == ""
    assert frame.loc[PRIOR.cell, ["rank", "latents"]].isna().all()
    assert frame.loc[PRIOR.cell, ["loss", "loss:sigma=0.9-1.0", "d_mlp"]].tolist() == [1.25, 0.8, 48]
    write_cells(tmp_path, [])
    assert len(read_cells(tmp_path)) == 0


def test_one_table_is_not_read_as_the_other(tmp_path):
    row = {"cell": "pca-8", "suite": "density", "task": "all", "setting": "", "metric": "flow_loss", "value": 1.2,
           "ci_low": 1.1, "ci_high": 1.3, "n": 40}  # fmt: skip
    write_utilities(tmp_path, pd.DataFrame([row]))
    assert read_utilities(tmp_path).to_dict("records") == [row]
    (tmp_path / "utilities.parquet").rename(tmp_path / "cells.parquet")
    with pytest.raises(InputError, match="holds what another file is for"):
        read_cells(tmp_path)
