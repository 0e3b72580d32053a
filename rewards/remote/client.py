"""A reward behind HTTP: on another machine, or shared by several runs (`flowalign serve-reward`)."""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import time
import uuid
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, urlsplit

from rewards.base import Reward, RewardBatch, RewardError, RewardOutput, RewardSpec, channels_of
from rewards.parts import in_chunks, spec_elsewhere
from rewards.remote import wire
from rewards.remote.description import fingerprint

logger = logging.getLogger(__name__)
LATER = (429, 503)  # the server asks to come again
MAYBE = (500, 502, 504)  # tried twice more
REPLY_BYTES = 2**26


@dataclass(frozen=True)
class _Reply:
    status: int
    headers: Any
    body: bytes

    def problem(self) -> str:
        """What the server says of an error."""
        try:
            said = json.loads(self.body)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = f"{len(self.body)} bytes that are no message of a reward server"
        return f"status {self.status}: {str(said)[:500]}"


@dataclass(eq=False)
class Http:
    """`reward`, asked at the server `url`: the same name, scores, components and messages, bit for bit; without gradients.

    `reward` says what is expected there: its name and spec hold here, it is never loaded here, and a server with another
    class or other arguments is refused (its `fingerprint`). Where they differ rightly, by the path of the weights, say, give
    the server's fingerprint, which the error names.

    token_env: the environment variable with the server's token. timeout: seconds for one request of `batch_size` samples
    (None: as many as the server takes). budget: seconds for a whole batch, with repetitions. Repeated are, with growing
    pauses: requests that do not arrive, are cut or late, and statuses 429, 503 (and 500, 502, 504, twice). A repeated request
    has the same id, so the server scores it once. Anything else, and the end of the budget, is a RewardError, never a score;
    rewards.WithTimeout can mask it. Environment proxies and redirects are not followed. ValueError for what is no URL.
    """

    reward: Reward
    url: str = "http://127.0.0.1:8765"
    fingerprint: str | None = None
    token_env: str | None = None
    timeout: float = 120.0
    budget: float = 300.0
    batch_size: int | None = None
    _limits: wire.Limits | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self._place()
        if not 0 < self.timeout <= self.budget:
            raise ValueError(
                f"got timeout={self.timeout}, budget={self.budget}; expected 0 < timeout <= budget, in seconds"
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"got batch_size={self.batch_size}; expected at least 1, or None")
        self.fingerprint = self.fingerprint or fingerprint(self.reward)

    @property
    def name(self) -> str:
        """The reward's."""
        return self.reward.name

    @property
    def spec(self) -> RewardSpec:
        """The reward's, not differentiable."""
        return spec_elsewhere(self.reward)

    def load(self) -> None:
        """Waits for the server, at most `budget` seconds, and checks what it serves. RewardError if that is another reward."""
        self._load(time.monotonic() + self.budget)

    def close(self) -> None:
        """Nothing is kept but what the server said of itself."""
        self._limits = None

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        end = time.monotonic() + self.budget
        limits = self._load(end)
        size = min(self.batch_size or limits.samples, limits.samples)
        return self._in_chunks(batch, size, limits, end)

    def _load(self, end: float) -> wire.Limits:
        if self._limits is not None:
            return self._limits
        reply = self._request("GET", "/v1/info", b"", {}, end)
        try:
            info = json.loads(reply.body)
            protocol, served, limits = info["protocol"], info["fingerprint"], wire.Limits(**info["limits"])
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(
                f"got {reply.body[:80]!r} from {self.url}; expected a reward server of {wire.PROTOCOL}"
            ) from error
        if protocol != wire.PROTOCOL:
            raise RewardError(
                f"got protocol {protocol} from {self.url}; expected {wire.PROTOCOL}: take one version on both sides"
            )
        if served != self.fingerprint:
            raise RewardError(
                f"got reward {info.get('reward')!r} with fingerprint {served} from {self.url}; expected {self.name!r} with "
                f"{self.fingerprint}: serve the same class and arguments, or accept the difference by fingerprint={served}"
            )
        self._limits = limits
        return limits

    def _ask(self, batch: RewardBatch, limits: wire.Limits, end: float) -> RewardOutput:
        body = wire.encode_batch(batch)
        if len(body) > limits.total_bytes and len(batch) > 1:
            return self._halves(batch, limits, end)
        headers = {"Flowalign-Request": str(uuid.uuid4()), "Flowalign-Fingerprint": str(self.fingerprint)}
        reply = self._request("POST", "/v1/score", body, headers, end)
        if reply.status == 413:
            if len(batch) < 2:
                raise RewardError(f"{self.url} takes not even one sample, {reply.problem()}")
            return self._halves(batch, limits, end)
        if any(reply.headers.get(name) != value for name, value in headers.items()):
            raise RewardError(f"got an answer to another request from {self.url}; expected {headers}: not used")
        try:
            output = wire.decode_output(reply.body, len(batch))
        except wire.WireError as error:
            raise RewardError(f"the answer of {self.url} is not used: {error}") from error
        if output.channels != channels_of(self.reward):
            raise RewardError(f"got channels {output.channels} from {self.url}; expected {channels_of(self.reward)}")
        return output

    def _halves(self, batch: RewardBatch, limits: wire.Limits, end: float) -> RewardOutput:
        if self.spec.groupwise and len(set(batch.group_ids)) < 2:
            raise RewardError(
                f"{self.url} takes not even one group, of {len(batch)} samples, at once: raise its limits"
            )
        return self._in_chunks(batch, -(-len(batch) // 2), limits, end)

    def _in_chunks(self, batch: RewardBatch, size: int, limits: wire.Limits, end: float) -> RewardOutput:
        return in_chunks(lambda part: self._ask(part, limits, end), batch, size, groupwise=self.spec.groupwise)

    def _request(self, method: str, path: str, body: bytes, headers: dict[str, str], end: float) -> _Reply:
        """The reply with status 200 or 413; others are repeated if that can help, until `end`."""
        problem, tries, defects = "not asked", 0, 0
        while (left := end - time.monotonic()) > 0:
            wait = 0.0
            try:
                reply = self._send(method, path, body, headers, min(self.timeout, left))
            except (OSError, HTTPException) as error:
                problem = f"{type(error).__name__}: {error}".removesuffix(": ")
            else:
                if reply.status in (200, 413):
                    return reply
                problem, wait = reply.problem(), _seconds(reply.headers.get("Retry-After"))
                defects += reply.status in MAYBE
                if reply.status not in LATER + MAYBE or defects > 2:
                    raise RewardError(f"{self.url} refuses, {problem}")
            pause = max(wait, 0.1 * 2 ** min(tries, 6) * random.SystemRandom().uniform(0.5, 1.5))
            tries += 1
            logger.warning("%s: %s; asked again", self.url, problem)
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
        raise RewardError(
            f"{self.url} gave no answer within {self.budget:g} s, asked {tries} times; the last time {problem}"
        )

    def _send(self, method: str, path: str, body: bytes, headers: dict[str, str], seconds: float) -> _Reply:
        """One request; OSError or HTTPException if it gets no whole reply in time."""
        end = time.monotonic() + seconds
        place = self._place()
        kind = HTTPSConnection if place.scheme == "https" else HTTPConnection
        connection = kind(str(place.hostname), place.port, timeout=seconds)
        own = {
            "Content-Type": wire.MEDIA_TYPE,
            "Flowalign-Protocol": wire.PROTOCOL,
            "Flowalign-Seconds": f"{seconds:.3f}",
        }
        try:
            connection.request(
                method, place.path.rstrip("/") + path, body or None, own | headers | self._authorization()
            )
            with connection.getresponse() as response:  # which may own the socket
                return _whole(response, end)
        finally:
            connection.close()

    def _authorization(self) -> dict[str, str]:
        if self.token_env is None:
            return {}
        token = os.environ.get(self.token_env, "")
        if not token:
            raise RewardError(
                f"got no token: the environment variable {self.token_env} is not set; expected the server's"
            )
        return {"Authorization": f"Bearer {token}"}

    def _place(self) -> SplitResult:
        place = urlsplit(self.url)
        extra = [place.username, place.query, place.fragment]
        if place.scheme not in ("http", "https") or not place.hostname or any(extra) or place.port == 0:
            raise ValueError(
                f"got url={self.url!r}; expected http://host:port or https://host:port (a token goes by token_env)"
            )
        return place


def _whole(response: http.client.HTTPResponse, end: float) -> _Reply:
    parts: list[bytes] = []
    while part := response.read1(2**16):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError("the reply took too long")
        if sum(map(len, parts)) > REPLY_BYTES:
            raise RewardError(f"got a reply above {REPLY_BYTES} bytes; expected scores")
    if response.length:  # of Content-Length, what did not come
        raise http.client.IncompleteRead(b"", response.length)
    return _Reply(response.status, response.headers, b"".join(parts))


def _seconds(text: str | None) -> float:
    """Of Retry-After, at most a minute; a date counts as nothing."""
    return min(60.0, float(text)) if text is not None and text.isdecimal() else 0.0
