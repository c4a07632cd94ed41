"""Generations as a parquet file, and the page on which a person reads them, in a real browser."""

import base64
import gzip
import json
import re
import time
from urllib.parse import urlencode

import pandas as pd
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.steering.texts import read_generations, write_generations, write_texts_page
from tests.browser import BINARY, Browser
from tests.unit.steering_frame import steering_frame

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & <b>bold</b> </script>"
TEXTS = ("the team won a Goal", "prices fell again", EVIL, "nothing was as it seemed", "it İs a GOAL", "")
METHODS = {"glp": 0.2, "sae": 0.1, "shrink": 0.0, "gaussian": -0.1, "random labels": -0.3}
needs_browser = pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine to open the page in")


def some_frame(**options):
    return steering_frame(METHODS, prompts=24, concepts=("sports", "world"), texts=TEXTS, **options)


def test_generations_come_back_as_they_were_written(tmp_path):
    frame = some_frame(runs=((0, "float32"), (1, "bfloat16"))).assign(judge_answer="unparsable")
    frame.loc[3, "score_concept"] = float("nan")
    path = write_generations(frame, tmp_path / "new")
    again = read_generations(tmp_path / "new")
    assert path == tmp_path / "new" / "generations.parquet"
    pd.testing.assert_frame_equal(again[frame.columns], frame, check_dtype=False)
    assert list(again.columns[:3]) == ["experiment", "concept", "method"]
    assert again.columns[-1] == "judge_answer"
    pd.testing.assert_frame_equal(again, read_generations(path))


def test_files_that_are_no_generations_are_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="does not exist, run glp-lens steer first"):
        read_generations(tmp_path)
    (tmp_path / "generations.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(InputError, match=r"generations\.parquet cannot be read"):
        read_generations(tmp_path)
    with pytest.raises(InputError, match="text, noise_seed not found"):
        write_generations(some_frame().drop(columns=["text", "noise_seed"]), tmp_path)
    with pytest.raises(InputError, match="hold what is no number"):
        write_generations(some_frame().assign(score_concept="much"), tmp_path)
    with pytest.raises(InputError, match="no generations to show"):
        write_texts_page(some_frame()[:0], tmp_path)


def test_the_page_holds_every_text_and_no_markup_of_theirs(tmp_path):
    frame = some_frame()
    path = write_texts_page(frame, tmp_path, title="Texts </script> <b>", note="Seed 0.")
    page = path.read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert not re.search(r"https?://", page)
    packed = re.search(r'id="data">([^<]*)<', page).group(1)
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert data["text"] == frame["text"].tolist()
    assert data["title"] == "Texts </script> <b>"
    assert data["score"]["fluency"][5] == pytest.approx(frame["score_fluency"][5], abs=5e-4)
    assert write_texts_page(frame, tmp_path / "again", title="Texts </script> <b>", note="Seed 0.").read_text() == page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_texts_page(some_frame(runs=((0, "float32"), (1, "float32"))), tmp_path_factory.mktemp("page")).as_uri()


def address(page, pairs):
    return f"{page}#{urlencode(pairs)}"


def rows(browser):
    return int(browser.evaluate("document.querySelector('#count').textContent").split(" ")[0].replace(",", ""))


def cells(browser):
    """Text of the table's cells, without their scores."""
    return browser.evaluate(
        "[...document.querySelectorAll('tbody td')].map(c => c.querySelector('p')?.textContent ?? '')"
    )


def head(browser):
    return browser.evaluate("[...document.querySelectorAll('thead th')].map(c => c.textContent)")


@needs_browser
def test_the_page_opens_from_disk_alone_and_shows_markup_as_text(browser, page):
    browser.open(page)
    assert browser.errors == []
    assert browser.requests == [page]
    facts = browser.evaluate("document.querySelector('#facts').textContent")
    assert facts.strip() == "2,976 texts: 2 concepts, 24 prompts, 6 methods, 5 strengths, 2 runs."
    assert head(browser) == ["Prompt", "plain", "glp", "sae", "shrink"]
    shown = cells(browser)
    assert len(shown) == 20 * 4
    assert set(shown) <= {*TEXTS, "(nothing)"}
    assert EVIL in shown
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert browser.evaluate("document.querySelectorAll('tbody script, tbody img, tbody b:not(small b)').length") == 0


@needs_browser
def test_search_and_least_scores_find_what_pandas_finds(browser, page):
    frame = some_frame(runs=((0, "float32"), (1, "float32")))
    frame = frame[(frame.noise_seed == 0) & (frame.method != "unsteered")]
    everything = [("concept", "all"), ("method", "all"), ("strength", "all")]
    goals = frame[frame.text.str.lower().str.contains("goal")]
    keys = ["concept", "prompt_index", "strength"]
    browser.open(address(page, [*everything, ("q", "gOAL")]))
    assert rows(browser) == len(goals.drop_duplicates(keys))
    assert browser.evaluate("document.querySelector('mark').textContent.toLowerCase()") == "goal"
    browser.open(address(page, [*everything, ("q", "goal"), ("concept_min", "1.2"), ("fluency_min", "1.1")]))
    # The page has scores to three decimals.
    some = goals[(goals.score_concept.round(3) >= 1.2) & (goals.score_fluency.round(3) >= 1.1)]
    assert rows(browser) == len(some.drop_duplicates(keys)) > 0
    browser.open(address(page, [*everything, ("q", "<b>bold</b>")]))
    assert rows(browser) > 0
    browser.open(address(page, [("q", "no such text")]))
    assert "No text fits" in browser.evaluate("document.querySelector('#count').textContent")
    assert browser.errors == []


@needs_browser
def test_a_link_says_what_is_shown(browser, page):
    link = address(page, [("columns", "strength"), ("strength", "0.2"), ("strength", "0.8"), ("method", "sae"),
                          ("concept", "world"), ("prompt", "7"), ("run", "seed 1, float32")])  # fmt: skip
    browser.open(link)
    assert head(browser) == ["Prompt", "α = 0.2", "α = 0.8"]
    frame = some_frame(runs=((0, "float32"), (1, "float32")))
    same = (frame.noise_seed == 1) & (frame.concept == "world") & (frame.method == "sae") & (frame.prompt_index == 7)
    want = frame[same & frame.strength.isin([0.2, 0.8])].text.tolist()
    assert [text.replace("(nothing)", "") for text in cells(browser)] == want
    title = browser.evaluate("document.querySelector('tbody th').textContent")
    assert "Prompt number 7 is …" in title
    assert "world · sae · seed 1, float32" in title
    # A filter changed by hand goes into the address, and the address brings it back.
    browser.evaluate("document.querySelector('input[name=method][value=\"1\"]').click()")
    changed = browser.evaluate("location.href")
    before = cells(browser)
    assert len(before) == 4
    browser.open(changed)
    assert cells(browser) == before
    browser.evaluate("document.querySelector('tbody tr:nth-child(2) a').click()")
    browser.wait("document.querySelectorAll('tbody tr').length === 1")
    browser.open(address(page, [("method", "glp"), ("method", "gone")]))
    assert "not here: gone" in browser.evaluate("document.querySelector('#count').textContent")
    assert head(browser) == ["Prompt", "glp"]
    assert browser.errors == []


@needs_browser
def test_order_by_a_score(browser, page):
    browser.open(address(page, [("method", "glp"), ("strength", "all"), ("sort", "fluency:low")]))
    values = browser.evaluate(
        "[...document.querySelectorAll('tbody td small b:nth-of-type(2)')].map(b => +b.textContent)"
    )
    assert len(values) == 20
    assert values == sorted(values)


@needs_browser
def test_the_keyboard_is_enough(browser, page):
    browser.open(page)
    browser.press("ArrowRight")
    assert "page 2 of 2" in browser.evaluate("document.querySelector('#count').textContent")
    browser.press("ArrowRight")  # the last page has no next
    browser.press("ArrowLeft")
    assert "page 1 of 2" in browser.evaluate("document.querySelector('#count').textContent")
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "q"
    for letter in "goal":
        browser.press(letter)
    browser.wait("location.hash === '#q=goal'")
    visited = []
    for _ in range(12):
        browser.press("Tab")
        visited.append(browser.evaluate("document.activeElement.id || document.activeElement.name || ''"))
    assert visited[:5] == ["prompt", "concept_min", "fluency_min", "columns", "sort"]
    assert "method" in visited
    browser.evaluate("document.querySelector('input[name=concept][value=\"1\"]').focus()")
    browser.press(" ")
    browser.wait("location.hash.includes('concept=all')")
    assert browser.errors == []


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_narrow_windows_need_no_scrolling_sideways(browser, page, dark):
    browser.window(400, 800, dark=dark)
    try:
        browser.open(page)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        colours = browser.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        light = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
        assert (light[0] < light[1]) == dark
    finally:
        browser.window(1400, 1000)


@needs_browser
def test_77_000_texts_stay_quick(browser, tmp_path):
    methods = {f"method {i}": 0.0 for i in range(19)}
    words = [
        f"text number {i} of a good many words that a language model wrote about {i * 7919 % 99991}"
        for i in range(9973)
    ]
    frame = steering_frame(methods, prompts=96, concepts=[f"concept {i}" for i in range(8)], texts=words)
    assert len(frame) > 77_000
    path = write_texts_page(frame, tmp_path)
    assert path.stat().st_size < 6e6
    began = time.monotonic()
    browser.open(
        address(path.as_uri(), [("concept", "all"), ("method", "all"), ("strength", "all"), ("q", "number 77")])
    )
    assert time.monotonic() - began < 30  # of a busy machine; about 2 alone
    assert rows(browser) > 100
    assert browser.evaluate("Number(document.body.dataset.milliseconds)") < 3000
    assert browser.errors == []
