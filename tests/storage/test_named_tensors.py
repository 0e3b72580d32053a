"""Optimizer and parameters by name: bit-exact, free of the order of parameters, mismatches named (I7)."""

import pytest
import torch
from torch import nn

from flowalign.storage.checkpoint import CheckpointError, load, save
from flowalign.storage.named_tensors import pack_optimizer, pack_parameters, restore_optimizer, restore_parameters
from tests.helpers.trained_net import Net, adamw, train, trained


def test_resume_of_adamw_is_bit_exact_and_free_of_parameter_order(tmp_path):
    whole, _ = trained(8)
    model, optimizer = trained(4)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.05 * (1 / 3)  # a scheduler was here
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    path = save(tmp_path, 4, {"model": pack_parameters(model.named_parameters()), "opt": tensors}, {"opt": state})
    train(model, optimizer, 4, start=4)

    back, back_state = load(path)
    other = Net("cab")
    resumed = adamw(other, lr=99.0)
    resumed.param_groups.reverse()
    restore_parameters(other.named_parameters(), back["model"])
    restore_optimizer(resumed, other.named_parameters(), back["opt"], back_state["opt"])
    assert {g["lr"] for g in resumed.param_groups} == {0.05 * (1 / 3)} and resumed.param_groups[0]["betas"] == (
        0.8,
        0.95,
    )
    train(other, resumed, 4, start=4)
    after = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(after[name], parameter)
    assert not torch.equal(after["a.weight"], dict(whole.named_parameters())["a.weight"])  # the changed lr was kept


def test_restore_casts_nothing_and_shares_nothing():
    model, optimizer = trained(2)
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    half = Net("abc").bfloat16()
    resumed = adamw(half)
    restore_optimizer(resumed, half.named_parameters(), tensors, state)
    moments = resumed.state[half.a.weight]
    assert moments["exp_avg"].dtype == torch.float32  # load_state_dict would have made it bfloat16
    assert moments["step"].item() == 2 and moments["step"].device.type == "cpu"
    moments["exp_avg"].zero_()
    assert tensors["exp_avg/a.weight"].abs().max() > 0


def test_a_parameter_that_never_had_a_gradient_stays_without_state():
    model = Net("abc")
    model.b.requires_grad_(False)
    optimizer = adamw(model)
    train(model, optimizer, 1)
    tensors, state = pack_optimizer(optimizer, model.named_parameters())
    assert not any("b." in name for name in tensors)
    resumed = adamw(model)
    resumed.state[model.b.weight]["step"] = torch.tensor(9.0)
    restore_optimizer(resumed, model.named_parameters(), tensors, state)
    assert model.b.weight not in resumed.state and resumed.state[model.a.weight]["step"].item() == 1


def test_mismatches_name_the_parameters_and_leave_the_optimizer_alone():
    model, optimizer = trained(2)
    tensors, state = pack_optimizer(optimizer, model.named_parameters())

    def refused(other, other_optimizer, message):
        with pytest.raises(CheckpointError, match=message):
            restore_optimizer(other_optimizer, other.named_parameters(), tensors, state)
        assert not other_optimizer.state

    more = Net("abcd")
    refused(more, adamw(more), r"lacks 2 \(d.bias, d.weight\)")
    less = Net("ab")
    refused(less, adamw(less), r"unknown 2 \(c.bias, c.weight\)")
    wide = Net("abc")
    wide.b = nn.Linear(3, 5)
    refused(wide, adamw(wide), r"b\.weight is \(\(3, 3\).* expected \(\(5, 3\)")
    one = Net("abc")
    refused(one, adamw(one, split=False), r"6 \(a.bias, a.weight, b.bias, …\) are one parameter group here")
    sgd = Net("abc")
    refused(sgd, torch.optim.SGD(sgd.parameters(), lr=0.1), "got a checkpoint of AdamW; expected SGD")
    with pytest.raises(CheckpointError, match="got 2 optimizer parameters without a name"):
        pack_optimizer(optimizer, [(n, p) for n, p in model.named_parameters() if not n.startswith("b")])


def test_parameters_of_another_shape_or_type_are_refused_before_any_copy():
    model = Net("abc")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors = {name: p + 1 for name, p in before.items()} | {"c.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"c\.bias is"):
        restore_parameters(model.named_parameters(), tensors)
    with pytest.raises(CheckpointError, match=r"c\.bias is .*float64"):
        restore_parameters(model.named_parameters(), {**tensors, "c.bias": torch.zeros(3, dtype=torch.float64)})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
