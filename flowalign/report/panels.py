"""Which charts the metrics of a run are shown in."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flowalign.report.charts import Panel
from flowalign.storage.metrics_log import Row

HEALTH = (
    Panel("Ratio drift on replay (largest)", "ratio/drift_max", log=True),
    Panel("Clipped edges (fraction)", "ratio/clip_fraction"),
    Panel("Approximate KL to the rollout policy", "ratio/approx_kl", log=True),
    Panel("KL loss to the reference", "loss/kl", log=True),
    Panel("Velocity norm over the reference's (1: not inflated)", "norm/reference"),
    Panel("Gradient norm", "optim/grad_norm", log=True),
    Panel("Groups with equal rewards (fraction)", "group/zero_std_ratio"),
    Panel("Policy loss", "loss/policy"),
    Panel("Learning rate", "optim/lr"),
)


def reward_panels(rows: Sequence[Row]) -> list[Panel]:
    """One panel per training reward, before them all rewards together unless there is only one, then the held-out ones."""
    keys = dict.fromkeys(key for row in rows for key in row)  # in the order of their first appearance
    names = [key[len("reward/") : -len("_mean")] for key in keys if re.fullmatch(r"reward/.+_mean", key)]
    panels = [Panel(name, f"reward/{name}_mean", f"reward/{name}_std") for name in names]
    together = [] if len(panels) == 1 else [Panel("All rewards together", "reward/mean")]
    held_out = [Panel(f"Held-out {key[len('eval/') :]}", key) for key in keys if key.startswith("eval/")]
    return [*together, *panels, *held_out]


def health_panels(rows: Sequence[Row]) -> list[Panel]:
    """HEALTH, then a panel for every other metric that a trainer or a process reward measured."""
    known = {panel.key for panel in HEALTH}
    keys = dict.fromkeys(key for row in rows for key in row if key not in known)
    elsewhere = ("time/", "cost/", "reward/", "eval/", "ratio/drift_step_", "norm_step/")
    return [*HEALTH, *(Panel(key, key) for key in keys if "/" in key and not key.startswith(elsewhere))]
