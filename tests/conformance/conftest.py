"""Fixtures of the tests that walk all model families."""

from collections.abc import Callable

import pytest

from flowalign.testing import tiny_names
from tests.helpers.families import SHIPPED_WORLDS, Subject, subject


@pytest.fixture(params=[*tiny_names(), *SHIPPED_WORLDS])
def family(request: pytest.FixtureRequest) -> Subject:
    return subject(request.param)


@pytest.fixture
def note(family: Subject, record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """`note(check, value)` keeps what a check of the family found, for scripts/families_table.py: a number, or "ok"."""
    return lambda check, value="ok": record_property(f"{family.name}/{check}", value)
