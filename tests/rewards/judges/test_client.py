"""The chat endpoint: what it sends, which faults are tried again and which are final, and that a key never shows."""

import re
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import torch

from rewards import RewardError
from rewards.judges import ChatEndpoint, Sampling, client
from rewards.judges.asking import data_urls
from rewards.judges.client import Question
from tests.helpers.judge_server import JudgeServer, Reply

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def question(text="How is it?", **options):
    return Question((), (text,), **options)


def one(*replies, **options):
    """The answer, and how many requests it took, of a judge that gives these replies in turn, the last one for ever."""
    script = list(replies)
    with JudgeServer(lambda asked: script.pop(0) if len(script) > 1 else script[0]) as judge:
        (answer,) = judge.endpoint(**{"retries": 2, **options}).ask([question()])
        return answer, len(judge.asked)


def test_a_request_holds_the_images_before_the_text_the_sampling_and_what_is_extra():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    sampling = Sampling(temperature=0.7, max_tokens=9, seed=43, top_p=0.9, top_k=20)
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with JudgeServer(lambda asked: "fine") as judge:
        asked = Question(tuple(data_urls(images)), ("look", "yes", "and now?"), sampling, top=20)
        (answer,) = judge.endpoint(extra=extra).ask([asked])
    (request,) = judge.asked
    assert answer.text == "fine" and request.path == "/v1/chat/completions" and request.key is None
    assert [
        torch.from_numpy(image).permute(2, 0, 1).equal(own) for image, own in zip(request.images, images, strict=True)
    ] == [True] * 2
    assert [(message["role"], text) for message, text in zip(request.body["messages"], request.turns, strict=True)] == [
        ("user", "look"), ("assistant", "yes"), ("user", "and now?"),
    ]  # fmt: skip
    rest = {name: value for name, value in request.body.items() if name != "messages"}
    assert rest == {"model": "judge", "temperature": 0.7, "max_tokens": 9, "seed": 43, "top_p": 0.9, "top_k": 20,
                    "logprobs": True, "top_logprobs": 20, **extra}  # fmt: skip


def test_an_even_number_of_turns_is_to_be_continued_and_top_k_is_sent_only_if_given():
    with JudgeServer(lambda asked: "good") as judge:
        judge.endpoint().ask([Question((), ("rate it", "it is"))])
    body = judge.asked[0].body
    assert body["continue_final_message"] and body["add_generation_prompt"] is False and "top_k" not in body


def test_answers_keep_the_order_of_questions_and_equal_ones_are_asked_once():
    with JudgeServer(lambda asked: Reply(asked.turns[0], wait=0.05 * (asked.turns[0] == "a"))) as judge:
        answers = judge.endpoint().ask([question(text) for text in "abcab"])
    assert [answer.text for answer in answers] == list("abcab") and len(judge.asked) == 3


def test_no_more_than_concurrency_are_under_way():
    together = threading.Barrier(2, timeout=5)
    with JudgeServer(lambda asked: (together.wait(), "x")[1]) as judge:  # each answer needs a second one beside it
        judge.endpoint(concurrency=2).ask([question(str(number)) for number in range(6)])
    assert judge.at_once == 2


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_status_that_may_pass_is_tried_again(status):
    answer, requests = one(Reply(status=status), Reply("well"))
    assert answer.text == "well" and requests == 2


@pytest.mark.parametrize("status", [302, 400, 403, 413, 422])
def test_another_status_is_final(status):
    answer, requests = one(Reply(status=status, raw=b"too many images", headers={"Location": "/v1"}))
    assert (answer.text, requests) == ("", 1) and f"HTTP {status} 'too many images'" in answer.error


@pytest.mark.parametrize(("status", "do"), [(401, "api_key_env"), (404, "check url and model")])
def test_a_fault_of_the_endpoint_is_raised_and_the_other_questions_are_not_asked(status, do):
    with JudgeServer(lambda asked: Reply(status=status)) as judge, pytest.raises(RewardError, match=do):
        judge.endpoint(concurrency=1).ask([question(str(number)) for number in range(50)])
    assert len(judge.asked) < 5


def test_tries_end_after_retries():
    answer, requests = one(Reply(status=503, raw=b"busy"))
    assert requests == 3 and answer.error == "HTTP 503 'busy'; 3 tries"


def test_a_cut_connection_is_tried_again():
    assert one(Reply("first", cut=True), Reply("second"))[0].text == "second"
    assert "IncompleteRead" in one(Reply("first", cut=True))[0].error


def test_nobody_listens():
    with JudgeServer(lambda asked: "x") as judge:
        endpoint = judge.endpoint(retries=1)
    (answer,) = endpoint.ask([question()])
    assert "ConnectionRefusedError" in answer.error and "2 tries" in answer.error


@pytest.mark.parametrize("slow", [Reply("x", wait=9.0), Reply("x" * 50, drip=0.1)])
def test_a_late_answer_is_none_however_slowly_it_drips(slow):
    began = time.monotonic()
    answer, _ = one(slow, timeout=0.2, retries=0)
    assert "no answer within 0.2 s" in answer.error and time.monotonic() - began < 3


def test_the_budget_bounds_all_tries_of_all_questions():
    began = time.monotonic()
    with JudgeServer(lambda asked: Reply("x", wait=9.0)) as judge:
        answers = judge.endpoint(timeout=5, budget=0.3, retries=9, concurrency=1).ask(
            [question(text) for text in "abc"]
        )
    assert time.monotonic() - began < 3 and not any(answer.text for answer in answers)
    assert re.search(r"no answer within 0[.]\d+ s; the next try would be after the budget of 0.3 s", answers[0].error)
    assert "the budget of 0.3 s is spent" in answers[2].error


def test_retry_after_is_waited_for_as_seconds_and_as_a_date():
    began = time.monotonic()
    assert one(Reply(status=429, headers={"Retry-After": "0.2"}), Reply("x"))[0].text == "x"
    assert time.monotonic() - began >= 0.2
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert 3590 < client._seconds(date) <= 3600 and client._seconds("soon") == client._seconds("nan") == 0


def test_a_wait_beyond_the_budget_is_not_waited_for():
    began = time.monotonic()
    answer, requests = one(Reply(status=429, headers={"Retry-After": "3600"}))
    assert requests == 1 and "after the budget of 300 s" in answer.error and time.monotonic() - began < 3


@pytest.mark.parametrize(
    "raw",
    [b"<html>", b"\xff\xfe", b"{}", b"[]", b"null", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}',
     b'{"choices": [{"message": {"content": [1]}}]}', b"[" * 100_000, b'{"choices": [{"message": "x"}]}',
     b'{"choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"top_logprobs": [{"token": "a", "logprob": NaN}]}]}}]}'],
)  # fmt: skip
def test_garbage_is_no_answer_and_not_asked_for_again(raw):
    answer, requests = one(Reply(raw=raw))
    assert answer.text == "" and answer.error.startswith("got ") and len(answer.error) < 600 and requests == 1


def test_sizes_are_limited():
    answer, _ = one(Reply("x" * 5000), max_answer=1000)
    assert answer.error == "got more than max_answer=1000 bytes"
    answer, requests = one(Reply("x"), max_request=50)
    assert "expected at most max_request=50" in answer.error and requests == 0


def test_probabilities_of_tokens_with_one_text_are_added():
    tops = b'[{"token": "yes", "logprob": -0.6931471805599453}, {"token": "yes", "logprob": -1.3862943611198906}]'
    raw = b'{"choices": [{"message": {"content": "yes"}, "logprobs": {"content": [{"top_logprobs": ' + tops + b"}]}}]}"
    assert one(Reply(raw=raw))[0].top == {"yes": pytest.approx(0.75)}


def test_a_key_is_sent_and_never_shown(monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    with JudgeServer(lambda asked: Reply(status=int(asked.turns[0]), raw=f"bad key {KEY}".encode())) as judge:
        endpoint = judge.endpoint(api_key_env="JUDGE_KEY")
        (answer,) = endpoint.ask([question("400")])
        with pytest.raises(RewardError) as error:
            endpoint.ask([question("401")])
    assert judge.asked[0].key == f"Bearer {KEY}" and "bad key ***" in answer.error
    assert KEY not in f"{endpoint!r} {answer} {error.value} {caplog.text}"


@pytest.mark.parametrize("value", [None, "", "two words", "line\nbreak"])
def test_a_key_that_is_none_is_refused_by_load_without_showing_it(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY; expected the key of http://a/v1") as error:
        ChatEndpoint("http://a/v1", "m", api_key_env="JUDGE_KEY").load()
    assert not value or value not in str(error.value)


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert one(Reply("x"))[0].text == "x"


@pytest.mark.parametrize("url", ["ftp://a/v1", "a/v1", "http:///v1", "http://me:secret@a/v1", "http://a/v1?key=secret"])
def test_a_url_of_another_form_is_refused(url):
    with pytest.raises(ValueError, match="expected http://host:8000/v1") as error:
        ChatEndpoint(url, "m")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}, {"budget": float("inf")}])
def test_wrong_limits_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ChatEndpoint("http://a/v1", "m", **wrong)
