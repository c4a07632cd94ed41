"""Opening a page of 10,000 features: processor time of its main thread for reading the file, scripts and layout.

Against the same page of 24 features, which shows what does not depend on their number, and against reading the data of
all features at once, as a page without pieces would have to.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OURS, Sized

from glp_lens.features.page import write_page
from tests.browser import BINARY, Browser
from tests.unit.feature_folder import GLP, write_many

TIMES, ROUNDS = 420, 5
WORK = f"open {TIMES * GLP.n_features:,} features"
WAYS = {
    OURS: "",
    "24 features": "",
    "all data at once": "Promise.all([...document.querySelectorAll('script[id^=piece]')].map((e) => unpacked(e.id)))"
    ".then((all) => { document.body.dataset.all = all.length; })",
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine")
def test_open(browser: Browser, tmp_path: Path, sized: Sized) -> None:
    many, few = (write_page(write_many(tmp_path / str(times), times)) for times in (TIMES, 1))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, more in WAYS.items():
            browser.open((few if way == "24 features" else many).as_uri())
            if more:
                browser.evaluate(more)
            seconds[way].append(browser.main_thread_seconds())
            assert browser.evaluate("document.querySelectorAll('#list a').length") > 5
    assert browser.errors == []
    print(json.dumps({"page": many.stat().st_size, "seconds": {way: sorted(all) for way, all in seconds.items()}}))
    for way, all in seconds.items():
        sized(WORK, way, 1 / sorted(all)[ROUNDS // 2], "times/s")
