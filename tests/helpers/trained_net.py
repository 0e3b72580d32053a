"""A small network after some AdamW updates, its parameters in any order."""

import torch
from torch import nn


class Net(nn.Module):
    """Equal weights whatever the order in which its layers are declared: the order of parameters is what varies."""

    def __init__(self, order):
        super().__init__()
        for name in order:
            layer = nn.Linear(3, 3)
            with torch.no_grad():
                layer.weight.copy_(torch.arange(9.0).reshape(3, 3).cos() * (ord(name) - 96))
                layer.bias.copy_(torch.arange(3.0).sin() * (ord(name) - 96))
            self.add_module(name, layer)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def adamw(model, lr=0.05, split=True):
    parameters = dict(model.named_parameters())
    decayed = [p for n, p in parameters.items() if n.endswith("weight") or not split]
    plain = [p for n, p in parameters.items() if n.endswith("bias") and split]
    groups = [{"params": decayed, "weight_decay": 0.1}] + ([{"params": plain, "weight_decay": 0.0}] if split else [])
    return torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95))


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        x = torch.linspace(-1, 1, 12).reshape(4, 3) * (1 + step)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()


def trained(steps, order="abc"):
    model = Net(order)
    optimizer = adamw(model)
    train(model, optimizer, steps)
    return model, optimizer
