"""The table that a page begins with says who is clearly ahead, and nothing else; the page fits windows and paper."""

import math

import pytest
from scipy import stats

from glp_lens.display.comparisons import Difference, Verdict
from glp_lens.display.elements import Cell
from glp_lens.display.labels import Palette, Style
from glp_lens.display.overview import Column, make_overview
from glp_lens.display.plots import INK
from glp_lens.evals.registry import SUITES
from glp_lens.evals.results import Results
from glp_lens.kinds import KINDS
from glp_lens.report import write_report
from tests.browser import BINARY, Browser
from tests.unit.test_report import Page, density, fidelity, probing, steering

needs_browser = pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine to open the page in")
CONDITIONS = {"plain": Style("no repair", "#e69f00", "P")}


def column(*labels, **changes):
    cells = {label: Cell(f"value of {label}") for label in labels}
    return Column(**{"section": "a", "title": "A", "measure": "m", "cells": cells, "units": "7 texts", "field": "a"}
                  | changes)  # fmt: skip


def verdict(outcome, second, first="glp", **more):
    return Verdict("a", outcome, first, second, "", **more)


def signs(table, place=0):
    return {row.name: [(m.sign, m.times) for m in row.cells[place][2]] for row in table.rows}


def test_a_rival_is_marked_as_it_fares_and_the_focus_only_if_it_is_ahead_of_all():
    labels = ("plain", "sae", "pca", "raw", "glp")
    judged = [verdict("ahead", "sae"), verdict("behind", "pca"), verdict("unclear", "plain")]
    table = make_overview([column(*labels)], judged, "glp", CONDITIONS)
    assert signs(table) == {
        "GLP": [], "SAE": [("▼", "")], "PCA": [("▲", "")], "raw activations": [], "no repair": [("=", "")],
    }  # fmt: skip
    assert [row.name for row in table.rows] == ["GLP", "SAE", "PCA", "raw activations", "no repair"]
    assert signs(make_overview([column(*labels)], judged[:1], "glp", CONDITIONS))["GLP"] == [("▲", "")]


def test_settings_of_a_model_share_its_row_and_its_main_setting_decides():
    judged = [verdict("ahead", "sae", "glp sigma=0.2"), verdict("behind", "sae"), verdict("ahead", "sae k=8")]
    table = make_overview([column("glp sigma=0.2", "glp", "sae"), column("sae k=8", "glp sigma=0.2", title="B")],
                          judged, "glp", {})  # fmt: skip
    assert [row.name for row in table.rows] == ["GLP", "SAE"]
    assert table.rows[0].cells[0][:2] == (Cell("value of glp"), "")
    assert table.rows[0].cells[1][:2] == (Cell("value of glp sigma=0.2"), "σ\u202f=\u202f0.2")
    assert signs(table)["SAE"] == [("▲", "")]
    assert table.rows[1].cells[1][1] == "k\u202f=\u202f8"


def test_of_several_tasks_it_is_told_how_often():
    outcomes = ("ahead", "unclear", "ahead", "behind")
    judged = [verdict(outcome, "gaussian", task=str(place)) for place, outcome in enumerate(outcomes)]
    table = make_overview([column("glp", "gaussian"), column("glp", "gaussian", task="1")], judged, "glp", {})
    assert signs(table)["Gaussian"] == [("▲", "1 of 4"), ("▼", "2 of 4")]
    assert signs(table)["GLP"] == []
    assert signs(table, 1)["Gaussian"] == [("=", "")]


def test_smallest_visible_difference_is_told_from_the_smallest_to_the_largest():
    judged = [verdict("unclear", "sae", visible=0.05), verdict("unclear", "pca", visible=0.0304),
              verdict("unclear", "raw")]  # fmt: skip
    other = column("glp", field="b")
    assert make_overview([column("glp", "sae"), other], judged, "glp", {}).visible == ["0.030 to 0.050", "–"]


def test_smallest_visible_difference_is_found_by_four_of_five_runs():
    n, error = 9, 0.7
    half = stats.t(n - 1).ppf(0.975) * error
    visible = Difference("a", "b", "", None, 3.0, 3 - half, 3 + half, n).visible
    assert visible == pytest.approx(error * (stats.t(n - 1).ppf(0.975) + stats.t(n - 1).ppf(0.8)))
    # Against the noncentral t, which knows the power exactly.
    assert stats.nct(n - 1, visible / error).sf(stats.t(n - 1).ppf(0.975)) == pytest.approx(0.8, abs=0.02)
    assert math.isnan(Difference("a", "b", "", None, 3.0, 2.0, 4.0, 1).visible)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    probes, losses, steered = probing(), density(), steering()
    for model in ("glp", "plain", "random"):
        steered.add(model, "sports", "alpha=chosen", "harmonic", 0.9, ci_low=0.8, ci_high=1.0, n=32)
    for results, setting, metric in ((probes, "split=dedup;mode=paper", "auc"), (losses, "sigma=all", "flow_loss")):
        results.add("my_" * 8, "all", setting, metric, 0.7, ci_low=0.6, ci_high=0.8, n=2)
    store = {"rows": 9, "hook": "blocks.14.hook_resid_post" * 4}
    context = {
        "title": "A-" * 40,
        "command": "x" * 300,
        "store": store,
        "training": [{"model": "glp", "rows_seen": 10, "parameters": 16_300_000, "recipe": "y" * 99}],
    }
    return write_report([losses, fidelity(), steered, probes], tmp_path_factory.mktemp("page"), context)


@pytest.fixture
def address(page):
    return page.as_uri()


def test_the_page_has_the_table_first_one_picture_a_suite_and_all_else_folded(page):
    text = page.read_text(encoding="utf-8")
    assert text.index("<table") < text.index("<svg")
    places = [text.index(f'id="{name}"') for name in ("overview", "probing", "steering", "fidelity", "density")]
    assert places == sorted(places)
    shown = text[text.index("<body>") :]
    while "<details" in shown:  # innermost first
        start = shown.rindex("<details")
        shown = shown[:start] + shown[shown.index("</details>", start) + len("</details>") :]
    assert shown.count("<svg") == 4
    assert shown.count("<table") == 1
    words = " ".join(" ".join(Page(text).words).split())
    assert "No clear winner between GLP and SAE in reading concepts" in words
    assert "No clear winner" not in shown
    assert "GLP loses to no repair" not in shown
    assert "random direction" not in shown[: shown.index("<svg")]  # a control is no rival
    # Each suite's values, units and who is clearly ahead.
    for told in ("0.800", "[0.700, 0.900]", "2 task families", "24 documents", "60 documents", "32 prompts",
                 "+0.100", "clearly ahead of GLP", "clearly behind GLP", "not told apart from GLP"):  # fmt: skip
        assert told in shown


def test_results_without_the_focus_have_values_and_no_signs(tmp_path):
    results = Results("density")
    for model, loss in (("gaussian", 1.4), ("sae", 1.5)):
        results.add(model, "heldout", "sigma=all", "flow_loss", loss, ci_low=loss - 0.1, ci_high=loss + 0.1, n=60)
    text = write_report([results], tmp_path).read_text(encoding="utf-8")
    assert "1.400" in text
    assert 'class="mark' not in text


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_colours_of_plots_are_seen_on_the_dark_page():
    """By the contrast of 3 that WCAG 2 asks of graphics; ink itself follows the theme."""
    own = [style.color for suite in SUITES for style in suite.page.CONDITIONS.values()]
    unknown = Palette(["one", "two", "three"])
    for colour in {*own, *(kind.color for kind in KINDS.values()), *map(unknown.color, ("one", "two", "three"))}:
        if colour != INK:
            assert (luminance(colour) + 0.05) / (luminance("#14171b") + 0.05) >= 3, colour


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
STICK_OUT = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility()
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1 && !e.closest('.scroll, pre'))
    .map(e => e.outerHTML.slice(0, 80))"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_nothing_overflows_and_the_console_is_quiet(browser, address, width, dark):
    browser.window(width, 1000, dark=dark)
    browser.open(address, "document.readyState === 'complete'")
    for opened in ("false", "true"):
        browser.evaluate(f"document.querySelectorAll('details').forEach(d => d.open = {opened})")
        assert browser.evaluate(WIDER) <= 0
        assert browser.evaluate(STICK_OUT) == []
    if width == 400:  # the table of the first screen has no scroller that hides a suite
        assert (
            browser.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.overview .scroll'))") == 0
        )
    assert browser.errors == []


@needs_browser
def test_paper_cuts_no_table_and_shows_what_each_suite_found(browser, address):
    browser.window(710, 1000, dark=True, media="print")  # A4 between its margins
    browser.open(address, "document.readyState === 'complete'")
    try:
        assert browser.evaluate(WIDER) <= 0
        cut = (
            "[...document.querySelectorAll('table')].filter(e => e.checkVisibility() && e.scrollWidth > innerWidth + 1)"
        )
        assert browser.evaluate(f"{cut}.length") == 0
        assert browser.evaluate("document.querySelector('#probing > details > figure.table').checkVisibility()")
        assert browser.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    finally:
        browser.window(900, 1000)


@needs_browser
def test_a_link_into_what_is_folded_opens_it(browser, address):
    browser.window(900, 1000)
    browser.open(address + "#failures", "document.readyState === 'complete'")
    assert browser.evaluate("document.querySelector('#reading > details').open")
