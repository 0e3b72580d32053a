"""EMA: the closed form of the average, exact swaps, exact restore."""

import pytest
import torch
from torch.nn import Parameter

from flowalign.models.ema import EMA
from flowalign.storage.checkpoint import CheckpointError


def walk(ema, parameter, values):
    for value in values:
        parameter.data.fill_(value)
        ema.update()


def test_constant_decay_has_its_closed_form():
    parameter = Parameter(torch.full((2,), 5.0))
    ema = EMA([("w", parameter)], decay=0.9)
    values = [1.0, -2.0, 4.0, 0.5, 3.0]
    walk(ema, parameter, values)
    n = len(values)
    expected = 0.9**n * 5.0 + sum(0.1 * 0.9 ** (n - 1 - k) * value for k, value in enumerate(values))
    torch.testing.assert_close(ema.tensors()["w"], torch.full((2,), expected), rtol=1e-6, atol=0)


def test_shadows_are_fp32_and_keep_what_bf16_cannot():
    parameter = Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    ema = EMA([("w", parameter)], decay=0.999)
    walk(ema, parameter, [2.0])
    assert ema.tensors()["w"].dtype == torch.float32
    assert ema.tensors()["w"].item() == pytest.approx(1.001, abs=1e-7)  # bf16 rounds this back to 1
    with ema.applied():
        assert parameter.dtype == torch.bfloat16 and parameter.item() == 1.0


def test_applied_swaps_in_place_and_gives_back_the_same_bits_also_after_an_exception():
    parameter = Parameter(torch.tensor([0.1, float("nan"), -0.0]))
    frozen = Parameter(torch.tensor([2.0]), requires_grad=False)
    parameter.grad = torch.ones(3)
    ema = EMA([("w", parameter), ("f", frozen)], decay=0.5)
    parameter.data = torch.tensor([0.3, float("nan"), -0.0])
    bits, place = parameter.detach().clone().view(torch.int32), parameter.data_ptr()
    with pytest.raises(RuntimeError, match="stop"), ema.applied():
        assert parameter[0].item() == pytest.approx(0.1)
        assert parameter.requires_grad and not frozen.requires_grad and parameter.data_ptr() == place
        raise RuntimeError("stop")
    assert torch.equal(parameter.detach().view(torch.int32), bits) and parameter.data_ptr() == place
    assert parameter.requires_grad and not frozen.requires_grad and torch.equal(parameter.grad, torch.ones(3))


def test_no_update_and_no_nesting_inside_applied():
    ema = EMA([("w", Parameter(torch.zeros(1)))])
    with ema.applied():
        with pytest.raises(RuntimeError, match="average the average"):
            ema.update()
        with pytest.raises(RuntimeError, match="nested"), ema.applied():
            pass
    ema.update()


def test_a_restored_average_goes_on_bit_for_bit():
    first, second = Parameter(torch.tensor([1 / 3])), Parameter(torch.tensor([7.0]))
    whole = EMA([("w", first)], decay=0.9)
    walk(whole, first, [0.1, 0.2, 0.3])
    part = EMA([("w", second)], decay=0.9)
    part.restore({name: tensor.clone() for name, tensor in whole.tensors().items()})
    walk(whole, first, [0.4, 0.5])
    walk(part, second, [0.4, 0.5])
    assert torch.equal(part.tensors()["w"], whole.tensors()["w"])
    with pytest.raises(CheckpointError, match=r"lacks 1 \(w\) and holds unknown 1 \(v\)"):
        part.restore({"v": torch.zeros(1)})


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match=r"decay 1\.0"):
        EMA([], decay=1.0)
