"""The local server of the page of features: what it answers, and what it refuses."""

import http.client
import json
import threading
from contextlib import contextmanager

import pytest

from glp_lens.errors import InputError
from glp_lens.features.page import write_page
from glp_lens.features.serve import MOST_BYTES, Server, page_that_asks
from tests.browser import BINARY, Browser
from tests.unit.feature_folder import write_features

TOKENS = ["the", " <b>", " cat"]
ASKED = []


def answer(question):
    ASKED.append(question)
    if not question["text"]:
        raise InputError("the text has no token")
    one = {"feature": question.get("feature", 3), "mean": 0.5, "std": 0.25, "largest": 4.0, "values": [None, -1.0, 3.5]}
    return {"tokens": TOKENS, "cut": False, "models": [{"label": question.get("model", "glp"), "features": [one]}]}


@contextmanager
def serving(page=b"the page"):
    """A server at work, and its port."""
    with Server(answer, page, 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def port():
    with serving() as port:
        yield port


def ask(port, method="POST", path="/read", body=None, **headers):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if method == "POST":
        given.setdefault("Content-Type", "application/json")
    connection.putrequest(method, path, skip_host="Host" in given, skip_accept_encoding=True)
    if body is not None:
        given.setdefault("Content-Length", str(len(body)))
    for name, value in given.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    try:
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_it_gives_the_page_and_reads_texts(port):
    status, headers, body = ask(port, "GET", "/")
    assert (status, body) == (200, b"the page")
    assert headers["Content-Security-Policy"] == "frame-ancestors 'none'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    status, _, body = ask(port, body=json.dumps({"text": "the cat", "model": "my sae", "feature": 7}).encode())
    assert status == 200
    assert json.loads(body)["models"][0]["features"][0]["feature"] == 7
    assert ASKED[-1] == {"text": "the cat", "model": "my sae", "feature": 7}


def test_other_pages_and_other_names_of_this_machine_are_refused(port):
    good = json.dumps({"text": "secret"}).encode()
    for headers in (
        {"Host": "evil.example"},  # a name that was made to lead here
        {"Host": f"evil.example:{port}"},
        {"Host": f"127.0.0.1:{port + 1}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"https://127.0.0.1:{port}"},
    ):
        before = len(ASKED)
        assert ask(port, body=good, **headers)[0] == 403
        assert ask(port, "GET", "/", **headers)[0] == 403
        assert len(ASKED) == before
    assert ask(port, body=good, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    ("status", "asked"),
    [
        (404, {"method": "GET", "path": "/index.html"}),
        (404, {"method": "GET", "path": "/../features.json"}),
        (404, {"path": "/", "body": b"{}"}),
        (415, {"body": b'{"text": "a"}', "Content_Type": "text/plain"}),
        (411, {"body": None}),
        (411, {"body": None, "Transfer_Encoding": "chunked"}),
        (411, {"body": None, "Content_Length": "-5"}),
        (413, {"body": None, "Content_Length": str(MOST_BYTES + 1)}),
        (413, {"body": None, "Content_Length": "9" * 5000}),
        (400, {"body": b"not json"}),
        (400, {"body": b"[1, 2]"}),
        (400, {"body": b"[" * 50_000}),
        (400, {"body": b'{"text": ""}'}),
        (501, {"method": "PUT", "path": "/"}),
    ],
)
def test_what_is_no_question_is_refused(port, status, asked):
    got, _, body = ask(port, **asked)
    assert got == status
    if status == 400:
        assert "\n" not in json.loads(body)["error"]
    assert ask(port, body=b'{"text": "still there"}')[0] == 200


def test_it_listens_to_this_machine_only_and_says_which_port_is_taken(port):
    with Server(answer, b"", 0) as server:
        assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(InputError, match=f"port {port}: .*choose another --port"):
        Server(answer, b"", port)


def test_only_a_page_of_features_is_served(tmp_path):
    folder = write_features(tmp_path / "features")
    with pytest.raises(InputError, match="make it with glp-lens features page"):
        page_that_asks(folder.path / "index.html")
    page = write_page(folder)
    assert page_that_asks(page).decode() == page.read_text().replace("connect-src 'none'", "connect-src 'self'")
    page.write_text("<h1>Another page</h1>")
    with pytest.raises(InputError, match="no page of features"):
        page_that_asks(page)


@pytest.mark.skipif(BINARY is None, reason="no Chromium on this machine to open the page in")
def test_a_text_is_read_in_the_page(tmp_path):
    page = page_that_asks(write_page(write_features(tmp_path / "features")))
    browser = Browser(tmp_path / "profile")
    form = "document.querySelector('#view form')"
    write = f"{form}.querySelector('textarea').value = 'the cat'; {form}.querySelector('button').click()"
    try:
        with serving(page) as port:
            browser.open(f"http://127.0.0.1:{port}/#read=1")
            browser.evaluate(write)
            browser.wait("document.querySelectorAll('#view .passages li').length === 1")
            said = "document.querySelector('#view .passages li').innerText"
            assert browser.evaluate(said).startswith("glp/0:3 12 std away")  # (3.5 - 0.5) / 0.25
            browser.evaluate("document.querySelectorAll('#view .tokens button')[1].click()")
            browser.wait(f"{said}.startsWith('glp/0:3 6 std away')")  # it takes both signs
            browser.evaluate("document.querySelectorAll('#view .tokens button')[0].click()")
            browser.wait("document.querySelectorAll('#view .passages li').length === 0")  # left out
            browser.open(f"http://127.0.0.1:{port}/#f=my+sae%2F7")
            browser.evaluate(write)
            browser.wait("document.querySelectorAll('.try .tokens span').length === 3")
            assert ASKED[-1] == {"text": "the cat", "model": "my sae", "feature": 7}
            assert browser.evaluate("document.querySelectorAll('.try .tokens b').length") == 0
            assert {address.split("#")[0] for address in browser.requests} == {
                f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/read"
            }  # fmt: skip
        assert browser.errors == []
    finally:
        browser.close()
