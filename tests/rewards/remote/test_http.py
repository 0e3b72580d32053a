"""A reward behind HTTP: the same bits as in this process, and for each way in which a server can fail nothing lost, no wrong
number, and a clear message."""

import json
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import Http, Mix, RewardBatch, RewardError, RewardOutput, WithTimeout, score
from rewards.remote import wire
from rewards.remote.server import Listener, Service, serve
from tests.helpers.plain_rewards import Plain
from tests.helpers.remote_rewards import Spread, mixed_batch, same

TOKEN = "a token of many characters"


@contextmanager
def served(service: Service, **options: Any) -> Iterator[Listener]:
    listener = Listener(service, **options)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield listener
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Listener]:
    with served(Service(Spread(3.0))) as listener:
        yield listener


def post(url: str, body: bytes, **headers: str | None) -> tuple[int, Any]:
    """Status and body of a request by hand; headers given as None are left out, __ stands for -."""
    host, port = url.removeprefix("http://").split(":")
    connection = HTTPConnection(host, int(port), timeout=20)
    own = {
        "Content-Type": wire.MEDIA_TYPE, "Flowalign-Protocol": wire.PROTOCOL, "Flowalign-Request": "1",
        "Flowalign-Fingerprint": Service(Spread(3.0)).fingerprint,
    }  # fmt: skip
    given = own | {name.replace("__", "-"): value for name, value in headers.items()}
    connection.request("POST", "/v1/score", body, {name: value for name, value in given.items() if value is not None})
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    return reply.status, data


# ------------------------------------------------------------------------------------------ what it is for


def test_scores_are_those_of_this_process_bit_for_bit(server: Listener) -> None:
    same(score(Http(Spread(3.0), server.url), mixed_batch()), score(Spread(3.0), mixed_batch()))
    same(score(Http(Spread(3.0), server.url, batch_size=4), mixed_batch(11)), score(Spread(3.0), mixed_batch(11)))
    mixed = [Mix([reward], [0.3]) for reward in (Http(Spread(3.0), server.url), Spread(3.0))]
    same(*(score(reward, mixed_batch()) for reward in mixed))
    assert score(Http(Spread(3.0), server.url), mixed_batch().select([])).scores.shape == (0, 1)


def test_it_is_not_differentiable(server: Listener) -> None:
    assert Http(Spread(3.0), server.url).spec.differentiable is False
    with pytest.raises(RewardError, match="expected a differentiable reward"):
        score(Http(Spread(3.0), server.url), mixed_batch(), grad=True)


def test_another_reward_is_refused_and_can_be_accepted_by_its_fingerprint(server: Listener) -> None:
    with pytest.raises(RewardError, match=r"got reward 'spread' with fingerprint (\w+) .* expected 'spread'"):
        Http(Spread(2.0), server.url).load()
    accepted = Http(Spread(2.0), server.url, fingerprint=server.service.fingerprint)
    same(score(accepted, mixed_batch()), score(Spread(3.0), mixed_batch()))


def test_what_the_reward_says_when_it_fails_arrives_and_is_not_asked_again(server: Listener) -> None:
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"refuses, status 422: reward 'spread' failed.*OSError: no weights here"):
        score(Http(Spread(3.0), server.url), RewardBatch(prompts=["raise"], images=torch.rand(1, 3, 4, 4)))
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://host", "http://", "http://me:secret@host", "http://host/?q=1", "file:///x"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected http://host:port"):
        Http(Spread(), url)
    with pytest.raises(ValueError, match="Port out of range"):
        Http(Spread(), "http://127.0.0.1:99999")


# ------------------------------------------------------------------------------------------ what the server refuses


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (400, {"Flowalign__Protocol": "flowalign-reward/2"}),
        (400, {"Flowalign__Request": None}),
        (400, {"Flowalign__Request": "1\r\n Set-Cookie: a=b"}),
        (400, {"Flowalign__Seconds": "soon"}),
        (409, {"Flowalign__Fingerprint": "0" * 16}),
        (409, {"Flowalign__Fingerprint": None}),
        (411, {"Content__Length": "-1"}),
        (411, {"Content__Length": "1_0"}),
        (411, {"Transfer__Encoding": "chunked"}),
        (413, {"Content__Length": "99999999999"}),
        (415, {"Content__Type": "text/plain"}),
    ],
)
def test_headers_are_checked_before_the_body_is_read(
    server: Listener, status: int, headers: dict, monkeypatch: Any
) -> None:
    monkeypatch.setattr("rewards.remote.server.DRAINED", 0)
    monkeypatch.setattr(wire, "decode_batch", lambda *arguments: pytest.fail("read"))
    got, body = post(server.url, b"", **headers)
    assert got == status and ("expected" in body.decode() or "this is" in body.decode())


@pytest.mark.parametrize("cut", [0, 10], ids=["nothing", "a part"])
def test_a_body_that_is_cut_is_refused_and_the_next_one_answered(server: Listener, cut: int) -> None:
    body = wire.encode_batch(mixed_batch())
    with socket.create_connection(server.server_address[:2], timeout=20) as client:
        lines = [
            "POST /v1/score HTTP/1.0", f"Content-Type: {wire.MEDIA_TYPE}", f"Flowalign-Protocol: {wire.PROTOCOL}",
            "Flowalign-Request: cut", f"Flowalign-Fingerprint: {server.service.fingerprint}", f"Content-Length: {len(body)}",
        ]  # fmt: skip
        client.sendall("\r\n".join([*lines, "", ""]).encode() + body[:cut])
        client.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: client.recv(2**16), b""))
    assert b" 400 " in reply.splitlines()[0] and f"got {cut} of {len(body)} bytes".encode() in reply
    same(score(Http(Spread(3.0), server.url), mixed_batch()), score(Spread(3.0), mixed_batch()))


class Harm:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_and_garbage_execute_nothing(server: Listener, tmp_path: Path) -> None:
    pickled = pickle.dumps(Harm(tmp_path / "harmed"))
    for body in (pickled, b"", os.urandom(1000), b"\0" * 8, pickled * 1000):
        status, reply = post(server.url, body)
        assert status == 400 and "Traceback" not in reply.decode() and json.loads(reply)["error"]["message"]
    assert post(server.url, pickled, Content__Type="application/x-pickle")[0] == 415
    assert not (tmp_path / "harmed").exists()
    same(score(Http(Spread(3.0), server.url), mixed_batch()), score(Spread(3.0), mixed_batch()))  # and it goes on


def test_a_token_is_asked_for_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(Service(Spread(3.0)), token=TOKEN) as listener:
        monkeypatch.setenv("SECRET", TOKEN)
        reward = Http(Spread(3.0), listener.url, token_env="SECRET")
        same(score(reward, mixed_batch()), score(Spread(3.0), mixed_batch()))
        monkeypatch.setenv("SECRET", TOKEN[:-1])
        with pytest.raises(RewardError, match="status 403: got a wrong token"):
            score(reward, mixed_batch())
        with pytest.raises(RewardError, match="status 401: got no token"):
            Http(Spread(3.0), listener.url).load()
        monkeypatch.delenv("SECRET")
        with pytest.raises(RewardError, match="variable SECRET is not set"):
            Http(Spread(3.0), listener.url, token_env="SECRET").load()


def test_another_interface_needs_a_token() -> None:
    for host in ("0.0.0.0", "192.0.2.1", "reward.example"):
        with pytest.raises(ValueError, match="without a token; expected 127"):
            Listener(Service(Spread()), host=host)


def test_a_defect_of_the_server_is_an_id_and_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Service):
        def answer(self, request: str, body: bytes, seconds: float) -> bytes:
            raise ZeroDivisionError("in /secret/place.py")

    with served(Broken(Spread(3.0))) as listener, caplog.at_level(logging.ERROR):
        status, body = post(listener.url, b"")
    assert status == 500 and b"secret" not in body and b"Traceback" not in body
    number = json.loads(body)["error"]["message"].split()[-1]
    assert f"error {number}" in caplog.text and "in /secret/place.py" in caplog.text


# ------------------------------------------------------------------------------------------ ids, queue, drain


def counted(seconds: float = 0.0) -> tuple[Service, list[int]]:
    """A service whose reward answers with how often it was asked, and counts."""
    asked: list[int] = []

    def answer(batch: RewardBatch) -> RewardOutput:
        asked.append(len(batch))
        time.sleep(seconds)
        return RewardOutput(torch.full((len(batch),), float(len(asked))), torch.ones(len(batch), dtype=torch.bool))

    return Service(Plain(answer), fingerprint=Service(Spread(3.0)).fingerprint), asked


def test_a_request_that_comes_again_is_scored_once() -> None:
    service, asked = counted(0.2)
    body = wire.encode_batch(mixed_batch())
    answers: list[bytes] = []
    threads = [threading.Thread(target=lambda: answers.append(service.answer("id", body, 30))) for _ in range(3)]
    for thread in threads:
        thread.start()  # while the first is being scored, too
    for thread in threads:
        thread.join()
    assert len({*answers, service.answer("id", body, 30)}) == 1 and asked == [6]
    service.answer("other", body, 30)
    service.answer("id", wire.encode_batch(mixed_batch(5)), 30)  # the same id by mistake: no answer on another batch
    assert asked == [6, 6, 5]


def test_too_many_requests_at_once_come_again_later_and_none_is_lost() -> None:
    service, asked = counted(0.1)
    service.queue, service.slots = 1, threading.BoundedSemaphore(1)
    with served(service) as listener:
        rewards = [Http(Plain(len), listener.url, fingerprint=service.fingerprint) for _ in range(2)]
        outputs: list[RewardOutput] = []
        threads = [threading.Thread(target=lambda each=each: outputs.append(each(mixed_batch()))) for each in rewards]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(float(output.scores[0]) for output in outputs) == [1, 2] and asked == [6, 6]


send = HTTPConnection.request


def checked_length(self: HTTPConnection, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> None:
    assert len(body or b"") <= 4000
    send(self, method, path, body, headers)


def test_a_batch_above_the_limits_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    service, asked = counted()
    service.limits = wire.Limits(samples=4)
    with served(service) as listener:
        reward = Http(Plain(len), listener.url, fingerprint=service.fingerprint)
        assert len(reward(mixed_batch(11)).scores) == 11 and asked == [4, 4, 3]
        asked.clear()
        service.limits = wire.Limits(total_bytes=4000)  # of which this client only learns by 413
        assert len(reward(mixed_batch(8)).scores) == 8 and sum(asked) == 8 and max(asked) < 4
        asked.clear()
        reward.close()
        monkeypatch.setattr("rewards.remote.client.HTTPConnection.request", checked_length)
        assert len(reward(mixed_batch(8)).scores) == 8 and sum(asked) == 8 and max(asked) < 4
        reward._limits = None
        monkeypatch.undo()
        service.limits = wire.Limits(total_bytes=400)
        with pytest.raises(RewardError, match=r"takes not even one sample, status 413: got .* bytes"):
            score(reward, mixed_batch())


def test_sigterm_lets_a_request_finish() -> None:
    service, asked = counted(0.5)
    listener = Listener(service)
    outputs: list[RewardOutput] = []
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def ask() -> None:
        outputs.append(Http(Plain(len), listener.url, fingerprint=service.fingerprint)(mixed_batch()))

    def stop() -> None:
        while not asked:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threads = [threading.Thread(target=each) for each in (ask, stop)]
    said: list[str] = []

    def ready(sentence: str) -> None:
        said.append(sentence)
        for thread in threads:
            thread.start()

    serve(listener, ready)
    for thread in threads:
        thread.join()
    assert len(outputs) == 1 and outputs[0].scores.flatten().tolist() == [1.0] * 6
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert listener.url in said[0] and service.fingerprint in said[0]
    with pytest.raises(OSError):
        socket.create_connection(listener.server_address[:2], timeout=1)


# ------------------------------------------------------------------------------------------ servers that fail

Fault = Callable[[socket.socket, bytes], None]  # gets the connection and the whole request


def plain(status: int, body: bytes = b"", **headers: str) -> Fault:
    lines = [f"HTTP/1.0 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('__', '-')}: {value}" for name, value in headers.items()]
    return lambda connection, request: connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)


def echoing(change: Callable[[bytes], bytes]) -> Fault:
    """The right answer, its body changed."""

    def answer(connection: socket.socket, request: bytes) -> None:
        head, body = request.split(b"\r\n\r\n", 1)
        names = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
        data = change(Service(Spread(3.0)).answer("x", body, 9))
        same_names = {name.replace("-", "__"): names[name] for name in ("Flowalign-Request", "Flowalign-Fingerprint")}
        plain(200, data, **same_names)(connection, request)

    return answer


def cut(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\nxxxx")


def silent(connection: socket.socket, request: bytes) -> None:
    time.sleep(1.0)


def dripping(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\n")
    for _ in range(40):
        connection.sendall(b"x")
        time.sleep(0.05)


def endless(connection: socket.socket, request: bytes) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(100):
        connection.sendall(b"x" * 2**16)


def with_scores(*scores: float) -> Callable[[bytes], bytes]:
    values = torch.tensor(scores, dtype=torch.float32)[:, None]
    return lambda body: wire.encode_output(
        RewardOutput(values, torch.ones_like(values, dtype=torch.bool), channels=("spread",))
    )


def of_version_2(body: bytes) -> bytes:
    return body.replace(b"flowalign-reward/1", b"flowalign-reward/2")


right = echoing(lambda body: body)


@contextmanager
def failing(*faults: Fault) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers the n-th POST with the n-th fault, the last one for ever; (url, the requests)."""
    requests: list[bytes] = []
    info = json.dumps(Service(Spread(3.0)).info()).encode()
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # the client has gone
                answer(connection)

    def answer(connection: socket.socket) -> None:
        request = whole_request(connection)
        if request.startswith(b"GET"):
            return plain(200, info)(connection, request)
        requests.append(request)
        return faults[min(len(requests), len(faults)) - 1](connection, request)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield "http://{}:{}".format(*listening.getsockname()), requests
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def whole_request(connection: socket.socket) -> bytes:
    data = b""
    while True:
        head, found, body = data.partition(b"\r\n\r\n")
        lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        if found and len(body) >= (int(lengths[0].split(b":")[1]) if lengths else 0):
            return data
        part = connection.recv(2**16)
        if not part:
            return data
        data += part


def ids(requests: list[bytes]) -> list[bytes]:
    return [line for request in requests for line in request.split(b"\r\n") if line.startswith(b"Flowalign-Request")]


RECOVERS: list[tuple[str, Fault]] = [
    ("cut", cut),
    ("closed without an answer", lambda connection, request: None),
    ("no HTTP", lambda connection, request: connection.sendall(os.urandom(100))),
    ("429", plain(429, Retry__After="0")),
    ("503", plain(503, b"<html>busy</html>")),
    ("500", plain(500)),
    ("502", plain(502)),
    ("silent", silent),
    ("dripping", dripping),
]


@pytest.mark.parametrize("fault", [fault for _, fault in RECOVERS], ids=[name for name, _ in RECOVERS])
def test_what_can_recover_is_asked_again_under_the_same_id(fault: Fault) -> None:
    with failing(fault, right) as (url, requests):
        slow = fault in (silent, dripping)
        output = score(Http(Spread(3.0), url, timeout=0.5 if slow else 20, budget=60), mixed_batch())
    same(output, score(Spread(3.0), mixed_batch()))
    assert len(requests) >= 2 and len(set(ids(requests))) == 1


FAILS: list[tuple[str, Fault, str, int]] = [
    ("400", plain(400), "refuses, status 400", 1),
    ("403", plain(403, b'{"error": {"message": "got a wrong token"}}'), "status 403: got a wrong token", 1),
    ("404", plain(404), "refuses, status 404", 1),
    ("409", plain(409), "refuses, status 409", 1),
    ("a redirect", plain(302, Location="http://127.0.0.1:1/"), "refuses, status 302", 1),
    ("500 for ever", plain(500, b"[1]"), "status 500: 3 bytes that are no message", 3),
    ("garbage", echoing(lambda body: os.urandom(500)), "is not used: got", 1),
    ("a pickle", echoing(lambda body: pickle.dumps([1.0] * 6)), "is not used: got", 1),
    ("another version", echoing(of_version_2), "flowalign-reward/2.*take one version on both sides", 1),
    ("too few", echoing(with_scores(1, 2, 3)), r"an answer on \[3\] samples.*expected 6", 1),
    ("too many", echoing(with_scores(*range(7))), r"an answer on \[7\] samples.*expected 6", 1),
    ("out of range", echoing(with_scores(*range(10, 16))), "expected 0 to 10, the range of its spec", 1),
    ("all NaN", echoing(with_scores(*[float("nan")] * 6)), "6 of 6 samples have no score.*the score is nan", 1),
    ("no headers", plain(200, b"1"), "an answer to another request", 1),
    ("endless", endless, "a reply above 65536 bytes", 1),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "said", "times"), [row[1:] for row in FAILS], ids=[row[0] for row in FAILS])
def test_what_cannot_recover_is_an_error_and_never_a_number(
    fault: Fault, said: str, times: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr("rewards.remote.client.REPLY_BYTES", 2**16)
    with failing(fault) as (url, requests):
        reward = Http(Spread(3.0), url, timeout=20, budget=60)
        with pytest.raises(RewardError, match=f"(?s)reward 'spread'.*{said}"):
            score(reward, mixed_batch())
        assert len(requests) == times
        if fault is not FAILS[-3][1]:  # whose NaN are valid answers of single samples
            masked = WithTimeout(reward, on_error="mask", batch_size=6)(mixed_batch())
            assert not masked.valid.any() and bool(masked.scores.isnan().all())


def test_a_nan_among_numbers_is_an_invalid_sample() -> None:
    with failing(echoing(with_scores(1, 2, float("nan"), 3, float("inf"), 4))) as (url, _):
        output = score(Http(Spread(3.0), url), mixed_batch())
    assert output.valid[:, 0].tolist() == [True, True, False, True, False, True]
    assert bool(output.scores[~output.valid].isnan().all())


def test_after_the_budget_it_is_an_error_with_the_last_reason() -> None:
    with failing(plain(503, b'{"error": {"message": "loading"}}')) as (url, requests):
        began = time.monotonic()
        with pytest.raises(
            RewardError, match=r"gave no answer within 0\.5 s, asked \d+ times; the last time status 503: loading"
        ):
            score(Http(Spread(3.0), url, timeout=0.5, budget=0.5), mixed_batch())
        assert time.monotonic() - began < 10 and len(requests) >= 1
    with pytest.raises(RewardError, match=r"gave no answer within 0\.2 s.*Connection"):
        Http(Spread(3.0), url, timeout=0.2, budget=0.2).load()


def test_a_wait_that_a_server_asks_for_is_kept(monkeypatch: Any) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rewards.remote.client.time.sleep", waits.append)
    with failing(plain(429, Retry__After="7"), plain(503), right) as (url, requests):
        same(score(Http(Spread(3.0), url, budget=60, timeout=20), mixed_batch()), score(Spread(3.0), mixed_batch()))
    assert len(requests) == 3 and waits[0] == 7 and 0 < waits[1] < 1


def test_a_long_wait_that_a_server_asks_for_ends_with_the_budget() -> None:
    with failing(plain(429, Retry__After="3600")) as (url, requests):
        with pytest.raises(RewardError, match="status 429"):
            score(Http(Spread(3.0), url, timeout=0.5, budget=0.5), mixed_batch())
        assert len(requests) == 1


def test_a_server_that_starts_again_is_waited_for_and_another_reward_at_its_place_is_refused() -> None:
    with served(Service(Spread(3.0))) as first:
        reward = Http(Spread(3.0), first.url, budget=60, timeout=20)
        expected = score(reward, mixed_batch())
        port = int(first.server_address[1])
    outputs: list[RewardOutput] = []
    thread = threading.Thread(target=lambda: outputs.append(reward(mixed_batch())))
    thread.start()
    time.sleep(0.1)  # nobody listens
    with served(Service(Spread(3.0)), port=port):
        thread.join()
    assert torch.equal(outputs[0].scores.view(torch.int32), expected.scores.view(torch.int32))
    with served(Service(Spread(2.0)), port=port), pytest.raises(RewardError, match="status 409: got fingerprint"):
        score(reward, mixed_batch())


def test_two_clients_get_each_their_own(server: Listener) -> None:
    outputs: dict[int, RewardOutput] = {}

    def ask(seed: int) -> None:
        outputs[seed] = Http(Spread(3.0), server.url, batch_size=3)(mixed_batch(7, seed))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        expected = score(Spread(3.0), mixed_batch(7, seed))
        assert torch.equal(outputs[seed].valid, expected.valid)
        torch.testing.assert_close(outputs[seed].scores, expected.scores, rtol=0, atol=0, equal_nan=True)
