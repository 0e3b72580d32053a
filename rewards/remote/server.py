"""A reward served over HTTP: GET /v1/info and /v1/health, POST /v1/score. Client: `rewards.Http`.

Requests and answers are messages of `rewards.remote.wire`. Headers: Authorization (Bearer), Flowalign-Protocol,
Flowalign-Request (an id: asked again, the same answer comes back), Flowalign-Fingerprint (of the reward that is meant),
Flowalign-Seconds (how long the client waits). What a header can decide is decided before the body is read. Statuses: 400 no
message of this protocol, 401 no token, 403 a wrong one, 404, 409 another reward, 411, 413 too large, 415, 422 the reward
cannot score this batch, 429 too many at once, 500 a defect here (an id, no traceback), 503 not now.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import signal
import socketserver
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from rewards.base import Reward, RewardError, spec_of
from rewards.guard import close, load, score
from rewards.remote import wire
from rewards.remote.description import fingerprint

logger = logging.getLogger(__name__)
KEPT = 256  # answers that are kept for requests that come again
DRAINED = 2**26  # bytes that are read of a body that was refused
IDLE = 30.0  # seconds in which a client has to send something


class Refused(Exception):
    """A request that gets no scores: the status, and a sentence for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(eq=False)
class Service:
    """A loaded reward that answers bytes with bytes, one batch at a time.

    queue: how many requests may be read, waiting or scored together; the next ones are refused with 429."""

    reward: Reward
    limits: wire.Limits = field(default_factory=wire.Limits)
    queue: int = 8
    fingerprint: str = ""
    _answers: OrderedDict[tuple[str, bytes], Future[bytes]] = field(default_factory=OrderedDict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.fingerprint = self.fingerprint or fingerprint(self.reward)
        self.slots = threading.BoundedSemaphore(self.queue)

    def info(self) -> dict[str, Any]:
        """What a client reads before it asks."""
        spec = spec_of(self.reward)
        return {
            "protocol": wire.PROTOCOL, "reward": self.reward.name, "fingerprint": self.fingerprint,
            "inputs": spec.inputs, "scope": spec.scope, "channels": spec.channels,
            "range": spec.range and [bound if math.isfinite(bound) else None for bound in spec.range],
            "licence": spec.licence, "limits": asdict(self.limits),
        }  # fmt: skip

    def answer(self, request: str, body: bytes, seconds: float) -> bytes:
        """The output on the batch `body`; the one kept if `request` asked with the same bytes before. Refused."""
        key = (request, hashlib.sha256(body).digest())
        with self._lock:
            known = self._answers.get(key)
            mine = self._answers.setdefault(key, Future())
            while len(self._answers) > KEPT:
                self._answers.popitem(last=False)
        if known is not None:
            try:
                return known.result(seconds)
            except TimeoutError as error:
                raise Refused(503, "the first request of this id is still being answered") from error
        try:
            mine.set_result(self._score(body, seconds))
        except BaseException as error:
            with self._lock:
                self._answers.pop(key, None)  # the next one may fare better
            mine.set_exception(error)
            raise
        return mine.result()

    def _score(self, body: bytes, seconds: float) -> bytes:
        try:
            batch = wire.decode_batch(body, self.limits)
        except wire.WireError as error:
            raise Refused(413 if isinstance(error, wire.TooLarge) else 400, str(error)) from error
        if not self._turn.acquire(timeout=seconds):
            raise Refused(503, f"no turn within {seconds:g} s")
        try:
            return wire.encode_output(score(self.reward, batch, max_fail_rate=1.0))
        except RewardError as error:
            raise Refused(422, str(error)) from error
        finally:
            self._turn.release()


class Listener(socketserver.ThreadingTCPServer):
    """Listens for requests to `service`, one thread each. Closing it waits for those that are being answered.

    ValueError for an interface other than loopback without a token."""

    allow_reuse_address = True
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, service: Service, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        if not token and not _is_loopback(host):
            raise ValueError(f"got host={host!r} without a token; expected 127.0.0.1, or a token: anyone could ask")
        self.service, self.token = service, token
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server_address[:2])

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.info("a request of %s ended early", client_address, exc_info=True)


def serve(listener: Listener, ready: Callable[[str], object] = print) -> None:
    """Loads the reward and serves it until SIGTERM or Ctrl-C; requests that are being answered then are answered.

    Runs in the main thread. ready: gets a sentence with the address once requests are answered. RewardError if the reward does
    not load."""
    reward = listener.service.reward

    def stop(number: int, frame: object) -> None:
        threading.Thread(target=listener.shutdown).start()  # it waits for serve_forever, which this thread is in

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        load(reward)
        for number in former:
            signal.signal(number, stop)
        ready(f"reward {reward.name!r} (fingerprint {listener.service.fingerprint}) at {listener.url}")
        listener.serve_forever(poll_interval=0.1)
    finally:
        listener.server_close()
        for number, handler in former.items():
            signal.signal(number, handler)
        close(reward)


class _Handler(BaseHTTPRequestHandler):
    server: Listener
    timeout = IDLE
    server_version, sys_version = "flowalign-reward", ""

    def do_GET(self) -> None:
        info = json.dumps(self.server.service.info()).encode()
        self._reply((lambda: info) if self.path in ("/v1/info", "/v1/health") else _not_found, "application/json")

    def do_POST(self) -> None:
        self._reply(self._scores if self.path == "/v1/score" else _not_found, wire.MEDIA_TYPE)

    def _scores(self) -> bytes:
        service, headers = self.server.service, self.headers
        if headers.get("Content-Type") != wire.MEDIA_TYPE:  # no form of a browser can send this
            raise Refused(415, f"got Content-Type {headers.get('Content-Type')}; expected {wire.MEDIA_TYPE}")
        if headers.get("Flowalign-Protocol") != wire.PROTOCOL:
            raise Refused(400, f"got protocol {headers.get('Flowalign-Protocol')}; expected {wire.PROTOCOL}")
        if headers.get("Flowalign-Fingerprint") != service.fingerprint:
            raise Refused(409, f"got fingerprint {headers.get('Flowalign-Fingerprint')}; this is {service.fingerprint}")
        request = headers.get("Flowalign-Request", "")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", request):
            raise Refused(
                400, f"got Flowalign-Request {request!r:.200}; expected an id of at most 100 letters and digits"
            )
        length, seconds = self._length(), _number(headers.get("Flowalign-Seconds"))
        if length > service.limits.total_bytes:
            raise Refused(413, f"got {length} bytes; expected at most {service.limits.total_bytes}")
        if not service.slots.acquire(blocking=False):
            raise Refused(429, f"got more than {service.queue} requests at once")
        try:
            began = time.monotonic()
            body = self.rfile.read(length)
            self._left = 0
            if len(body) < length:
                raise Refused(400, f"got {len(body)} of {length} bytes")
            return service.answer(request, body, max(0.0, seconds - (time.monotonic() - began)))
        finally:
            service.slots.release()

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "")
        if not text.isdecimal() or len(text) > 15 or "Transfer-Encoding" in self.headers:
            raise Refused(411, f"got Content-Length {text!r}; expected the number of bytes, sent in one piece")
        return int(text)

    def _authorize(self) -> None:
        if self.server.token is None:
            return
        given = self.headers.get("Authorization")
        if given is None:
            raise Refused(401, "got no token; expected Authorization: Bearer TOKEN")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.server.token}".encode()):
            raise Refused(403, "got a wrong token")

    def _reply(self, make: Callable[[], bytes], kind: str) -> None:
        """What `make` gives, which is of the media type `kind`, or why there is nothing."""
        text = self.headers.get("Content-Length", "")
        self._left = int(text) if text.isdecimal() and len(text) < 16 else 0  # bytes of the body that are not read
        try:
            self._authorize()
            status, body = 200, make()
        except Refused as refused:
            status, kind, body = refused.status, "application/json", _error(str(refused))
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            number = uuid.uuid4().hex[:8]
            logger.exception("error %s", number)
            status, kind, body = 500, "application/json", _error(f"the server failed; its log has error {number}")
        self._drain()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if kind == wire.MEDIA_TYPE:
            for name in ("Flowalign-Request", "Flowalign-Fingerprint"):  # checked by now
                self.send_header(name, self.headers[name])
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def _drain(self) -> None:
        """Reads what the client still sends, within a limit: else the reply would be lost with the connection."""
        left = min(self._left, DRAINED)
        while left > 0 and (part := self.rfile.read(min(left, 2**16))):
            left -= len(part)

    def log_message(self, format: str, *args: Any) -> None:
        logger.info("%s %s", self.address_string(), format % args)


def _not_found() -> bytes:
    raise Refused(404, "expected GET /v1/info, GET /v1/health or POST /v1/score")


def _error(message: str) -> bytes:
    return json.dumps({"error": {"message": message}}).encode()


def _number(text: str | None) -> float:
    """Seconds of a header; a minute without."""
    try:
        return min(3600.0, max(0.0, float(text or 60)))
    except ValueError as error:
        raise Refused(400, f"got Flowalign-Seconds {text!r:.40}; expected a number") from error


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
