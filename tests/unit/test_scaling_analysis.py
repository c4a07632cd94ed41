"""What is read off the tables of a scaling run, where the laws behind them are known."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from glp_lens.errors import InputError
from glp_lens.evals.results import Results, Setting, structured_frame
from glp_lens.scaling import plots
from glp_lens.scaling.analysis import FILE_NAME, analyse, analysis
from glp_lens.scaling.cells import read_cells, read_utilities, write_cells, write_utilities
from glp_lens.scaling.utilities import utility_table
from tests.unit import scaling_tables as tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scaling")
    tables.write(folder)
    analyse(folder, say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return structured_frame(Results.load(folder, FILE_NAME).metrics)


def one(frame, metric, **where):
    chosen = frame[frame.metric == metric]
    for column, value in where.items():
        chosen = chosen[chosen[column] == value]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_the_frontiers_law_is_that_of_the_best_size_for_each_budget_of_compute(found):
    """Of `E + A / N^a + B / D^b` with C = 6 N D the least loss is `E + K C^-(ab / (a + b))` (Hoffmann et al. 2022)."""
    setting = Setting(cells="frontier", floor="fitted")
    a, b = tables.SIZE_POWER, tables.ROWS_POWER
    exponent, floor = (one(found, metric, setting=setting) for metric in ("exponent", "floor"))
    assert exponent.value == pytest.approx(a * b / (a + b), rel=0.07)  # four sizes are no continuum
    assert floor.value == pytest.approx(tables.FLOOR, rel=0.03)
    assert exponent.ci_low < exponent.value < exponent.ci_high
    size = one(found, "exponent", setting=Setting(cells="w384x3", floor="fitted"))
    assert size.ci_low <= b <= size.ci_high


def test_no_irreducible_loss_is_told_of_less_than_two_powers_of_ten(found, folder):
    told = {row.setting.get("cells") for row in found[found.metric == "floor"].itertuples()}
    assert told == {"frontier"}  # budgets of one size span 1.9
    failures = Results.load(folder, FILE_NAME).failures
    assert sum("no irreducible loss is claimed, its cells span 1.9 powers of ten" in line for line in failures) == 4
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "w384x3: no irreducible loss is claimed" in page


def test_losses_stand_beside_the_gaussian_bound(found):
    rows = found[found.metric == "below_bound_percent"]
    own = next(r for r in rows.itertuples() if (r.setting.get("size"), r.setting.get("rows")) == ("w1152x3", "8000000"))
    best = tables.loss_of(36_000_000, 8_000_000)
    assert own.value == pytest.approx(100 * (1 - best / tables.BOUND), abs=0.5)
    assert one(found, "loss", model="gaussian").value == tables.BOUND
    assert 0.001 < one(found, "loss_seed_sd").value < 0.004  # of the table: 0.0015 and 0.001 of a loss of about 1.2


@pytest.mark.parametrize("held", ["largest", "size"])
def test_the_largest_cell_is_foretold_without_it(found, held):
    setting = Setting(cells="frontier", held=held)
    foretold, measured = (one(found, metric, setting=setting) for metric in ("loss_predicted", "loss_measured"))
    assert measured.value == pytest.approx(tables.loss_of(36_000_000, 8_000_000), rel=0.005)
    assert foretold.ci_low < measured.value < foretold.ci_high
    assert one(found, "within", setting=setting).value == 1
    assert 0.3 < one(found, "decades_beyond", setting=setting).value < 0.5


def test_no_irreducible_loss_is_told_without_an_interval(tmp_path):
    widths = {width: tables.WIDTHS[width] for width in (384, 768)}
    made = tables.cells(np.random.default_rng(0), widths, (50_000, 300_000, 1_000_000, 3_000_000, 8_000_000))
    made = [cell for cell in made if cell.d_model != 768 or cell.seed == 0]
    write_cells(tmp_path, made)
    write_utilities(tmp_path, tables.utilities(made, np.random.default_rng(0)))
    results = analyse(tmp_path, say=lambda line: None)
    frame = structured_frame(results.metrics)
    assert frame[frame.metric == "decades"].value.min() > 2
    floors = frame[frame.metric == "floor"]
    assert [row.setting.get("cells") for row in floors.itertuples()] == ["w384x3"]
    assert np.isfinite(floors.ci_low).all()
    told = [line for line in results.failures if "no irreducible loss is claimed" in line]
    assert told == [
        "frontier: no irreducible loss is claimed, fewer than 3 sizes tell nothing of how sure it is",
        "w768x3: no irreducible loss is claimed, one training tells nothing of how sure it is",
    ]


def test_hours_are_those_of_the_speed_that_was_measured(found):
    expected = one(found, "loss_expected", setting=Setting(cells="frontier", hours=10.0))
    compute = 4e10 * 36_000  # the tables' FLOPs a second
    sizes = np.geomspace(1e5, 1e9, 400)
    assert expected.value == pytest.approx(min(tables.loss_of(n, compute / 6 / n) for n in sizes), rel=0.01)


def test_utilities_are_correlated_with_loss_and_beyond_compute(found):
    against = one(found, "spearman", model="glp", task="auc", setting=Setting(against="loss"))
    given = one(found, "spearman", model="glp", task="auc", setting=Setting(against="loss", given="flops"))
    assert -1 < against.value < -0.9
    assert against.value < given.value < -0.3  # the AUC was made of the loss alone
    assert given.ci_low < given.value < given.ci_high < 0
    assert against.n == 4  # sizes, of 50 priors
    assert one(found, "spearman", model="glp", task="delta_nll", setting=Setting(against="loss")).value > 0.99


def test_leads_are_over_the_best_that_costs_no_more(found):
    leads = found[(found.metric == "lead") & (found.task == "auc") & (found.other == "sae")]
    rows = {(r.setting.get("size"), r.setting.get("rows")): r for r in leads.itertuples()}
    first, last = rows["w192x3", "100000"], rows["w1152x3", "8000000"]
    assert first.setting.get("cell") == "sae-1152-r100000-s0"  # none costs as little: the cheapest
    assert last.setting.get("cell").startswith("sae-4608")
    assert first.ci_high < 0 < last.ci_low
    start = one(found, "leads_from", task="auc", other="sae").value
    compute = {str(r.setting.without("parameters")): r.value for r in found[found.metric == "flops"].itertuples()}
    assert start in [compute[f"size={s};rows={n}"] for (s, n), row in rows.items() if row.ci_low > 0]
    assert start > max(compute[f"size={s};rows={n}"] for (s, n), row in rows.items() if row.ci_low <= 0)
    delta = found[(found.metric == "lead") & (found.task == "delta_nll") & (found.other == "pca")]
    assert max(delta.value) > 0  # less is better, so a lead is a smaller loss
    assert math.isnan(one(found, "leads_from", task="delta_nll", other="pca").value)  # it has no interval


def test_a_lead_is_judged_by_the_differences_on_each_task(folder):
    """Tasks differ in difficulty by far more than the models do, and tasks of one family count as one."""
    rng, cells, measured = np.random.default_rng(1), read_cells(folder), read_utilities(folder)
    names = [f"mine-{i}" for i in range(9)] + ["162_agnews_1", "163_agnews_2", "164_agnews_3"]
    hard = rng.uniform(0.55, 0.95, len(names))
    by_cell = {
        cell: hard + (0.02 if cell.startswith("glp") else 0.0) + 0.01 * rng.normal(size=len(names))
        for cell in cells.cell[cells.kind.isin(["glp", "sae"])]
    }
    rows = measured[(measured.setting == "split=dedup;mode=all") & measured.cell.isin(by_cell)]
    rows = rows.drop_duplicates("cell")
    single = [rows.assign(task=name, value=[by_cell[cell][i] for cell in rows.cell]) for i, name in enumerate(names)]
    spread = 1.96 * hard.std(ddof=1) / math.sqrt(len(hard))
    means = rows.cell.map(lambda cell: by_cell[cell].mean())
    mean = rows.assign(task="all", value=means, ci_low=means - spread, ci_high=means + spread)
    results = analysis(cells, pd.concat([mean, *single])).results
    frame = structured_frame(results.metrics)
    leads = frame[(frame.metric == "lead") & (frame.other == "sae")]
    lead = next(r for r in leads.itertuples() if r.setting.get("rows") == "8000000" and "1152" in r.setting.get("size"))
    seeds = np.array([by_cell[f"glp-w1152x3-r8000000-s{seed}"] for seed in (0, 1)])
    gaps = seeds.mean(0) - by_cell[lead.setting.get("cell")]
    families = np.array([*gaps[:9], gaps[9:].mean()])
    error = math.hypot(families.std(ddof=1) / math.sqrt(10), seeds.mean(1).std(ddof=1) / math.sqrt(2))
    assert lead.n == 10
    assert lead.value == pytest.approx(gaps.mean())
    assert lead.ci_high - lead.ci_low == pytest.approx(2 * 2.262 * error, rel=0.25)  # Student's, 9 degrees
    assert lead.ci_low > 0 > lead.value - spread  # by the two intervals it would not be clear


def test_which_numbers_stand_for_a_cell(folder):
    cells, measured = read_cells(folder), read_utilities(folder)
    table, shown = utility_table(cells, measured)
    assert [u.name for u in shown] == ["auc", "auc_equal", "steering_area", "delta_nll"]
    assert "576 features" in shown[1].title  # what PCA and raw activations have too
    assert not table.duplicated(["cell", "utility"]).any()

    def raw(cell, setting, metric="auc"):
        rows = measured[(measured.cell == cell) & (measured.setting == setting) & (measured.metric == metric)]
        return rows[rows.task == "all"].value.item()

    def of(cell, utility):
        return table[(table.cell == cell) & (table.utility == utility)].value.item()

    cell = "glp-w384x3-r300000-s1"
    assert of(cell, "auc") == raw(cell, "split=dedup;mode=all")
    assert of(cell, "auc_equal") == raw(cell, "split=dedup;mode=equal;features=576")
    repaired = "sigma=0.6;repair=difference;entry=difference"
    assert of(cell, "steering_area") == raw(cell, repaired, "pareto_area")
    loss = cells[cells.cell == cell].loss.item()
    assert of(cell, "delta_nll") == pytest.approx(1.2 * 0.2 * (loss / 1.1) ** 3)  # made proportional to FVU
    assert table[(table.kind == "sae") & (table.utility == "delta_nll")].value.tolist() == pytest.approx([0.32] * 6)
    assert table[(table.kind == "pca") & (table.utility == "delta_nll")].value.tolist() == pytest.approx([0.4])


def test_a_control_beside_a_model_is_never_taken_for_it(folder):
    measured = read_utilities(folder)
    controls = measured[measured.setting.str.contains("entry=plain|ablation")]
    assert len(controls)
    table, shown = utility_table(read_cells(folder), controls)
    assert table.empty
    assert shown == []


@pytest.mark.parametrize("picture", [plots.overview, plots.by_compute])
def test_titles_of_panels_end_where_their_panel_ends(folder, monkeypatch, picture):
    """Whichever panel a utility is in: each is put last in a row once."""
    whole = analysis(read_cells(folder), read_utilities(folder))
    drawn = []

    def keep(name, caption, size, draw):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.draw_without_rendering()
        drawn.append(figure)

    monkeypatch.setattr(plots, "render", keep)
    for shift in range(3):
        shown = [*whole.shown[shift:], *whole.shown[:shift]]
        picture(dataclasses.replace(whole, shown=shown))
    assert len(drawn) == 3
    for figure in drawn:
        axes = [a for part in (figure, *figure.subfigs) for a in part.axes if a.get_title(loc="left") or a.get_title()]
        assert len(axes) >= len(whole.shown)
        for own in axes:
            text = own._left_title if own.get_title(loc="left") else own.title
            box = text.get_window_extent()
            assert box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other.get_window_extent()) for other in axes if other is not own)


def test_pictures_and_page_are_written_and_numbers_are_in_both_files(folder):
    assert (folder / "plots" / "scaling.png").stat().st_size > 30_000
    assert (folder / "plots" / "scaling_compute.png").exists()
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "could not be drawn" not in page
    assert "exact Gaussian bound" in page
    assert "GLP beats SAE in 1-D probing, AUC of all features" in page
    assert "Each model was trained once" not in page
    # Every lead of the priors of most compute is judged, also those that are not clear from any compute on.
    leads = structured_frame(Results.load(folder, FILE_NAME).metrics)
    leads = leads[leads.metric == "lead"]
    largest = [each.get("size") == "w1152x3" and each.get("rows") == "8000000" for each in leads.setting]
    assert page.count("the best that costs no more, difference") == sum(largest) > 2
    results = Results.load(folder, FILE_NAME)
    table = pd.read_csv(folder / "metrics.csv", keep_default_na=False)
    assert len(table) == len(results.metrics)
    curve = results.extras["curves"]["frontier"]
    assert len(curve["flops"]) == len(curve["loss"]) == len(curve["new_high"])
    assert all(low < value < high for low, value, high in zip(curve["low"], curve["loss"], curve["high"], strict=True))


def test_a_run_that_has_just_begun_has_a_page_too(tmp_path):
    made = [
        cell for cell in tables.cells(np.random.default_rng(0)) if cell.rows in (100_000, 300_000) and cell.seed == 0
    ]
    write_cells(tmp_path, made)
    write_utilities(tmp_path, tables.utilities([], np.random.default_rng(0)))
    results = analyse(tmp_path, say=lambda line: None)
    assert "w192x3: no fit, it has 2 amounts of compute and needs 4" in results.failures
    assert (tmp_path / "report.html").exists()
    assert not any(metric.metric == "spearman" for metric in results.metrics)


def test_one_trunk_alone_has_no_intervals_and_what_costs_more_is_not_said_to_cost_less(tmp_path):
    names = {"sae-4608-r8000000-s0", "pca-576"}
    made = [c for c in tables.cells(np.random.default_rng(0)) if c.trunk == "glp-w384x3-s0" or c.cell in names]
    write_cells(tmp_path, made)
    write_utilities(tmp_path, tables.utilities(made, np.random.default_rng(0)))
    found = analyse(tmp_path, say=lambda line: None)
    exponents = [metric for metric in found.metrics if metric.metric == "exponent"]
    assert exponents
    assert all(np.isnan(metric.ci_low) and metric.n == 1 for metric in exponents)
    names = {metric.metric for metric in found.metrics}
    assert "below_bound_percent" not in names  # no Gaussian
    assert "loss_predicted" in names
    assert "within" not in names  # an interval that is not there holds nothing, and misses nothing
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "train more seeds" in page
    assert ">no</" not in page  # nor does the table say so
    assert "against sae-4608-r8000000-s0, the cheapest, which costs more, difference" in page
    assert "against pca-576, the best that costs no more, difference" in page


def test_a_training_that_lost_some_noise_levels_is_told(tmp_path):
    made = tables.cells(np.random.default_rng(0))
    odd = next(cell.cell for cell in reversed(made) if cell.cell.startswith("glp-w192x3-r"))
    made = [
        dataclasses.replace(
            cell, bands={"0.0-0.1": 1.2 + 0.009 * cell.seed, "0.1-0.2": 1.43 if cell.cell == odd else 1.3}
        )
        if cell.kind == "glp"
        else cell
        for cell in made
    ]
    write_cells(tmp_path, made)
    write_utilities(tmp_path, tables.utilities(made, np.random.default_rng(0)))
    told = [line for line in analyse(tmp_path, say=lambda line: None).failures if "noise levels" in line]
    assert len(told) == 1
    assert told[0].startswith(f"{odd}: its loss at noise levels 0.1-0.2 is 1.430, that of another seed 1.300")


def test_a_run_without_losses_is_refused_in_one_line(tmp_path):
    made = [cell for cell in tables.cells(np.random.default_rng(0)) if cell.kind != "glp"]
    write_cells(tmp_path, made)
    write_utilities(tmp_path, tables.utilities(made, np.random.default_rng(0)))
    with pytest.raises(InputError, match="no prior of this scaling run has a loss yet"):
        analyse(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        analyse(tmp_path / "nothing")
