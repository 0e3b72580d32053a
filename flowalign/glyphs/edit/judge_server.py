"""The rule-based judge of Glyphs edits behind a chat endpoint (OpenAI's /v1/chat/completions), as rewards.ChatEndpoint asks one."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowalign.glyphs.edit.judge import answer, chance_of_yes

PATH = "/v1/chat/completions"
LONGEST = 2**20  # bytes of a request; one of two pictures has about 6,000
LEAST = 1e-6  # of a probability, whose logarithm is sent


class GlyphsJudge(ThreadingHTTPServer):
    """`with GlyphsJudge(port) as judge`: answers in threads of its own until the end; port 0 takes a free one, `judge.url` says which.

    A request that wants probabilities of first tokens (`logprobs`) gets those of "yes" and "no", PARM's; another one EditScore's JSON
    with two numbers. What cannot be judged is a status 400 with the reason. One picture is judged at a time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, port: int = 0, score_range: int = 25) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.score_range, self.one_at_a_time = score_range, threading.Lock()

    def __enter__(self) -> GlyphsJudge:
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def completion(self, body: Any) -> dict[str, Any]:
        """The answer to a request; ValueError for one that cannot be judged."""
        pictures, turns = read_request(body)
        with self.one_at_a_time:  # RapidOCR's engine is not documented as safe in threads
            if not body.get("logprobs"):
                return {"message": {"role": "assistant", "content": answer(pictures, turns, self.score_range)}}
            yes = min(max(chance_of_yes(pictures, turns), LEAST), 1 - LEAST)
        likeliest = sorted({"yes": yes, "no": 1 - yes}.items(), key=lambda each: -each[1])
        top = [{"token": token, "logprob": math.log(chance)} for token, chance in likeliest]
        message = {"role": "assistant", "content": top[0]["token"]}
        return {"message": message, "logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


def read_request(body: Any) -> tuple[list[Tensor], list[str]]:
    """(pictures [3, H, W] in [0, 1], the texts of the messages in turn). ValueError for another form."""
    try:
        contents = [message["content"] for message in body["messages"]]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        turns = [_text(content) for content in contents]
        pictures = [_picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"got a request of another form ({type(error).__name__}: {error}); expected messages"
        ) from error
    if len(pictures) not in (1, 2) or not turns:
        raise ValueError(
            f"got {len(pictures)} pictures in {len(turns)} messages; expected source and result, or the result"
        )
    return pictures, turns


def _text(content: str | Sequence[dict[str, Any]]) -> str:
    return (
        content if isinstance(content, str) else "\n".join(part["text"] for part in content if part["type"] == "text")
    )


def _picture(url: str) -> Tensor:
    kind, _, data = url.partition(",")
    if kind != "data:image/png;base64":
        raise ValueError(f"got an image {kind[:60]!r}; expected data:image/png;base64")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of a broken PNG
        raise ValueError(f"got an image that cannot be read ({error}); expected a whole PNG") from error


class _Handler(BaseHTTPRequestHandler):
    server: GlyphsJudge
    disable_nagle_algorithm = True  # else every body waits 40 ms for the client's ACK

    def do_POST(self) -> None:
        if self.path != PATH:
            return self._send(404, {"error": {"message": f"got {self.path}; expected {PATH}"}})
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LONGEST:
            return self._send(413, {"error": {"message": f"got {length or 'no'} bytes; expected at most {LONGEST}"}})
        try:
            choice = self.server.completion(json.loads(self.rfile.read(int(length))))
        except ValueError as error:
            return self._send(400, {"error": {"message": str(error)}})
        return self._send(
            200, {"object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop", **choice}]}
        )

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None: ...
