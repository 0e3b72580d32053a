"""Time limits and masked requests."""

import logging
import threading
from collections.abc import Callable

import pytest
import torch

from rewards import JPEGCompressibility, RewardBatch, RewardError, RewardOutput, WithTimeout, score
from tests.helpers.plain_rewards import Plain, batch_of, brightness


def failing_on(bad: int, how: Callable[[], None]) -> Callable[[RewardBatch], RewardOutput]:
    def answer(batch: RewardBatch) -> RewardOutput:
        if bad in batch.sample_ids:
            how()
        return brightness(batch)

    return answer


def boom() -> None:
    raise ValueError("boom")


def hang() -> None:
    threading.Event().wait(20)


def test_one_that_answers_in_time_is_the_reward_itself() -> None:
    batch, plain = batch_of(5), JPEGCompressibility()
    expected = score(plain, batch)
    for limited in (WithTimeout(plain), WithTimeout(plain, timeout=60, batch_size=2, on_error="mask")):
        output = score(limited, batch)
        assert limited.name == plain.name and torch.equal(output.scores, expected.scores) and output.valid.all()
        assert output.components.keys() == expected.components.keys() and output.info == expected.info
    assert (
        len(score(WithTimeout(plain, timeout=60), RewardBatch(prompts=[], images=torch.zeros(0, 3, 8, 8))).scores) == 0
    )


@pytest.mark.parametrize(
    ("how", "message"), [(boom, "ValueError: boom"), (hang, r"no answer on . samples within 0\.5 s")]
)
def test_a_request_that_fails_is_an_error_or_masks_its_own_samples(how, message: str, caplog) -> None:
    reward, batch = Plain(failing_on(3, how)), batch_of(6)
    with pytest.raises(RewardError, match=f"'plain' .*{message}"):
        score(WithTimeout(reward, timeout=0.5), batch)
    with caplog.at_level(logging.WARNING):
        output = score(WithTimeout(reward, timeout=0.5, batch_size=2, on_error="mask"), batch)
    assert output.valid[:, 0].tolist() == [True, True, False, False, True, True] and output.scores[2:4].isnan().all()
    assert torch.equal(output.components["red"][:2], batch.images[:2, 0].mean(dim=(1, 2)))
    assert output.components["red"][2:4].isnan().all() and "'plain'" in output.info[3] and "masked" in caplog.text
    with pytest.raises(RewardError, match="6 of 6"):  # all masked: nothing to learn from
        score(WithTimeout(reward, timeout=0.5, on_error="mask", batch_size=6), batch)


def test_an_answer_of_the_wrong_form_is_masked_too() -> None:
    short = Plain(lambda batch: brightness(batch) if len(batch) == 2 else brightness(batch.select([])))
    assert score(WithTimeout(short, batch_size=2, on_error="mask"), batch_of(5)).valid[:, 0].tolist() == [True] * 4 + [
        False
    ]


def test_gradients_stay_out_of_the_thread() -> None:
    batch = RewardBatch(prompts=["a"], images=torch.rand(1, 3, 4, 4, requires_grad=True))
    assert not score(WithTimeout(Plain(brightness), timeout=60), batch).scores.requires_grad


@pytest.mark.parametrize("bad", [{"on_error": "ignore"}, {"on_error": "mask"}, {"timeout": 0.0}, {"batch_size": 0}])
def test_settings_that_mean_nothing_are_named(bad: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*; expected"):
        WithTimeout(Plain(brightness), **bad)
