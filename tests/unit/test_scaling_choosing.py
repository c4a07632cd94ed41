"""Which prior a scaling run says to train, against runs whose law of loss is known."""

from dataclasses import replace

import pytest

from glp_lens.errors import InputError
from glp_lens.pipeline import ChooseJob, choose
from glp_lens.scaling import choosing
from glp_lens.scaling.cells import Cell, read_cells, write_cells

SIZES = {192: 1_000_000, 384: 4_000_000, 768: 16_000_000}
BUDGETS = (100_000, 200_000, 400_000, 800_000, 1_600_000)
STORED, SPEED, BOUND = 800_000, 2e11, 1.43


def law(parameters, rows):
    """Loss of a size after so many rows, as Hoffmann et al. 2022 have it."""
    return 0.9 + 40 * parameters**-0.4 + 15 * rows**-0.3


@pytest.fixture
def cells():
    made = [Cell("gaussian", "gaussian", 9, STORED, 1.0, 1.0, 1.0, loss=BOUND)]
    for width, parameters in SIZES.items():
        for seed in range(2):
            for rows in BUDGETS:
                flops = 6.0 * parameters * rows
                noise = 1 + (-1) ** seed * 1e-3
                made.append(
                    Cell(
                        f"glp-w{width}x3-r{rows}-s{seed}", "glp", parameters, rows, rows / STORED, flops, flops / SPEED,
                        d_model=width, d_mlp=2 * width, n_layers=3, seed=seed, trunk=f"glp-w{width}x3-s{seed}",
                        loss=noise * law(parameters, rows),
                    )
                )  # fmt: skip
    return made


@pytest.fixture
def table(cells, tmp_path):
    write_cells(tmp_path, cells)
    return read_cells(tmp_path)


@pytest.mark.parametrize("minutes", [0.5, 2, 8, 60])
def test_the_best_size_for_the_time_comes_first_with_the_loss_that_it_has(table, minutes):
    found = choosing.choose(table, rows=STORED, minutes=minutes)
    flops = 60 * minutes * SPEED
    possible = {
        width: law(n, min(flops / (6 * n), 2 * STORED)) for width, n in SIZES.items() if flops / (6 * n) >= min(BUDGETS)
    }
    assert [each.d_model for each in found] == sorted(possible, key=possible.get)
    for each in found:
        true = possible[each.d_model]
        assert each.loss.value == pytest.approx(true, rel=2e-3)
        assert each.loss.ci_low < true < each.loss.ci_high
        assert each.below.value == pytest.approx(100 * (1 - true / BOUND), abs=0.3)
        assert each.below.ci_low < each.below.value < each.below.ci_high
        assert each.seconds <= 60 * minutes * (1 + 1e-6)
        assert each.passes <= 2


def test_little_time_is_for_a_small_prior_and_much_for_a_large_one(table):
    short, long = (choosing.choose(table, rows=STORED, minutes=minutes)[0] for minutes in (0.5, 200))
    assert short.d_model < long.d_model
    assert long.d_model == max(SIZES)


def test_no_more_passes_than_were_measured(table):
    for each in choosing.choose(table, rows=50_000, minutes=1000):
        assert each.rows == 100_000
    with pytest.raises(InputError, match="no size of this run can be judged"):
        choosing.choose(table, rows=49_000)


def test_beyond_the_rows_of_the_run_is_said_to_be_extrapolated(table):
    for each in choosing.choose(table, rows=4 * STORED):
        assert each.reach == pytest.approx(4)
        assert law(SIZES[each.d_model], 8 * STORED) == pytest.approx(each.loss.value, rel=0.02)


def test_other_speeds_and_widths_change_rows_and_shapes(table):
    usual, fast = (choosing.choose(table, rows=10**9, minutes=1, flops_per_second=s) for s in (SPEED, 4 * SPEED))
    rows = {each.d_model: each.rows for each in usual}
    assert all(each.rows == pytest.approx(4 * rows[each.d_model], abs=4) for each in fast if each.d_model in rows)
    wide = choosing.choose(table, rows=10**9, minutes=1, width_ratio=2)
    assert {each.d_model for each in wide} <= {2 * width for width in SIZES}
    assert all(each.rows == pytest.approx(rows[each.d_model // 2] / 4, abs=1) for each in wide)
    assert {each.d_mlp / each.d_model for each in wide} == {2}


def test_the_job_tells_a_command_to_run(cells, tmp_path):
    write_cells(tmp_path, cells)
    said = []
    found = choose(ChooseJob(run=tmp_path, rows=STORED, minutes=2), say=said.append)
    assert len(said) == len(found) + 1
    assert said[-1].startswith(
        f"glp-lens train glp --width {found[0].d_model} --mlp {found[0].d_mlp} --layers 3 --rows "
    )
    assert "per cent below the best Gaussian: " in said[0]


def test_of_one_training_of_a_size_there_is_no_interval(cells, tmp_path):
    write_cells(tmp_path, [cell for cell in cells if cell.seed != 1])
    said = []
    choose(ChooseJob(run=tmp_path, rows=STORED, minutes=2), say=said.append)
    assert all("[" not in line and " ," not in line for line in said)
    assert all("(no interval, trained once)" in line for line in said[:-1])


def test_runs_of_few_budgets_and_folders_without_a_run_are_refused(cells, tmp_path):
    write_cells(tmp_path, [cell for cell in cells if cell.rows in BUDGETS[:3]])
    with pytest.raises(InputError, match="at least 4 budgets"):
        choose(ChooseJob(run=tmp_path, rows=STORED))
    write_cells(tmp_path, [replace(cell, loss=None) for cell in cells])
    with pytest.raises(InputError, match="no size of this run can be judged"):
        choose(ChooseJob(run=tmp_path, rows=STORED))
    with pytest.raises(InputError):
        choose(ChooseJob(run=tmp_path / "none", rows=STORED))
