"""A chat endpoint on this machine, in a thread: scripted answers and faults for tests of rewards.judges."""

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

from rewards.judges import ChatEndpoint


@dataclass(frozen=True)
class Asked:
    """A request as it came. images: uint8 [H, W, 3]; turns: the texts of the messages."""

    body: dict[str, Any]
    path: str
    key: str | None

    @property
    def turns(self) -> list[str]:
        contents = [message["content"] for message in self.body["messages"]]
        return [text if isinstance(text, str) else text[-1]["text"] for text in contents]

    @property
    def images(self) -> list[np.ndarray]:
        urls = [part["image_url"]["url"] for part in self.body["messages"][0]["content"][:-1]]
        assert all(url.startswith("data:image/png;base64,") for url in urls)
        return [np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


@dataclass(frozen=True)
class Reply:
    """top: probabilities of first tokens. raw: the body in place of a completion. wait: seconds before the answer. cut: the
    connection ends in the middle of the body. drip: seconds between the bytes of the body."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    top: dict[str, float] = field(default_factory=dict)
    raw: bytes | None = None
    wait: float = 0.0
    cut: bool = False
    drip: float = 0.0
    finish: str = "stop"

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        tops = [{"token": token, "logprob": math.log(p)} for token, p in self.top.items()]
        choice = {
            "message": {"content": self.text},
            "finish_reason": self.finish,
            "logprobs": {"content": [{"top_logprobs": tops}]},
        }
        return json.dumps({"choices": [choice]}).encode()


class JudgeServer:
    """`with JudgeServer(answer) as judge`: every request is given to `answer(asked)`, whose Reply (or text) is sent.

    asked: the requests so far. at_once: the most that were being answered at one time."""

    def __init__(self, answer: Callable[[Asked], Reply | str]) -> None:
        self.answer, self.asked = answer, list[Asked]()
        self.at_once = self.under_way = 0
        self.lock = threading.Lock()
        self.http = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self) -> "JudgeServer":
        threading.Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def endpoint(self, **options: Any) -> ChatEndpoint:
        return ChatEndpoint(**{"url": self.url, "model": "judge", "retries": 0, "timeout": 10.0} | options)


def _handler(judge: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        disable_nagle_algorithm = True  # else every body waits 40 ms for the client's ACK

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked = Asked(body, self.path, self.headers.get("Authorization"))
            with judge.lock:
                judge.asked.append(asked)
                judge.under_way += 1
                judge.at_once = max(judge.at_once, judge.under_way)
            try:
                try:
                    said = judge.answer(asked)
                finally:
                    with judge.lock:
                        judge.under_way -= 1  # before the reply, which lets the client ask again
                self.send(said if isinstance(said, Reply) else Reply(said))
            except OSError:
                pass  # the client has gone

        def send(self, reply: Reply) -> None:
            time.sleep(reply.wait)
            body = reply.body()
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if reply.drip:
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.drip)
            self.wfile.write(body[: len(body) // 2] if reply.cut else body)

        def log_message(self, format: str, *args: object) -> None: ...

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


def in_every_protocol(asked: Asked) -> Reply:
    """An answer that each of our judges can read, which grows with the brightness of the last image."""
    shades = [float(image.mean()) / 255 for image in asked.images]
    last, better = shades[-1], 1 + (shades[0] < shades[-1])
    axes = [f"{axis} Score (1-5): {1 + 4 * last}" for axis in ("Alignment", "Coherence", "Style")]
    shares = [
        f"{axis} Score:\n Image 1: {2 - better}\n Image 2: {better - 1}" for axis in ("Alignment", "Coherence", "Style")
    ]
    wise = [f"{axis}: {2 * last}" for axis in ("Consistency", "Realism", "Aesthetic Quality")]
    numbers = f'{{"reasoning": "bright", "score": [{25 * last}, {20 * last}]}}'
    tags = [
        f"Final Score: {1 + 4 * last}",
        f"<Score>{1 + 4 * last}</Score>",
        f"<answer>Image {better} is better</answer>",
    ]
    halves = {"yes": last / 2, "no": (1 - last) / 2, "excellent": last / 2, "bad": (1 - last) / 2}
    return Reply("\n".join([*axes, *shares, *wise, numbers, *tags]), top=halves)


@cache
def bright_judge() -> ChatEndpoint:
    """One that answers `in_every_protocol`, as long as this process lives."""
    return JudgeServer(in_every_protocol).__enter__().endpoint()
