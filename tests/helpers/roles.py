"""How the made-up policies of the tests change the role whose weights they evaluate."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Switched(Protocol):
    """A policy that evaluates the weights of the role `active`."""

    active: str


@contextmanager
def switch_role(policy: Switched, name: str) -> Iterator[None]:
    """`Policy.role`: the weights of the role `name` inside the block."""
    before, policy.active = policy.active, name
    try:
        yield
    finally:
        policy.active = before
