"""The page of features, as a file and in a real browser."""

import base64
import gzip
import hashlib
import json
import re
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pytest

from glp_lens.errors import InputError
from glp_lens.features import TABLES, name_of
from glp_lens.features.page import write_page
from glp_lens.pipeline import PageFeaturesJob, page_features
from tests.browser import BINARY, Browser
from tests.unit.feature_folder import DEAD, GLP, SAE, write_features, write_many

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & <b>bold</b> </script>"
needs_browser = pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine to open the page in")


def folder_with_markup(path):
    """A folder where texts are shared by several features of both models, and texts and labels are markup."""
    folder = write_features(path)
    for model in (GLP, SAE):
        examples = folder.table(model.label, "examples")
        examples["key"] = examples["key"] % 7 + (1 << 60)
        examples["tokens"] = [[*tokens[:-1], EVIL] if i % 5 == 0 else list(tokens)
                              for i, tokens in enumerate(examples["tokens"])]  # fmt: skip
        folder.write_table(model, "examples", examples)
        labels = folder.table(model.label, "labels")
        labels.loc[0, "label"] = EVIL
        folder.write_table(model, "labels", labels)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_with_markup(tmp_path_factory.mktemp("page") / "features")


@pytest.fixture(scope="module")
def page(folder):
    return write_page(folder)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def read(page, name):
    packed = re.search(rf'id="{name}">([^<]*)<', page).group(1)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def address(page, **state):
    return f"{page.as_uri()}#{urlencode(state)}"


def listed(browser):
    """Addresses of the features in the list, as far as they are drawn."""
    browser.wait("document.body.dataset.search === 'done'")
    links = browser.evaluate("[...document.querySelectorAll('#list a')].map(a => a.getAttribute('href'))")
    return [re.search(r"[#&]f=([^&]*)", link).group(1).replace("%2F", "/").replace("%3A", ":").replace("+", " ")
            for link in links]  # fmt: skip


def counted(browser):
    browser.wait("document.body.dataset.search === 'done'")
    said = browser.evaluate("document.querySelector('#count').textContent")
    return 0 if said.startswith("No feature") else int(said.split(" ")[0].replace(",", ""))


def names(model, features):
    return [f"{model.label}/{name_of(model, feature)}" for feature in features]


def texts(folder, model, most=10):
    """Features and texts of the passages on the page: `most` of each end, a fifth as many of each part of the range."""
    frame = folder.table(model.label, "examples")
    frame = frame[frame["rank"] < np.where(frame.group.str.startswith("band"), max(1, most // 5), most)]
    return frame.assign(text=["".join(tokens) for tokens in frame["tokens"]])


def test_the_page_holds_every_passage_to_a_hundredth_and_no_markup(folder, page):
    text = page.read_text()
    assert text.count("<script") == text.count("</script>")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert EVIL not in text
    index = read(text, "index")
    for model, about in zip((GLP, SAE), index["models"], strict=True):
        frame = folder.table(model.label, "examples")
        for feature in range(model.n_features):
            details = read(text, f"piece-{about['piece'] + feature // index['together']}")
            details = details[feature % index["together"]]
            groups = dict(details["examples"])
            own = frame[(frame.feature == feature) & (frame.group == "top")].sort_values("rank")
            assert len(groups.get("top", [])) == len(own)
            for stored, row in zip(groups.get("top", []), own.itertuples(), strict=True):
                assert stored[5].split("\x1f") == list(row.tokens)
                assert stored[1:3] == [row.position, row.peak]
                assert stored[3] == pytest.approx(row.value, rel=1e-3)
                shares = np.array(stored[6]) * stored[4] / 100
                assert shares == pytest.approx(np.array(row.values), abs=0.0051 * np.abs(row.values).max())
    assert index["models"][0]["dead"] == [DEAD]


def test_the_only_script_that_may_run_is_its_own(page):
    text = page.read_text()
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert set(re.findall(r"<script([^>]*)>", text)) >= {""}
    assert [kind for kind in re.findall(r"<script([^>]*)>", text) if "octet-stream" not in kind] == [""]


def test_a_few_features_are_evenly_spaced_alive_and_said_to_be(folder, tmp_path):
    path = write_page(folder, tmp_path / "few.html", features=5)
    index = read(path.read_text(), "index")
    for model, about in zip((GLP, SAE), index["models"], strict=True):
        alive = [i for i in range(model.n_features) if i != DEAD]
        assert about["feature"] == [alive[i * len(alive) // 5] for i in range(5)]
    assert "at most 5 features of each model" in index["about"]["notes"][-1]
    assert write_page(folder, tmp_path / "again.html", features=5).read_bytes() == path.read_bytes()
    everything = read(write_page(folder, tmp_path / "all.html", features=1000).read_text(), "index")
    assert len(everything["models"][0]["feature"]) == GLP.n_features - 1


def test_the_job_writes_the_page_and_refuses_what_it_cannot_replace(folder, tmp_path):
    said = []
    other = tmp_path / "other.html"
    assert page_features(PageFeaturesJob(built=folder.path, features=3, out=other), say=said.append) == other
    assert said[0].startswith(f"page: {other}")
    with pytest.raises(InputError, match="already exists"):
        page_features(PageFeaturesJob(built=folder.path, out=other))
    with pytest.raises(InputError, match="acts only with --out"):
        PageFeaturesJob(built=folder.path, overwrite=True)
    (folder.path / SAE.folder / "labels.parquet").rename(tmp_path / "labels.parquet")
    assert page_features(PageFeaturesJob(built=folder.path, out=other, overwrite=True), say=said.append) == other
    (tmp_path / "labels.parquet").rename(folder.path / SAE.folder / "labels.parquet")
    with pytest.raises(InputError, match="no features in"):
        page_features(PageFeaturesJob(built=tmp_path))


@needs_browser
def test_the_page_opens_from_disk_alone_and_shows_markup_as_text(browser, page):
    browser.open(address(page, f="glp/0:0"))
    assert browser.errors == []
    assert browser.requests == [page.as_uri()]  # without its hash
    assert browser.evaluate("document.querySelector('#view h2').textContent").startswith("glp/0:0")
    assert EVIL in browser.evaluate("document.querySelector('#view').textContent")
    assert EVIL in browser.evaluate("document.querySelector('#list').textContent")
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert browser.evaluate("document.querySelectorAll('#view script, #view img, #view b').length") == 0


@needs_browser
def test_search_finds_what_pandas_finds(browser, folder, page):
    wanted = []
    for model in (GLP, SAE):
        frame = texts(folder, model)
        found = frame[frame.text.str.lower().str.contains("sat on", regex=False)]
        wanted += names(model, sorted(set(found.feature)))
    browser.open(address(page, q="Sat On", **{"in": "text"}))
    assert 0 < counted(browser) == len(wanted) < GLP.n_features + SAE.n_features
    assert listed(browser) == wanted[: len(listed(browser))]
    browser.evaluate("document.querySelector('#list a').click()")
    browser.wait("document.querySelector('#view .hit') !== null")
    browser.open(address(page, q="<b>bold</b>", **{"in": "text"}))
    assert counted(browser) > 0
    browser.open(address(page, q="no such words"))
    assert counted(browser) == 0
    for where in ("token", "writes"):
        browser.open(address(page, q="rain", model="glp", **{"in": where}))
        if where == "token":
            frame = folder.table("glp", "examples")
            frame = frame[frame.group.isin(["top", "bottom"])]
            fits = [row.tokens[row.peak].strip() == "rain" for row in frame.itertuples()]
        else:
            frame = folder.table("glp", "writes")
            fits = [any(token.strip() == "rain" for token in tokens) for tokens in frame["tokens"]]
        assert counted(browser) == len(set(frame.feature[fits])) > 0
    browser.open(address(page, q="task_2", **{"in": "task"}))
    assert listed(browser) == ["glp/0:2", "my sae/2"]
    labels = folder.table("glp", "labels")
    browser.open(address(page, q="rain", model="glp", **{"in": "label"}))
    assert counted(browser) == labels["label"].str.contains("rain").sum() > 0
    assert browser.errors == []


@needs_browser
def test_order_and_filters_are_those_of_pandas(browser, folder, page):
    frame = folder.table("my sae", "features")
    browser.open(address(page, model="my sae", sort="kurtosis:high"))
    ordered = frame.sort_values("kurtosis", ascending=False).feature
    assert listed(browser)[:9] == names(SAE, ordered)[:9]
    browser.open(address(page, model="my sae", density_min="10", density_max="30", kurtosis_min="20", show="alive"))
    fits = frame[frame.density.between(0.1, 0.3) & (frame["kurtosis"] >= 20) & ~frame.dead]
    assert listed(browser) == names(SAE, fits.feature)
    browser.open(address(page, show="dead"))
    assert listed(browser) == ["glp/0:4", "my sae/4"]
    browser.open(address(page, show="tasks", auc_min="0.95"))
    assert counted(browser) == 0
    assert browser.errors == []


@needs_browser
def test_a_feature_is_shown_with_all_that_is_known(browser, page):
    browser.open(address(page, f="glp/0:1"))
    browser.wait("document.querySelectorAll('#view figure').length === 7")  # histogram and six curves
    shown = browser.evaluate("document.querySelector('#view').innerText")
    for words in ("automatic label", "Where it is highest", "Where it is lowest", "What it writes", "jacobian",
                  "By activation", "noise levels", "task_1", "Steered along", "of 1 at 2.0"):  # fmt: skip
        assert words in shown
    assert browser.evaluate("document.querySelectorAll('.tokens span.low').length") > 0
    assert browser.evaluate("document.querySelector('.tokens span').title").split()[-1].replace(".", "").isdigit()
    # A neighbour is a link to that feature.
    browser.evaluate("document.querySelector('#view .sides table a').click()")
    browser.wait("!document.querySelector('#view h2').textContent.startsWith('glp/0:1')")
    browser.wait("document.querySelector('#view h2').textContent.startsWith("
                 "new URLSearchParams(location.hash.slice(1)).get('f'))")  # fmt: skip
    browser.open(address(page, f="glp/0:4"))
    assert "same value on every token" in browser.evaluate("document.querySelector('#view').innerText")
    browser.open(address(page, f="glp/7:99"))
    assert "no such feature" in browser.evaluate("document.querySelector('#view').innerText")
    assert browser.errors == []


@needs_browser
def test_two_models_are_compared_on_one_text(browser, folder, page):
    key = f"{(1 << 60) + 3:016x}"[:12]
    browser.open(address(page, text=key, a="glp", b="my sae"))
    browser.wait("document.querySelectorAll('#view .sides > div').length === 2 && "
                 "document.querySelector('#view').innerText.includes('Only passages')")  # fmt: skip
    for i, model in enumerate((GLP, SAE)):
        frame = texts(folder, model)
        frame = frame.assign(short=[f"{int(each):016x}"[:12] for each in frame["key"]])
        wanted = set(names(model, set(frame[frame.short == key].feature)))
        side = f"document.querySelectorAll('#view .sides > div')[{i}]"
        links = browser.evaluate(f"[...{side}.querySelectorAll('li a')].map(a => a.textContent)")
        assert set(links) == wanted
        assert len(links) == len(wanted)
    assert browser.errors == []


@needs_browser
def test_the_keyboard_is_enough(browser, page):
    browser.open(address(page))
    browser.press("j")
    browser.press("j")
    browser.wait("location.hash === '#f=glp%2F0%3A1'")
    browser.press("k")
    browser.wait("location.hash === '#f=glp%2F0%3A0'")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.id") == "view"
    browser.press("Escape")
    browser.wait(
        "location.hash === '' && document.querySelector('#view h2').textContent === 'Features of these models'"
    )
    browser.press("/")
    assert browser.evaluate("document.activeElement.id") == "q"
    for letter in "task_2":
        browser.press(letter)
    browser.wait("location.hash === '#q=task_2'")
    browser.press("Enter")
    browser.wait("location.hash.includes('f=glp%2F0%3A2')")
    browser.press("?")
    assert browser.evaluate("document.querySelector('#help').open") is True
    browser.press("Escape")
    assert browser.evaluate("document.querySelector('#help').open") is False
    assert browser.errors == []


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_narrow_windows_need_no_scrolling_sideways(browser, page, dark):
    browser.window(380, 800, dark=dark)
    try:
        for state in ({}, {"f": "glp/0:1"}, {"text": f"{(1 << 60) + 3:016x}"[:12]}):
            browser.open(address(page, **state))
            browser.wait("document.querySelector('#view').textContent !== ''")
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert browser.evaluate("document.querySelector('#view').scrollWidth <= innerWidth")
        colours = browser.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        light = [sum(map(int, re.findall(r"\d+", colour))) for colour in colours]
        assert (light[0] < light[1]) == dark
        browser.evaluate("document.querySelector('#back').click()")
        browser.wait("getComputedStyle(document.querySelector('#side')).display !== 'none'")
        browser.evaluate("document.querySelector('#to-about').click()")  # which stands beside the list in wide windows
        browser.wait("document.querySelector('#view').innerText.includes('Words of this page')")
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.evaluate("document.querySelector('#view table a').click()")
        browser.wait("location.hash.includes('model=glp') && document.querySelector('#side').clientWidth > 0")
    finally:
        browser.window(1400, 1000)


@needs_browser
def test_ten_thousand_features_scroll_and_are_searched(browser, tmp_path):
    many = write_many(tmp_path, 420, ("features", "examples", "labels"))
    path = write_page(many, examples=2)
    browser.open(address(path))
    assert counted(browser) == 420 * GLP.n_features > 10_000
    browser.evaluate("document.querySelector('#list').scrollTop = 1e9")
    browser.wait("document.querySelector('#list a:last-of-type b').textContent === '10079'")
    assert browser.evaluate("document.querySelectorAll('#list a').length") < 60
    browser.open(address(path, f="glp/5000"))  # in sight, and chosen
    browser.wait("document.querySelector('#list a[aria-selected=true] b')?.textContent === '5000'")
    frame = texts(many, many.model(), 2)
    browser.open(address(path, q="Rain Rain", **{"in": "text"}))
    assert counted(browser) == frame.feature[frame.text.str.contains("rain rain", regex=False)].nunique() > 0
    assert browser.errors == []


@needs_browser
def test_a_damaged_file_says_so(browser, page, tmp_path):
    text = page.read_text()
    damaged = tmp_path / "damaged.html"
    damaged.write_text(re.sub(r'(id="piece-1">.{40}).', r"\1*", text, count=1))
    browser.open(address(damaged, f="my sae/1"))
    assert "the file is damaged" in browser.evaluate("document.querySelector('#view').innerText")
    browser.open(address(damaged, q="sat on", **{"in": "text"}))
    browser.wait("document.querySelector('#count').textContent.includes('the file is damaged')")
    browser.errors.clear()


@needs_browser
def test_columns_that_later_jobs_add_are_shown(browser, tmp_path):
    folder = write_features(tmp_path)
    prior = folder.table("glp", "prior")
    folder.write_table(GLP, "prior", prior.assign(jacobian_agreement=0.5, jacobian_cosine=1.0))
    labels = folder.table("glp", "labels")
    more = {"context": [["indoors"]] * len(labels), "context_log_odds": [[2.0]] * len(labels)}
    folder.write_table(GLP, "labels", labels.assign(**more))
    scores = {"explanation": ["Weather <b>."], "detection": [0.9], "fuzzing": [0.75], "n": [8]}
    intervals = {"detection_low": [0.8], "detection_high": [0.95], "neighbours": [0.5], "fuzzing_low": [float("nan")]}
    known = {name: [float("nan")] for name in TABLES["explanations"]} | {"feature": [1], **scores, **intervals}
    folder.write_table(GLP, "explanations", pd.DataFrame(known))
    browser.open(address(write_page(folder), f="glp/0:1"))
    shown = browser.evaluate("document.querySelector('#view').innerText")
    assert "Weather <b>." in shown
    assert "detection 0.9 [0.8, 0.95], detection among near neighbours 0.5, fuzzing 0.75; 8 passages" in shown
    assert "indoors" in shown
    assert browser.evaluate("document.querySelectorAll('#view figure').length") == 7
    browser.open(address(tmp_path / "index.html", q="weather", **{"in": "label"}))
    assert listed(browser) == ["glp/0:1"]
    assert browser.errors == []
