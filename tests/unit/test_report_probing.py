"""The probing section: every part that has results, readable at 113 tasks, and the table for the terminal."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from glp_lens.display.labels import PAPER, Palette
from glp_lens.display.plots import render
from glp_lens.evals.probing import page
from glp_lens.evals.results import Results, metrics_frame, structured_frame
from glp_lens.report import write_report
from tests.unit.probing_results import EVIL, probing_results

SIGMAS = (0.1, 0.05, 0.3)
TASKS = [f"{i}_{'a_long_name_of_a_task_' * (i % 2)}{i % 40}" for i in range(113)]
FAMILIES = [f"family {i % 40}" for i in range(113)]


def section(results, focus="glp"):
    frame = structured_frame(results.metrics)
    return page.section([results], frame, Palette(frame.model), focus)


def words(svg):
    """The texts of a drawing, in its order."""
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def text_of(table):
    return [[cell.text for cell in row] for row in table.rows]


def named(tables, start):
    (found,) = [table for table in tables if table.caption.startswith(start)]
    return found


@pytest.fixture(scope="module")
def full():
    return section(probing_results(TASKS, FAMILIES, sigmas=SIGMAS, sparse=True))


@pytest.fixture(scope="module")
def parts(full):
    return {part.title: part for part in full.parts}


@pytest.fixture(scope="module")
def plots(full):
    return {plot.name: plot for plot in full.all_plots}


def test_a_full_run_has_every_part_and_plot(parts, plots):
    assert list(parts) == [
        "Task by task",
        "Which noise level and which block of the denoiser read best?",
        "Is it the number of features?",
        "Several features at once",
        "What the best features are",
    ]
    assert list(plots) == [
        f"probing_{name}" for name in ("means", "heat", "tasks", "sweeps", "features", "sparse", "sparse_difference")
    ]
    assert all(plot.png.startswith(b"\x89PNG") and plot.caption for plot in plots.values())


@pytest.mark.parametrize("name", ["probing_heat", "probing_tasks"])
def test_all_113_tasks_are_named_once_and_tell_apart(plots, name):
    numbers = [word.split("_")[0] for word in words(plots[name].svg) if re.match(r"\d+_", word)]
    assert sorted(map(int, numbers)) == list(range(113))
    assert plots[name].wide


def test_the_heat_map_prints_what_was_measured():
    results = probing_results(["1_one", "2_two"], ["a", "b"], models=("glp", "raw"))
    results.metrics = [m for m in results.metrics if (m.task, m.model) != ("1_one", "raw") and m.model != "dense"]
    plot = next(p for p in section(results).all_plots if p.name == "probing_heat")
    frame = metrics_frame(results.metrics)
    frame = frame[(frame.setting == "split=dedup;mode=paper") & (frame.metric == "auc") & (frame.task != "all")]
    shown = [word for word in words(plot.svg) if re.fullmatch(r"\.\d\d", word)]
    assert sorted(shown) == sorted(f"{value:.2f}"[1:] for value in frame.value)
    assert len(shown) == 3  # of four, one was not measured


def test_tasks_are_sorted_by_the_model_in_focus():
    results = probing_results(TASKS[:9], FAMILIES[:9], models=("glp", "sae"))
    frame = metrics_frame(results.metrics)
    frame = frame[(frame.setting == "split=dedup;mode=paper") & (frame.metric == "auc") & (frame.task != "all")]
    for focus in ("glp", "sae"):
        plot = next(p for p in section(results, focus).all_plots if p.name == "probing_tasks")
        order = [int(word.split("_")[0]) for word in words(plot.svg) if re.match(r"\d+_", word)]
        best_first = frame[frame.model == focus].sort_values("value", ascending=False).task
        assert order == [int(task.split("_")[0]) for task in best_first]


def test_a_small_run_has_only_the_parts_that_were_measured():
    small = section(probing_results(TASKS[:3], FAMILIES[:3], models=("glp", "raw")))
    assert [part.title for part in small.parts] == ["Task by task", "What the best features are"]
    assert [plot.name for plot in small.all_plots] == ["probing_means", "probing_heat", "probing_tasks"]
    assert not any(plot.wide for plot in small.all_plots)


def test_a_sweep_stands_apart_from_what_is_compared(full, parts):
    means = full.tables[0]
    assert [row[0] for row in text_of(means)].count("GLP σ\u202f=\u202f0.1") == 1
    assert len(means.rows) == 6  # neither other noise levels nor their concatenation
    swept = named(parts["Which noise level and which block of the denoiser read best?"].tables, "Mean test AUC at each")
    assert len(swept.rows) == 4
    assert {row[1] for row in text_of(swept)} == {"9\u202f216", "27\u202f648"}


def test_pairs_of_the_model_in_focus_come_first_and_turned_round(full):
    own, rest = (t for t in full.tables if t.header[0] == "Pair")
    assert own.header == ["Pair", "Difference", "Wins", "p", "At 576 features: difference",
                          "At 576 features: wins", "At 576 features: p"]  # fmt: skip
    assert not own.folded
    assert rest.folded
    assert (len(own.rows), len(rest.rows)) == (5, 10)
    rows = {row[0].text: row for row in own.rows}
    # The GLP is the last entry, so every pair was measured from the other side: SAE minus GLP is -0.03.
    row = rows["GLP σ\u202f=\u202f0.1 minus SAE"]
    assert (row[1].text, row[1].below) == ("+0.030", "[+0.020, +0.040]")
    assert (row[2].text, row[2].below) == ("74%", "[65, 83]")
    assert row[4].text == "−0.015"


def test_wins_share_ties():
    results = Results("probing")
    for task, values in {"t1": (0.9, 0.9, 0.5), "t2": (0.8, 0.7, 0.6), "t3": (0.6, 0.7, 0.6)}.items():
        for model, value in zip(("glp", "sae", "raw"), values, strict=True):
            results.add(model, task, "split=dedup;mode=all", "auc", value)
    for model in ("glp", "sae", "raw"):
        results.add(model, "all", "split=dedup;mode=all", "auc", 0.7)
    means = section(results).tables[0]
    assert means.header[-1] == "Best on, of 3 tasks"
    assert {row[0]: row[-1] for row in text_of(means)} == {"GLP": "1.5", "SAE": "1.5", "raw activations": "0"}


def test_what_was_picked_on_test_is_labelled_so(full):
    cost = named(full.tables, "All models and noise levels")
    assert cost.header[-1] == "Picked on test: not comparable"
    assert "Optimism (validation minus test)" in cost.header
    assert len(cost.rows) == 9


def test_best_features_are_named_with_the_texts_that_excite_them(parts):
    own, every = parts["What the best features are"].tables
    assert own.folded
    assert len(own.rows) == len(every.rows) == 113
    row = own.rows[0]
    assert row[1].text == "block 3, neuron 812"
    assert row[1].below[0] in "+−"
    assert len(row[-1].passages) == 3
    assert row[-1].passages[0].endswith("(other)")
    assert row[-1].passages[1].startswith("“… the words before the end of text 1")
    assert every.header == ["Task", "GLP σ\u202f=\u202f0.1", *every.header[2:]]
    assert {cell.below.rsplit(" ", 1)[0] for cell in every.rows[0][2:]} == {"feature 5420"}


def test_notes_tell_names_families_hooks_and_what_was_left_out():
    results = probing_results(TASKS[:4], ["a", "a", "b", "c"], models=("raw", "neurons"))
    results.config["entries"]["neurons"]["hook"] = "blocks.3.mlp.hook_post"
    results.data["tasks"][TASKS[1]]["note"] = "means another thing."
    results.data["pooling"] = "mean"
    told = " ".join(section(results).notes)
    assert "4 tasks in 3 task families" in told
    assert f"Names that mislead. {TASKS[1]}: means another thing. " in told + " "
    assert "MLP neurons: read at blocks.3.mlp.hook_post" in told
    assert "activations of the mean over tokens" in told
    assert "Up to 1\u202f024 training and 1\u202f024 test prompts a task, cut to 128 tokens" in told
    assert "Left out: 1 split of a task" in told


def test_hollow_marks_take_the_background_of_the_theme(plots):
    assert all(PAPER not in plot.svg for plot in plots.values())
    assert "fill: var(--page)" in plots["probing_means"].svg


def test_the_best_of_useless_features_is_told_as_it_was_measured():
    results = probing_results(TASKS[:4], ["a", "a", "b", "c"], models=("glp", "pca"))
    measured = {"glp": 0.712, "pca": 0.634}
    results.metrics = [
        replace(m, value=measured[m.model]) if m.metric == "auc_null" and m.setting.get("mode") == "all" else m
        for m in results.metrics
    ]
    told = " ".join(section(results).notes)
    assert "validation AUC of 0.634 for K = 576, 0.712 for K = 9\u202f216." in told


def test_the_page_of_a_full_run_escapes_texts_and_keeps_ids_apart(tmp_path):
    results = probing_results(TASKS[:12], FAMILIES[:12], sigmas=SIGMAS, sparse=True)
    html = write_report([results], tmp_path).read_text()
    assert EVIL not in html
    assert "&lt;script&gt;" in html
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert "data:image" not in html
    assert len(list((tmp_path / "plots").glob("probing_*.png"))) == 7


def test_text_table_lines_up_and_tells_the_numbers():
    results = probing_results(TASKS[:5], ["a", "a", "b", "c", "d"], models=("glp", "pca"), sigmas=SIGMAS)
    title, _, header, *lines = page.text_table(results).splitlines()
    assert "5 tasks in 4 families" in title
    names = ["model", "features", "dedup, top 512", "dedup, all", "official, top 512", "official, all", "optimism"]
    assert re.split(r"\s{2,}", header) == names
    assert len(lines) == 6  # three noise levels, their concatenation, PCA, dense
    # Numbers end where the titles of their columns end.
    ends = {header.index(name) + len(name) for name in names[1:]}
    for line in lines:
        assert ends >= {m.end() for m in re.finditer(r"\S+(?: \[.*?\])?(?=\s{2}|$)", line) if m.end() >= min(ends)}
    frame = metrics_frame(results.metrics)
    frame = frame[(frame.task == "all") & (frame.metric == "auc") & (frame.setting == "split=dedup;mode=paper")]
    row = frame[frame.model == "pca"].iloc[0]
    cells = re.split(r"\s{2,}", next(line for line in lines if line.startswith("pca")))
    assert cells[1] == "576"
    assert cells[2] == f"{row.value:.3f} [{row.ci_low:.3f}, {row.ci_high:.3f}]"
    assert cells[-1] == "+0.031"
    order = [line.split("  ")[0] for line in lines[:-1]]
    assert order == list(frame.sort_values("value", ascending=False).model)
    assert re.split(r"\s{2,}", lines[-1])[:3] == ["dense", "-", "-"]


def test_text_table_of_one_task_has_no_intervals_and_of_none_says_so():
    results = Results("probing")
    results.add("glp", "t", "split=official;mode=all", "auc", 0.8123)
    results.add("glp", "t", "split=official;mode=all", "n_candidates", 99)
    results.add("glp", "all", "split=official;mode=all", "auc", 0.8123, n=1)
    assert page.text_table(results).splitlines()[2:] == [
        "model  features  official, all",
        "glp          99          0.812",
    ]
    assert page.text_table(Results("probing")) == "no probing task could be scored"


MARKUP = ("a$b$", "$x_1^{2}$", "_hidden", "100$ vs $5", r"back\slash\frac{", "two\nlines$")
"""Names that matplotlib would read as mathematics, or leave out."""


def test_names_are_drawn_as_plain_text():
    results = probing_results(TASKS[:6], FAMILIES[:6], sigmas=SIGMAS, sparse=True)
    models = dict(zip(("sae", "pca", "raw"), MARKUP, strict=False))
    tasks = dict(zip(TASKS[:6], MARKUP, strict=True))
    results.metrics = [
        replace(
            m, model=models.get(m.model, m.model), task=tasks.get(m.task, m.task), other=models.get(m.other, m.other)
        )
        for m in results.metrics
    ]
    results.data["tasks"] = {tasks.get(task, task): about for task, about in results.data["tasks"].items()}
    drawn = {plot.name: [text.strip("\u2060") for text in words(plot.svg)] for plot in section(results).all_plots}
    for name in ("a$b$", "$x_1^{2}$", "_hidden"):
        assert name in drawn["probing_means"]
        assert name in drawn["probing_features"]  # in the legend
    assert {"100$ vs $5", r"back\slash\frac{"} <= set(drawn["probing_tasks"]) | set(drawn["probing_heat"])


def test_logarithmic_axes_have_powers_of_ten():
    def draw(figure):
        axes = figure.subplots()
        axes.plot([1e-3, 20], [-5, 2000])
        axes.set_xscale("log")
        axes.set_yscale("symlog", linthresh=1)

    assert {"10⁻³", "10¹", "−10⁰", "0", "10³"} <= set(words(render("powers", "", (5, 4), draw).svg))
