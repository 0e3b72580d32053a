"""A client of chat endpoints that take images (OpenAI's /v1/chat/completions, as vLLM and SGLang serve it)."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from rewards.base import RewardError

RECOVERABLE = {408, 429}  # and all from 500 on
OF_THE_ENDPOINT = {401: "set its key, see api_key_env", 404: "check url and model"}  # no sample can be scored
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries: doubled from one to the other, times 0.5 to 1
SHOWN = 200  # characters of an answer that a message shows
SECRET = 8  # a key shorter than that ("EMPTY") is none


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. The same question with the same seed should give the same answer (as far as the server keeps
    that). top_k: of vLLM and SGLang; None does not send it, since other endpoints refuse it."""

    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 42
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ValueError(f"got {self}; expected temperature >= 0, 0 < top_p <= 1 and max_tokens >= 1")


@dataclass(frozen=True)
class Question:
    """images: data URLs, which stand before the first text. turns: user, assistant, user, ... in turn. An even number of
    turns ends in the beginning of an answer that is to be continued (vLLM). top: of how many of the likeliest first
    tokens the probability is wanted, at most 20 with most servers."""

    images: tuple[str, ...]
    turns: tuple[str, ...]
    sampling: Sampling = field(default_factory=Sampling)
    top: int = 0


@dataclass(frozen=True)
class Answer:
    """text: what was said, "" with an error. error: why there is no answer. top: probability of the likeliest first tokens,
    by their text, {} unless the question wants them. cut: the text ended at max_tokens."""

    text: str = ""
    error: str = ""
    top: dict[str, float] = field(default_factory=dict)
    cut: bool = False


@dataclass(frozen=True)
class ChatEndpoint:
    """Where a judge is asked: `url` (http://host:8000/v1) serves `model`.

    api_key_env: the environment variable that holds the key; None sends none. concurrency: questions under way at a time.
    timeout: seconds of one try. retries: further tries, after a lost or late connection and the statuses 408, 429 and 500
    up, no sooner than Retry-After says; other statuses are final. budget: seconds of one call of `ask`, tries and waits of
    all its questions together; what is not answered by then has no answer. max_request, max_answer: bytes. extra: further
    fields of every request, such as {chat_template_kwargs: {enable_thinking: false}} (Qwen3.5).

    Proxies of the environment and redirects are not followed: both would get the key.
    ValueError for a url of another form, and by `load` if the variable of the key is not set."""

    url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 3
    budget: float = 300.0
    max_request: int = 32 * 2**20
    max_answer: int = 2**20
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
            shown = "***@" + self.url.rpartition("@")[2] if "@" in self.url else self.url.partition("?")[0]
            raise ValueError(
                f"got url={shown!r}; expected http://host:8000/v1 or https, without user and query: a key goes into an "
                "environment variable, which api_key_env names"
            )
        if min(self.concurrency, self.max_request, self.max_answer) < 1 or self.retries < 0:
            raise ValueError(f"got {self}; expected concurrency and sizes of at least 1, and retries >= 0")
        if not (0 < self.timeout < math.inf and 0 < self.budget < math.inf):
            raise ValueError(f"got timeout={self.timeout}, budget={self.budget}; expected seconds above 0")

    def load(self) -> None:
        """Reads the key, so that a missing one is found before the first question."""
        self._key()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer per question, in their order; equal questions are asked once.

        RewardError for a fault of the endpoint (a wrong key or model), not of a question."""
        distinct = list(dict.fromkeys(questions))
        if not distinct:
            return []
        call = _Call(self, self._key(), time.monotonic() + self.budget)
        pool = ThreadPoolExecutor(min(self.concurrency, len(distinct)), "judge")
        try:
            answers = dict(zip(distinct, pool.map(call.ask, distinct), strict=True))
        finally:
            call.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
        return [answers[question] for question in questions]

    def _key(self) -> str:
        """ "" without one. The messages do not show it."""
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not re.fullmatch(r"[!-~]+", key):
            what = "characters that no key has" if key else "nothing"
            raise ValueError(
                f"got {what} in the environment variable {self.api_key_env}; expected the key of {self.url}: export it, or "
                "set api_key_env to null"
            )
        return key


@dataclass(frozen=True)
class _Call:
    """One call of `ask`: what its threads share."""

    endpoint: ChatEndpoint
    key: str
    deadline: float
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, question: Question) -> Answer:
        body = json.dumps(_request(self.endpoint, question)).encode()
        if len(body) > self.endpoint.max_request:
            return Answer(
                error=f"got a request of {len(body)} bytes; expected at most max_request={self.endpoint.max_request}"
            )
        reason = "no time left"
        for attempt in range(self.endpoint.retries + 1):
            left = self.deadline - time.monotonic()
            if left <= 0 or self.stopped.is_set():
                break
            found, reason, wait = self._try(body, min(self.endpoint.timeout, left))
            if found is not None:
                return found
            wait = max(wait, min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.SystemRandom().uniform(0.5, 1))
            if attempt == self.endpoint.retries:
                return Answer(error=f"{reason}; {attempt + 1} tries")
            if wait > self.deadline - time.monotonic():
                return Answer(error=f"{reason}; the next try would be after the budget of {self.endpoint.budget:g} s")
            self.stopped.wait(wait)
        return Answer(error=f"{reason}; the budget of {self.endpoint.budget:g} s is spent")

    def _try(self, body: bytes, seconds: float) -> tuple[Answer | None, str, float]:
        """(the answer, or None if another try may help; why; seconds to wait at least)."""
        try:
            status, wait, data = _post(self.endpoint, self.key, body, seconds)
        except (OSError, HTTPException) as error:
            return None, f"{type(error).__name__}: {error}", 0.0
        text = data.decode("utf-8", "replace")
        if len(self.key) >= SECRET:
            text = text.replace(self.key, "***")  # some endpoints say which key was wrong
        if len(data) > self.endpoint.max_answer:
            return Answer(error=f"got more than max_answer={self.endpoint.max_answer} bytes"), "", 0.0
        if status == 200:
            return _read(text), "", 0.0
        reason = f"HTTP {status} {text[:SHOWN]!r}"
        if status in OF_THE_ENDPOINT:
            where = f"{self.endpoint.url}, model {self.endpoint.model!r}"
            raise RewardError(f"got {reason} from {where}: {OF_THE_ENDPOINT[status]}")
        return (None if status in RECOVERABLE or status >= 500 else Answer(error=reason)), reason, wait


def _request(endpoint: ChatEndpoint, question: Question) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [
        {"role": roles[number % 2], "content": text} for number, text in enumerate(question.turns)
    ]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in question.images]
    messages[0]["content"] = [*images, {"type": "text", "text": question.turns[0]}]
    sampling = {name: value for name, value in vars(question.sampling).items() if value is not None}
    top = {"logprobs": True, "top_logprobs": question.top} if question.top else {}
    begun = {} if len(messages) % 2 else {"continue_final_message": True, "add_generation_prompt": False}
    return {"model": endpoint.model, "messages": messages, **sampling, **top, **begun, **endpoint.extra}


def _post(endpoint: ChatEndpoint, key: str, body: bytes, seconds: float) -> tuple[int, float, bytes]:
    """(status, seconds of Retry-After, body of the answer, at most max_answer + 1 bytes).

    TimeoutError after `seconds` in all, however slowly the bytes drip: the socket is then shut."""
    parts, began = urlsplit(endpoint.url), time.monotonic()
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(str(parts.hostname), parts.port, timeout=seconds)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    try:
        connection.connect()
        with _shut_after(seconds, connection.sock):
            path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
            connection.request("POST", path, body, headers | ({"Authorization": f"Bearer {key}"} if key else {}))
            response = connection.getresponse()
            data = response.read(endpoint.max_answer + 1)
        if response.length and len(data) <= endpoint.max_answer:
            raise IncompleteRead(data, response.length)
        if time.monotonic() - began >= seconds:
            raise TimeoutError
        return response.status, _seconds(response.headers.get("Retry-After", "")), data
    except (OSError, HTTPException) as error:
        if time.monotonic() - began >= seconds:
            raise TimeoutError(f"no answer within {seconds:.3g} s") from error
        raise
    finally:
        connection.close()


@contextmanager
def _shut_after(seconds: float, sock: socket.socket) -> Iterator[None]:
    def shut() -> None:
        with suppress(OSError):  # it was closed in the meantime
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _seconds(retry_after: str) -> float:
    """Of the header: a number, or a date; 0 if it is neither."""
    try:
        return max(0.0, float(retry_after)) if math.isfinite(float(retry_after)) else 0.0
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # TypeError: a date without a zone
        return 0.0


def _read(body: str) -> Answer:
    """The first choice of a completion."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
        tokens = (choice.get("logprobs") or {}).get("content") or [{}]
        top: dict[str, float] = {}
        for one in tokens[0].get("top_logprobs") or []:  # two tokens may have one text
            top[one["token"]] = top.get(one["token"], 0.0) + math.exp(min(float(one["logprob"]), 0.0))
        if not all(map(math.isfinite, top.values())):
            raise ValueError("probabilities that are none")
        cut = choice.get("finish_reason") == "length"
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        return Answer(error=f"got {body[:SHOWN]!r}, no chat completion ({type(error).__name__})")
    if not isinstance(text, str):
        return Answer(error=f"got {body[:SHOWN]!r}, a completion without text")
    return Answer(text, "", top, cut)
