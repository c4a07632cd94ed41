"""A hosted judge against a server on this machine."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from glp_lens.errors import InputError
from glp_lens.evals.steering.concepts import Concept
from glp_lens.evals.steering.hosted import HostedJudge, rating
from glp_lens.evals.steering.settings import JudgeSettings

KEY = "sk-very-secret"


class Endpoint(ThreadingHTTPServer):
    """Answers as `reply(text of the request, number of the request)` says: a text, or a status with headers."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.lock, self.busy, self.most = [], threading.Lock(), 0, 0
        self.reply = lambda text, n: "It is fine.\nRating: 2"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), body))
            n, server.busy = len(server.requests), server.busy + 1
            server.most = max(server.most, server.busy)
        answer = server.reply(body["messages"][-1]["content"], n)
        with server.lock:
            server.busy -= 1
        status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        if status == 200 and not isinstance(content, bytes):
            usage = {"prompt_tokens": 100, "completion_tokens": 10}
            content = json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield endpoint
    endpoint.shutdown()
    thread.join()
    endpoint.server_close()


def judge_of(server, folder=None, **options):
    given = {
        "hosted_url": f"http://127.0.0.1:{server.server_port}/v1",
        "hosted_model": "big",
        "hosted_key": "JUDGE_KEY",
    }
    return HostedJudge(JudgeSettings(**{**given, **options}), folder, backoff=0.001)


def failure(status, message="no"):
    return status, {}, json.dumps({"error": {"message": message}}).encode()


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Good.\nRating: 2", 2),
        ("**Rating:** 1.", 1),
        ("rating: [[0]]", 0),
        ("I would not say Rating: 2.\nRating: 0", 0),
        ("Rating: 1.0", 1),
        ("Rating: 3", np.nan),
        ("Rating: 1.5", np.nan),
        ("Rating: 10", np.nan),
        ("2", np.nan),
        ("Rating: N", np.nan),
        ("Final rating (0-2): 2", 2),
        ("Rating:\n**2** - it is clear.", 2),
        ("Rating: 1 - one of 2", 1),
        ("Rating: -1", np.nan),
        ("Rating: 0, 1 or 2", np.nan),
        ("Rating: 0-2", np.nan),
        ("Rating: 1 to 2", np.nan),
        ("Rating: 1.5, 2", np.nan),
        ("", np.nan),
    ],
)
def test_ratings_are_read_from_the_last_line_that_gives_one(answer, score):
    assert rating(answer) == pytest.approx(score, nan_ok=True)


def test_three_questions_are_asked_with_the_text_the_concept_and_the_prompt(server):
    rate = {"concept": 2, "go on from": 1, "fluent": 0}
    server.reply = lambda text, n: next(f"Rating: {v}" for word, v in rate.items() if word in text.split("<text>")[0])
    scores = judge_of(server).measure(["Once {upon}"] * 2, [" a {0} time", " a ball"], "sports")
    assert {name: values.tolist() for name, values in scores.items()} == {
        "hosted_concept": [2, 2], "hosted_instruction": [1, 1], "hosted_fluency": [0, 0]
    }  # fmt: skip
    asked = [body["messages"][-1]["content"] for _, _, body in server.requests]
    assert sum("sports" in text for text in asked) == 2
    assert sum("<prompt>Once {upon}</prompt>" in text for text in asked) == 2
    assert sum("<text> a {0} time</text>" in text for text in asked) == 3
    for path, key, body in server.requests:
        assert path == "/v1/chat/completions"
        assert key == f"Bearer {KEY}"
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0, 200)


def test_scores_are_in_the_texts_order_and_requests_run_at_once(server):
    def reply(text, n):
        time.sleep(0.02 * (n % 3))
        return f"Rating: {text.split('<text>')[1][0]}"

    server.reply = reply
    texts = [f"{i % 3} and {i}" for i in range(20)]
    assert judge_of(server, hosted_concurrency=5).fluency(texts).tolist() == [i % 3 for i in range(20)]
    assert 1 < server.most <= 5


def test_answers_without_a_rating_are_counted_and_never_scored(server):
    server.reply = lambda text, n: "I cannot say." if "bad" in text else "Rating: 1"
    judge = judge_of(server)
    assert judge.fluency(["good", "bad 1", "bad 2"]).tolist() == pytest.approx([1, np.nan, np.nan], nan_ok=True)
    assert judge.usage.unparsable == 2
    server.reply = lambda text, n: (200, {}, json.dumps({"choices": [{"message": {"content": None}}]}).encode())
    assert np.isnan(judge.fluency(["a refusal"])).all()
    assert (judge.usage.unparsable, judge.usage.uncounted) == (3, 1)


def test_tokens_and_cost_are_counted(server):
    judge = judge_of(server, hosted_prompt_price=3.0, hosted_completion_price=15.0)
    judge.fluency(["a", "b", "b", "c"])  # equal texts are asked once
    report = judge.report()
    assert (report["asked"], report["prompt_tokens"], report["completion_tokens"]) == (3, 300, 30)
    assert report["cost"] == pytest.approx((300 * 3 + 30 * 15) / 1e6)
    assert KEY not in json.dumps(report)


def test_kept_answers_cost_nothing_and_hold_no_key(server, tmp_path):
    judge_of(server, tmp_path).fluency(["a", "b"])
    again = judge_of(server, tmp_path)
    assert again.fluency(["a", "b"]).tolist() == [2, 2]
    assert (again.usage.cached, again.usage.asked, again.usage.cost, len(server.requests)) == (2, 0, 0, 2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert all(KEY not in path.read_text() for path in files)
    files[0].write_text("{")  # damaged: asked again
    assert judge_of(server, tmp_path).fluency(["a", "b"]).tolist() == [2, 2]
    assert len(server.requests) == 3


@pytest.mark.parametrize("change", [{"hosted_model": "other"}, {"hosted_options": '{"temperature": 1}'}])
def test_an_answer_is_kept_for_its_model_and_options_alone(server, tmp_path, change):
    judge_of(server, tmp_path).fluency(["a"])
    judge_of(server, tmp_path, **change).fluency(["a"])
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "first",
    [
        failure(429),
        failure(500),
        failure(503),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
        (200, {"Content-Encoding": "gzip"}, b"no gzip"),
        (200, {}, b"[" * 100_000),
    ],
)
def test_a_busy_endpoint_is_asked_again(server, first):
    server.reply = lambda text, n: first if n < 3 else "Rating: 1"
    judge = judge_of(server)
    assert judge.fluency(["a"]).tolist() == [1]
    assert (judge.usage.retries, judge.usage.asked) == (2, 1)


def test_an_answer_with_odd_counts_of_tokens_is_scored(server):
    body = {"choices": [{"message": {"content": "Rating: 1"}}], "usage": [1]}
    server.reply = lambda text, n: (200, {}, json.dumps(body).encode())
    judge = judge_of(server)
    assert judge.fluency(["a"]).tolist() == [1]
    assert judge.usage.uncounted == 1


def test_halves_of_surrogate_pairs_are_sent_and_kept_as_the_replacement_character(server, tmp_path):
    server.reply = lambda text, n: "\ud83d Rating: 1"
    assert judge_of(server, tmp_path).fluency(["a \ud83d b \U0001f600"]).tolist() == [1]
    assert "a \ufffd b \U0001f600" in server.requests[0][2]["messages"][-1]["content"]
    assert judge_of(server, tmp_path).fluency(["a \ud83d b \U0001f600"]).tolist() == [1]
    assert len(server.requests) == 1
    server.reply = lambda text, n: failure(400, "no \udc00")
    with pytest.raises(InputError, match="status 400: no \ufffd"):
        judge_of(server).fluency(["a"])


def test_the_wait_that_an_endpoint_asks_for_is_kept(server):
    server.reply = lambda text, n: (429, {"Retry-After": "0.3"}, b"{}") if n == 1 else "Rating: 1"
    began = time.monotonic()
    judge_of(server).fluency(["a"])
    assert time.monotonic() - began >= 0.3


def test_a_slow_endpoint_is_given_up_and_asked_again(server):
    def reply(text, n):
        if n == 1:
            time.sleep(0.5)
        return "Rating: 1"

    server.reply = reply
    judge = judge_of(server, hosted_timeout=0.2)
    assert judge.fluency(["a"]).tolist() == [1]
    assert judge.usage.retries == 1


def test_an_endpoint_that_never_answers_ends_in_one_line_and_what_came_is_kept(server, tmp_path):
    server.reply = lambda text, n: failure(503, f"busy {KEY}") if "bad" in text else "Rating: 1"
    with pytest.raises(InputError, match=r"3 tries \(status 503: busy \*\*\*\).* so far are kept") as caught:
        judge_of(server, tmp_path, hosted_retries=2, hosted_concurrency=1).fluency(["good", "bad", "worse"])
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    server.reply = lambda text, n: "Rating: 2"
    assert judge_of(server, tmp_path).fluency(["good", "bad"]).tolist() == [1, 2]


def test_a_refused_request_is_not_sent_again_and_the_key_is_not_said(server):
    server.reply = lambda text, n: failure(401, f"Incorrect API key provided: {KEY}. " + "x" * 500)
    with pytest.raises(InputError, match=r"refuses the request .*provided: \*\*\*.*variable JUDGE_KEY") as caught:
        judge_of(server).fluency(["a"])
    assert KEY not in str(caught.value)
    assert len(str(caught.value)) < 700
    assert len(server.requests) == 1


def test_an_endpoint_of_ones_own_needs_no_key(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    judge_of(server).fluency(["a"])
    assert server.requests[0][1] is None


def test_nobody_there_is_one_line(monkeypatch):
    settings = JudgeSettings(hosted_url="http://127.0.0.1:9/v1", hosted_model="m", hosted_retries=1)
    with pytest.raises(InputError, match=r"at http://127\.0\.0\.1:9/v1 gave no answer in 2 tries") as caught:
        HostedJudge(settings, backoff=0.001).fluency(["a"])
    assert "are kept" not in str(caught.value)  # there is no folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hosted_url": None}, "acts only with --hosted-url"),
        ({"hosted_model": None}, "hosted_url needs hosted_model"),
        ({"hosted_url": "ftp://host/v1"}, "must be an address such as"),
        ({"hosted_url": "host/v1"}, "must be an address such as"),
        ({"hosted_url": "http://[bad/v1"}, "must be an address such as"),
        ({"hosted_url": "http://host:abc/v1"}, "must be an address such as"),
        ({"hosted_url": "http://\u2030/v1"}, "must be an address such as"),
        ({"hosted_url": "http://user:secret@host/v1"}, "no user, password, query or fragment: the API key belongs"),
        ({"hosted_url": "http://secret@host/v1"}, "no user, password"),
        ({"hosted_url": "http://host/v1?key=secret"}, "no user, password"),
        ({"hosted_url": "http://host/v1#secret"}, "no user, password"),
        ({"hosted_url": "user:secret@host/v1"}, "must be an address such as"),
        ({"hosted_key": "sk-secret"}, "name of an environment variable"),
        ({"hosted_key": ""}, "hosted_key must not be empty"),
        ({"hosted_options": "[1]"}, "must be a JSON object"),
        ({"hosted_options": "{"}, "must be a JSON object"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(InputError, match=words) as caught:
        HostedJudge(JudgeSettings(**{"hosted_url": "http://host/v1", "hosted_model": "m", **options}))
    assert "secret" not in str(caught.value)


def test_a_key_with_a_line_break_is_refused_without_saying_it(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-a\nb")
    with pytest.raises(InputError, match="JUDGE_KEY holds no API key") as caught:
        HostedJudge(JudgeSettings(hosted_url="http://host/v1", hosted_model="m", hosted_key="JUDGE_KEY"))
    assert "sk-a" not in str(caught.value)


def test_a_hosted_judge_is_admitted_by_labelled_texts(server):
    human = [("It says", " " + " ".join(f"word{i}{j}" for j in range(18))) for i in range(25)]
    texts = [f"a {'goal' if i % 2 else 'bank'} and number {i}" for i in range(60)]
    concept = Concept("sports", ["a"], ["b"], texts, [i % 2 for i in range(60)])

    def reply(text, n):
        question, text = text.split("<text>")
        words = text.removesuffix("</text>").split()
        if "concept" in question:
            return f"Rating: {2 * ('goal' in words)}"
        in_order = words == sorted(words, key=lambda w: (len(w), w)) and all(w.startswith("word") for w in words)
        return f"Rating: {2 * (in_order and len(set(words)) == len(words))}"

    server.reply = reply
    judge = judge_of(server, hosted_concurrency=4)
    found = judge.check(concept, human, n=20)
    assert set(found) == {"concept", "shuffled", "loops", "number_runs", "spliced"}
    assert all(found[name].value == 1 for name in ("concept", "shuffled", "loops", "number_runs"))
    assert (found["concept"].n, found["loops"].n) == (20, 20)
    # The two sides are no pairs, though as many: a text without a rating takes none of the other side along.
    server.reply = lambda text, n: "None." if "concept" in text and text.endswith("number 1</text>") else reply(text, n)
    assert judge_of(server).check(concept, human, n=20)["concept"].n == 19
    server.reply = lambda text, n: "None." if "concept" in text and text.endswith("number 0</text>") else reply(text, n)
    assert judge_of(server).check(concept, human, n=20)["concept"].n == 20
    server.requests.clear()
    server.reply = lambda text, n: reply(text, n) if n % 4 else "I cannot say."
    with pytest.raises(InputError, match=r"no rating in 25% of its answers .*\(concept\), expected 20% at most"):
        judge_of(server, hosted_concurrency=1).check(concept, human, n=20)
    server.reply = lambda text, n: "Rating: 1"
    with pytest.raises(InputError, match=r"AUROC 0\.50 on labelled texts \(concept\), expected 0\.90"):
        judge_of(server).check(concept, human, n=20)
