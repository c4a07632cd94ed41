"""A hosted language model behind an OpenAI-compatible endpoint: requests, tries, kept answers, cost."""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from glp_lens.errors import InputError, one_line
from glp_lens.files import Kind, read_json, write_json
from glp_lens.settings import Settings, option

if TYPE_CHECKING:
    import httpx

    from glp_lens.types import Json

_FILE = Kind("hosted answer", "delete it to ask again", quiet=True)
_AGAIN = {408, 409, 425, 429}
"""Statuses, besides those from 500, after which the same request may succeed."""
_LONGEST_WAIT = 60.0


def _json_object(value: object) -> str:
    try:
        read = json.loads(value) if isinstance(value, str) else value
        if not isinstance(read, dict):
            raise TypeError
        return json.dumps(read, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError):
        raise InputError(f"hosted_options must be a JSON object, got {value!r}") from None


def _check_address(url: str) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # a bracket that is not closed, or a port that is no number
        raise InputError("hosted_url must be an address such as https://host/v1: its host or port is none") from None
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise InputError(
            "hosted_url must have no user, password, query or fragment: the API key belongs into the environment "
            "variable that hosted_key names"
        )
    if parts.scheme not in ("http", "https") or not host:
        raise InputError("hosted_url must be an address such as https://host/v1: begin with https:// or http://")


@dataclass(frozen=True, kw_only=True)
class EndpointSettings(Settings):
    """Which hosted language model is asked, and how."""

    panel: ClassVar[str] = "Hosted model"
    acts_with: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("hosted_model", "hosted_key", "hosted_options", "hosted_concurrency", "hosted_timeout", "hosted_retries",
         "hosted_prompt_price", "hosted_completion_price"), "hosted_url",
    )  # fmt: skip

    hosted_url: str | None = None
    """OpenAI-compatible endpoint, such as https://host/v1."""
    hosted_model: str | None = None
    """Model that the endpoint is asked for."""
    hosted_key: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's API key."""
    hosted_options: str = option('{"max_tokens": 200, "temperature": 0}', parse=_json_object)
    """What else is in a request to the endpoint, as a JSON object."""
    hosted_concurrency: int = option(8, min=1)
    """Requests at once."""
    hosted_timeout: float = option(60.0, min=0.001)
    """Seconds after which a request is given up and sent again."""
    hosted_retries: int = option(5, min=0)
    """How often a request is sent again."""
    hosted_prompt_price: float = option(0.0, min=0)
    """Price of a million tokens sent."""
    hosted_completion_price: float = option(0.0, min=0)
    """Price of a million tokens received."""

    def __post_init__(self) -> None:
        """Check each setting, and the endpoint's address and key."""
        super().__post_init__()
        # Neither message repeats what was given: it may hold the key itself.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.hosted_key):
            raise InputError(
                "hosted_key must be the name of an environment variable, such as OPENAI_API_KEY, which holds the API "
                "key: what was given is no such name"
            )
        if self.hosted_url is not None:
            _check_address(self.hosted_url)
            if not self.hosted_model:
                raise InputError("hosted_url needs hosted_model, the model that the endpoint is asked for")


@dataclass
class Usage:
    """What an endpoint has been asked so far.

    Attributes:
        asked: requests that were answered now.
        cached: answers that an earlier run had kept.
        retries: requests that were sent again.
        unparsable: answers without what was asked for, such as a rating: they are counted and not scored.
        uncounted: answers now without a count of tokens, whose cost is not known.
        prompt_tokens: sent now.
        completion_tokens: received now.
        cost: of these tokens, in the currency of the prices.
    """

    asked: int = 0
    cached: int = 0
    retries: int = 0
    unparsable: int = 0
    uncounted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Endpoint:
    """Asks an OpenAI-compatible endpoint, several requests at once, and keeps each answer.

    Answers lie in `folder`, each under the key that its request was given. The API key is read from an environment
    variable, and is in no file and no message.

    Args:
        settings: `hosted_url` and `hosted_model` must be given.
        folder: of the answers; None keeps none.
        what: what messages call it.
        backoff: seconds before the second try, about twice as many before each further one.

    Raises:
        InputError: settings without an endpoint, or the `httpx` package is missing.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        folder: str | Path | None = None,
        *,
        what: str = "hosted model",
        backoff: float = 1.0,
    ) -> None:
        if not settings.hosted_url or not settings.hosted_model:
            raise InputError(f"a {what} needs hosted_url (such as https://host/v1) and hosted_model")
        self.settings, self.what, self.backoff = settings, what, backoff
        self.usage = Usage()
        self.options: Json = json.loads(settings.hosted_options)
        self._folder = None if folder is None else Path(folder)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._key = _key(settings.hosted_key)
        self._client = _client(settings, self._key, what)

    def request(self, system: str, content: str) -> Json:
        """A request of one message, with instructions in front of it."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": _valid(content)}]
        return {"model": self.settings.hosted_model, "messages": messages, **self.options}

    def answers(self, requests: Mapping[str, Json], *, desc: str, unit: str = "text") -> dict[str, str]:
        """The answer to each request, by its key: a hash of all that the answer depends on.

        Raises:
            InputError: the endpoint refuses a request, or gives no answer in all tries. Answers so far are kept.
        """
        answers: dict[str, str] = {}
        self._stop.clear()
        pool = ThreadPoolExecutor(self.settings.hosted_concurrency)
        try:
            with tqdm(total=len(requests), desc=desc, unit=unit, mininterval=2) as bar:
                for key, answer in zip(requests, pool.map(self._answer, requests, requests.values()), strict=True):
                    answers[key] = answer
                    bar.update()
        finally:
            self._stop.set()  # of those that wait for another try
            pool.shutdown(cancel_futures=True)
        return answers

    def _answer(self, key: str, request: Json) -> str:
        path = None if self._folder is None else self._folder / key[:2] / f"{key}.json"
        if path is not None:
            try:
                answer = read_json(path, _FILE, key)["answer"]
            except (InputError, KeyError):
                answer = None  # none yet, or a damaged one
            if isinstance(answer, str):
                with self._lock:
                    self.usage.cached += 1
                return answer
        answer, usage = self._ask(key, request)
        if path is not None:
            write_json(path, {"answer": answer, "usage": usage}, _FILE, key)
        return answer

    def _ask(self, key: str, request: Json) -> tuple[str, Json]:
        """The answer to a request, sent again while the endpoint is busy or cannot be reached."""
        import httpx

        tries, jitter, reason = self.settings.hosted_retries + 1, random.Random(key), ""
        for attempt in range(tries):
            wait = min(self.backoff * 2**attempt, _LONGEST_WAIT) * jitter.uniform(0.5, 1)
            try:
                response = self._client.post("chat/completions", json=request)
            except httpx.RequestError as error:  # no connection, or a body that cannot be decoded
                reason = f"{type(error).__name__}: {error}"
            except httpx.InvalidURL as error:
                raise self._error(f"has no usable address ({error})") from None
            else:
                if response.is_success:
                    parsed = _parsed(response)
                    if parsed is not None:
                        self._count(parsed[1])
                        return self._hidden(parsed[0]), parsed[1]
                    reason = "the answer is no chat completion"
                else:
                    reason = f"status {response.status_code}: {_said(response)}"
                    if response.status_code not in _AGAIN and response.status_code < 500:
                        raise self._error(f"refuses the request ({reason})")
                    wait = max(wait, _retry_after(response))
            if attempt + 1 < tries:
                with self._lock:
                    self.usage.retries += 1
                if self._stop.wait(wait):
                    break
        raise self._error(f"gave no answer in {tries} tries ({reason})")

    def _error(self, what: str) -> InputError:
        kept = "" if self._folder is None else "; answers so far are kept, and the same command goes on from them"
        return InputError(
            f"the {self.what} at {self.settings.hosted_url} {one_line(Exception(self._hidden(what)), 300)}: "
            f"check hosted_url, hosted_model and the environment variable {self.settings.hosted_key}{kept}"
        )

    def _hidden(self, text: str) -> str:
        """The text without the API key: some endpoints say which one they do not know."""
        return text.replace(self._key, "***") if self._key else text

    def _count(self, usage: Json) -> None:
        sent, received = usage["prompt_tokens"], usage["completion_tokens"]
        with self._lock:
            self.usage.asked += 1
            if sent is None or received is None:
                self.usage.uncounted += 1
                return
            self.usage.prompt_tokens += sent
            self.usage.completion_tokens += received
            prices = (self.settings.hosted_prompt_price, self.settings.hosted_completion_price)
            self.usage.cost += (sent * prices[0] + received * prices[1]) / 1e6

    def report(self) -> Json:
        """What it has done so far, for results."""
        return asdict(self.usage)


def _key(variable: str) -> str:
    """The API key in an environment variable; empty if there is none, which an endpoint of one's own may not need."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(f"the environment variable {variable} holds no API key: it has spaces or unusual characters")
    return key


def _client(settings: EndpointSettings, key: str, what: str) -> httpx.Client:
    try:
        import httpx
    except ImportError:
        raise InputError(f"a {what} needs the httpx package: pip install 'glp-lens[hosted]'") from None
    url = (settings.hosted_url or "").rstrip("/") + "/"
    limits = httpx.Limits(max_connections=settings.hosted_concurrency)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.Client(base_url=url, headers=headers, timeout=settings.hosted_timeout, limits=limits)
    except httpx.InvalidURL as error:
        raise InputError(
            f"hosted_url must be an address such as https://host/v1, got {url[:-1]!r} ({one_line(error)})"
        ) from None


def _valid(text: str) -> str:
    """The text with half of a surrogate pair, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parsed(response: httpx.Response) -> tuple[str, Json] | None:
    """Text and counted tokens of a chat completion; None if it is none. A refusal without a text is an empty answer."""
    try:
        body: Any = response.json()
        text = body["choices"][0]["message"].get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    usage = body.get("usage")
    counts = {
        name: usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")
    }
    counted = {name: n if isinstance(n, int) else None for name, n in counts.items()}
    return _valid(text) if isinstance(text, str) else "", counted


def _said(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = response.text
    return _valid(str(message))


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the endpoint asks to wait, at most a minute; 0 if it does not, or gives a date."""
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), _LONGEST_WAIT)
    except ValueError:
        return 0.0
