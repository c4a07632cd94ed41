"""The page of features from a small server on this machine, which also reads texts that are pasted into it.

Only this machine is answered, and only its own page: another page in the same browser is refused by the `Host` and
`Origin` of its requests. Nothing is written, and nothing is kept of a text.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glp_lens import lm
from glp_lens.artifacts import ActivationModel
from glp_lens.errors import InputError
from glp_lens.features.folder import FeatureFolder, ModelAbout
from glp_lens.features.sample import Sample, encode, norm_limits, options_of
from glp_lens.features.top import read
from glp_lens.types import Json

ADDRESS = "127.0.0.1"
MOST_BYTES = 64 * 1024
"""Of a request."""
_SECONDS = 20
"""That a connection may be silent."""
_AT_TOKEN, _OVER_TEXT = 5, 20
"""Features given of each model: the furthest from their mean at each token, and at any token."""
_FETCHES_NOTHING, _FETCHES_HERE = "connect-src 'none'", "connect-src 'self'"

Answer = Callable[[Json], Json]
"""From a question of the page to what it is told; raises InputError for what cannot be answered."""


class Reader:
    """Answers with the features of a text.

    Args:
        folder: of the features.
        model: the language model.
        trained: models of the folder by label, at their hook points.
        context: tokens that are read of a text, BOS included.
    """

    def __init__(
        self, folder: FeatureFolder, model: lm.Model, trained: Mapping[str, ActivationModel], context: int
    ) -> None:
        self.model, self.trained, self.context = model, trained, context
        self.abouts = {label: folder.model(label) for label in trained}
        self.seed = int(folder.about.settings.get("seed", 0))
        self.known = {}
        for label in trained:
            frame = folder.table(label, "features").sort_values("feature")
            columns = frame[["mean", "std", "min", "max"]].to_numpy(float, copy=True)
            self.known[label] = torch.from_numpy(columns)
        self.limits = norm_limits((self.abouts[label].hook, each) for label, each in trained.items())

    def __call__(self, question: Json) -> Json:
        """The features of `text`: of all models the furthest from their mean, or `feature` of `model` alone.

        Returns:
            `tokens`; `cut`, whether the text is longer than the context; `models`, of each its `label` and `features`,
            of each of these its number `feature`, `mean`, `std`, `largest` absolute value on the folder's texts, and
            `values` at all tokens, None at massive activations.

        Raises:
            InputError: a question without a text, or of an unknown model or feature.
        """
        text, label, feature = question.get("text"), question.get("model"), question.get("feature")
        if not isinstance(text, str):
            raise InputError("expected a text")
        if label is not None and label not in list(self.trained):  # a list does not hash
            raise InputError(f"no model {label!r} is open here: there are {', '.join(self.trained)}")
        labels = list(self.trained) if label is None else [label]
        hooks = [self.abouts[each].hook for each in labels]
        reading = read(self.model, text, hooks, self.context, self.limits)
        models = []
        for each in labels:
            about = self.abouts[each]
            sample = reading.at[about.hook]
            values = encode(self.trained[each], options_of(about), sample, self.seed)
            chosen = self._furthest(about, values) if feature is None else [_checked(about, feature)]
            features = [self._told(each, one, values[:, one], sample, len(reading.tokens)) for one in chosen]
            models.append({"label": each, "features": features})
        return {"tokens": reading.tokens, "cut": bool(reading.cut), "models": models}

    def _furthest(self, about: ModelAbout, values: Tensor) -> list[int]:
        if not len(values):
            return []
        mean, std = self.known[about.label][:, 0], self.known[about.label][:, 1]
        z = (values.double() - mean) / std
        z[:, ~(std > 0)] = 0
        z = z.abs() if about.signed else z
        at_token = z.topk(min(_AT_TOKEN, z.shape[1]), dim=1).indices.flatten()
        over_text = z.amax(dim=0).topk(min(_OVER_TEXT, z.shape[1])).indices
        return list(dict.fromkeys(torch.cat([over_text, at_token]).tolist()))

    def _told(self, label: str, feature: int, values: Tensor, sample: Sample, n: int) -> Json:
        mean, std, low, high = self.known[label][feature].tolist()
        every: list[float | None] = [None] * n
        for position, value in zip(sample.positions.tolist(), values.tolist(), strict=True):
            every[position - 1] = float(f"{value:.4g}")
        return {"feature": feature, "mean": mean, "std": std or 1.0, "largest": max(abs(low), abs(high)) or 1.0,
                "values": every}  # fmt: skip


def _checked(about: ModelAbout, feature: Any) -> int:
    if type(feature) is not int or not 0 <= feature < about.n_features:
        raise InputError(f"{about.label} has {about.n_features} features, counted from 0; got {feature!r}")
    return feature


def page_that_asks(path: Path) -> bytes:
    """A page that `write_page` wrote, which may ask the server that it came from.

    Raises:
        InputError: it is missing, or another page.
    """
    page = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if page.count(_FETCHES_NOTHING) != 1:
        raise InputError(f"{path} is no page of features of this version: make it with glp-lens features page")
    return page.replace(_FETCHES_NOTHING, _FETCHES_HERE).encode()


class Server(ThreadingHTTPServer):
    """A server of the page to this machine alone, which `serve_forever` runs.

    Args:
        answer: answers questions, one at a time.
        page: what is served.
        port: to listen at; 0 takes a free one.

    Raises:
        InputError: the port cannot be had.
    """

    def __init__(self, answer: Answer, page: bytes, port: int) -> None:
        self.answer, self.page, self.answering = answer, page, threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise InputError(f"cannot listen at port {port}: {error.strerror}; choose another --port") from None


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = _SECONDS
    server_version, sys_version = "glp-lens", ""

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        else:
            self._fail(HTTPStatus.NOT_FOUND, "there is only /")

    def do_POST(self) -> None:
        if self._refused():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/read":
            self._fail(HTTPStatus.NOT_FOUND, "texts are read at /read")
        elif self.headers.get_content_type() != "application/json":
            self._fail(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        elif "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            self._fail(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        elif len(length) > 9 or int(length) > MOST_BYTES:
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MOST_BYTES:,} bytes")
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, body: bytes) -> None:
        try:
            question = json.loads(body)
            if not isinstance(question, dict):
                raise InputError("expected an object")
            with self.server.answering:
                told = self.server.answer(question)
        except (ValueError, RecursionError) as error:  # InputError is a ValueError
            said = str(error) if isinstance(error, InputError) else "expected JSON"
            self._fail(HTTPStatus.BAD_REQUEST, said)
        else:
            self._send(HTTPStatus.OK, json.dumps(told).encode(), "application/json")

    def _refused(self) -> bool:
        """Whether it was another page, or another name of this machine, that asked."""
        port = self.server.server_address[1]
        hosts = [f"{name}:{port}" for name in (ADDRESS, "localhost")]
        origins = self.headers.get_all("Origin", [])
        ours = self.headers.get_all("Host", []) in [[host] for host in hosts]
        if ours and all(origin in [f"http://{host}" for host in hosts] for origin in origins):
            return False
        self._fail(HTTPStatus.FORBIDDEN, f"this server answers only its own page, at http://{hosts[0]}/")
        return True

    def _fail(self, status: HTTPStatus, why: str) -> None:
        self._send(status, json.dumps({"error": why}).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer", "Content-Security-Policy": "frame-ancestors 'none'",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""
