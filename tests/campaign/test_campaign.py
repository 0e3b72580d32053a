"""Every bad input ends in a clear sentence, and every good one beside them works."""

from pathlib import Path

import pytest

from tests.campaign.case import Case, Server, expected
from tests.campaign.given import make
from tests.campaign.inputs import CASES
from tests.helpers.forks import Forks

SHARE = 12  # one in twelve is run by `make test`


@pytest.fixture(scope="module")
def server(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(make(tmp_path_factory.mktemp("campaign") / "given", forks), forks)


def cases() -> list:
    numbered = enumerate((kind, case) for kind, cases in CASES.items() for case in cases)
    return [
        pytest.param(case, id=f"{kind}: {case.name}", marks=[pytest.mark.slow] if number % SHARE else [])
        for number, (kind, case) in numbered
    ]


@pytest.mark.parametrize("case", cases())
def test_it_ends_in_a_sentence(case: Case, server: Server, tmp_path: Path) -> None:
    outcome, text = server.run(case, tmp_path / "case")
    assert outcome == expected(case), text[-3000:]


def test_there_are_enough_of_each_kind() -> None:
    least = {"yaml": 60, "keys": 30, "numbers": 60, "policies": 60, "runs": 80, "rewards": 100, "commands": 90}
    names = {kind: [case.name for case in cases] for kind, cases in CASES.items()}
    assert all(len(set(names[kind])) == len(names[kind]) >= count for kind, count in least.items())
