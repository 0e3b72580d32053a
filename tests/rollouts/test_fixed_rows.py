"""rollout.fixed_rows: every network call has equally many rows, so a bf16 update finds the log-probs of its rollout exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import build
from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.errors import ConfigError
from flowalign.models import Policy, load_policy
from flowalign.objectives import KLPenalty
from flowalign.storage.metrics_log import read_rows
from samplers import Branch, Chain
from tests.helpers import two_networks
from tests.helpers.policy_gradient import PROMPTS, gradients, make, run_updates
from tests.helpers.tiny_run import CONFIG, run_it

FIXED = ["rollout.fixed_rows=true", "rollout.micro_batch=4", "trainer.micro_batch=4"]


@contextmanager
def rows_of_calls(policy: Policy) -> Iterator[list[int]]:
    found: list[int] = []
    hooks = [
        network.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        for network in policy.networks()
    ]
    yield found
    for hook in hooks:
        hook.remove()


def test_every_call_of_a_run_has_equal_rows_and_padding_is_counted_apart(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided, so that a state is two rows; with a reference, an evaluation, and batches of 2, 3 and 6 states."""
    guided = [
        "rollout.guidance_scale=3",
        "rollout.allow_cfg_update=true",
        "run.iterations=2",
        "evaluation.guidance_scale=2",
        "evaluation.count=3",
    ]
    run_it(tiny_pipeline, tmp_path / "free", *guided)
    policies, seen, load = [], [], build.load_policy

    def watched(*given: Any, **more: Any) -> Policy:
        policies.append(load(*given, **more))
        policies[0].networks()[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        return policies[0]

    monkeypatch.setattr(build, "load_policy", watched)
    run_it(tiny_pipeline, tmp_path / "fixed", *guided, *FIXED)
    [policy] = policies
    assert set(seen) == {8} and len(seen) > 10
    assert sum(seen) == policy.evaluations + policy.padded and policy.padded > 0
    free, fixed = (read_rows(tmp_path / name / "tiny" / "metrics.jsonl") for name in ("free", "fixed"))
    for a, b in zip(free, fixed, strict=True):
        costs = {name for name in a if name.startswith("cost/")}
        assert {name: a[name] for name in costs} == {name: b[name] for name in costs}
        assert {name for name in b if name.startswith("cost/")} - costs == {"cost/padded_per_image"}
    assert (
        0 < sum(row["cost/padded_per_image"] * row["cost/images"] for row in fixed) < policy.padded
    )  # not evaluations


@pytest.mark.parametrize("plan", [Chain(), Branch(branches=3)], ids=["chain", "branch"])
def test_replay_in_bf16_is_exact_with_fixed_rows_alone(tiny_pipeline: Path, plan: Any) -> None:
    drifts, sizes = {}, {}
    for rows in (None, 4):
        parts = {"micro_batch": 1} if rows is None else {}
        policy, trainer = make(tiny_pipeline, plan, fixed_rows=rows, load={"dtype": "bf16"}, **parts)
        with rows_of_calls(policy) as calls:
            batch = trainer.collect(PROMPTS, 0)
            for update in trainer.updates(batch):
                for micro_batch in update.micro_batches:
                    micro_batch()
                drifts[rows] = update.after()["ratio/drift_max"]
        sizes[rows] = set(calls)
    assert sizes[4] == {4} and len(sizes[None]) > 1
    assert drifts[4] == 0.0 and drifts[None] > 1e-6


def test_the_gradient_is_that_of_the_states_without_padding(tiny_pipeline: Path) -> None:
    found = {}
    for rows in (None, 4):
        policy, trainer = make(tiny_pipeline, Chain(), fixed_rows=rows, regularizers={"kl": KLPenalty(0.1)})
        run_updates(trainer, trainer.collect(PROMPTS, 0))
        found[rows] = gradients(policy)
    scale = max(float(gradient.abs().max()) for gradient in found[None].values())
    assert scale > 0 and found[None].keys() == found[4].keys()
    for name, gradient in found[None].items():
        torch.testing.assert_close(found[4][name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_a_state_answers_alike_wherever_it_stands(tiny_pipeline: Path) -> None:
    policy: Any = load_policy(str(tiny_pipeline), trainable="none", dtype="bf16", fixed_rows=3)
    x, sigma = torch.randn(7, 3, 24, 48), torch.linspace(0.9, 0.3, 7)
    rows = policy.encode(as_records(list("ABCDEFG")), negative=True)
    together = policy.velocity(x, sigma, rows, guidance_scale=2.0)
    for index in (torch.tensor([5]), torch.tensor([6, 0])):
        assert torch.equal(
            policy.velocity(x[index], sigma[index], rows.rows(index), guidance_scale=2.0), together[index]
        )
    assert (policy.evaluations, policy.padded) == (2 * (7 + 3), 2 * (2 + 2 + 1))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.fixed_rows=true"], r"trainer\.micro_batch=16 with .*rollout\.micro_batch=64"),
        (["rollout.fixed_rows=true", "rollout.micro_batch=4", "trainer.micro_batch=3"], r"trainer\.micro_batch=3 "),
    ],
)
def test_other_micro_batches_are_refused(tiny_pipeline: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(CONFIG, [f"policy.path={tiny_pipeline}", *overrides])
    assert load_config(CONFIG, [f"policy.path={tiny_pipeline}", *FIXED])[0].rollout.rows == 4


def test_a_model_of_two_networks_is_refused(tmp_path: Path) -> None:
    folder, family = str(two_networks.save_pipeline(tmp_path)), "tests.helpers.two_networks.FAMILY"
    with pytest.raises(ValueError, match=r"fixed_rows=true for a EditPipeline.* 2 networks"):
        load_policy(folder, family=family, fixed_rows=4)
