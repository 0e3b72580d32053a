"""The rollouts of all processes as one batch: what every process then computes credit, advantages and selection on. Scores,
log-probs and the topology are gathered; states and velocities stay with the process that made them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowalign.data import PromptRecord
from flowalign.distributed.processes import Processes
from flowalign.models.conditions import Conditions
from flowalign.rollouts.task import Task
from rewards import RewardOutput
from samplers import Forest, Held, Tree
from samplers.forest import ELSEWHERE


def gather_tree(processes: Processes, tree: Tree, mine: Tree) -> Tree:
    """The nodes of `tree`, the plan of all groups, that selection kept on any process; `mine`: those of this one's share."""
    number = torch.tensor(processes.groups(tree.num_groups))
    return _with_only(tree, processes.gather(torch.stack([number[mine.group], mine.local], 1)))


def _with_only(tree: Tree, kept: Tensor) -> Tree:
    """The nodes of `tree` whose (group, local) are a row of `kept` [n, 2]."""
    span = int(tree.local.max()) + 1
    stays = torch.isin(tree.group * span + tree.local, kept[:, 0] * span + kept[:, 1])
    return tree if bool(stays.all()) else tree.keep(stays)


def gather_forest(processes: Processes, tree: Tree, forest: Forest) -> Forest:
    """The forest of `tree`, of which each process rolled out the groups of its share, in the same order of nodes. Its states
    and velocities are those of this process, see samplers.Held."""
    nodes, columns = _by_process(processes, tree), _numbers(forest, torch.arange(len(forest.tree)))
    evaluations, previews = (round(processes.total(count)) for count in (forest.evaluations, forest.previews))
    gathered = {name: processes.gather(values) for name, values in sorted(columns.items())}
    whole = {name: _placed(nodes, values) for name, values in gathered.items()}
    mine = (processes.owners(tree.group) == processes.rank).nonzero().flatten()

    def rows_of(known: Tensor, own: Tensor) -> Tensor:
        return torch.where(known, ELSEWHERE, -1).index_copy(0, mine, own)

    return replace(
        forest, tree=tree, row=rows_of(whole["kept"], forest.row), log_prob=whole["log_prob"],
        evaluations=evaluations, previews=previews,
        velocities={
            role: Held(rows_of(whole[f"known {role}"], rows.row), rows.values) for role, rows in forest.velocities.items()
        },
        scores={name: whole[f"score {name}"] for name in forest.scores},
    )  # fmt: skip


def encoded(task: Task, prompts: Sequence[PromptRecord], *, negative: bool) -> Conditions:
    """The conditions of the prompts; each process encodes those of its share of them, see Conditions.row."""
    processes = task.processes
    share = [prompts[number] for number in processes.groups(len(prompts))]
    own = task.policy.encode(share, negative=negative, size=task.size_of(prompts))
    if processes.count == 1:
        return own
    here = processes.owners(torch.arange(len(prompts))) == processes.rank
    return own.each(lambda rows: Held.of(rows.values, here))


@dataclass(frozen=True, eq=False)
class Part:
    """Some groups of an iteration, rolled out together. numbers [G]: which prompt each group of `forest` has, ascending.
    stays [G]: which of them count, the others are replaced by another part; None: all."""

    numbers: Tensor
    forest: Forest
    stays: Tensor | None = None

    @property
    def nodes(self) -> Tensor:
        """The nodes of `forest` that count."""
        group = self.forest.tree.group
        return torch.arange(len(group)) if self.stays is None else self.stays[group].nonzero().flatten()

    @property
    def owner(self) -> Tensor:
        """The prompts of its leaves that count."""
        tree = self.forest.tree
        return self.numbers[tree.group[self.nodes[tree.index[self.nodes] == tree.num_steps]]]

    def without(self, numbers: Sequence[int]) -> Part:
        """This part, of which the groups `numbers` no longer count."""
        stays = ~torch.isin(self.numbers, torch.tensor(list(numbers)))
        return replace(self, stays=stays if self.stays is None else stays & self.stays)


def joined(tree: Tree, numbers: Sequence[int], parts: Sequence[Part]) -> tuple[Forest, Tensor]:
    """The forest of what is left of `tree`, the plan of the prompts `numbers`, ascending, from parts that hold each of them once;
    and the order [L] in which the leaves of the parts, one after the other, are its own."""
    prompts = torch.tensor(list(numbers))
    groups = [torch.searchsorted(prompts, part.numbers[part.forest.tree.group[part.nodes]]) for part in parts]
    local = [part.forest.tree.local[part.nodes] for part in parts]
    tree = _with_only(tree, torch.stack([torch.cat(groups), torch.cat(local)], 1))
    nodes = torch.cat([torch.isin(tree.group, group).nonzero().flatten() for group in groups])
    all_columns = [_columns(part.forest, part.nodes) for part in parts]
    columns = {name: torch.cat([each[name] for each in all_columns]) for name in all_columns[0]}
    forests = [part.forest for part in parts]
    like = replace(
        forests[0],
        evaluations=sum(each.evaluations for each in forests),
        previews=sum(each.previews for each in forests),
    )
    leaves = nodes[tree.index[nodes] == tree.num_steps]
    return _built(tree, nodes, columns, like), leaves.argsort()


def _numbers(forest: Forest, nodes: Tensor) -> dict[str, Tensor]:
    """What the forest holds of `nodes` but states and velocities, by name; of those, which it holds."""
    known = {f"known {role}": rows.known[nodes] for role, rows in forest.velocities.items()}
    scores = {f"score {name}": scores[nodes] for name, scores in forest.scores.items()}
    log_prob = forest.log_prob[nodes]
    return {"kept": forest.kept[nodes], "log_prob": log_prob, **known, **scores}


def _columns(forest: Forest, nodes: Tensor) -> dict[str, Tensor]:
    """What the forest holds of `nodes`, by name; see `_built`."""
    columns = _numbers(forest, nodes)
    columns["states"] = forest.states[forest.row[nodes[columns["kept"]]]]
    return columns | {
        f"velocity {role}": rows.at(nodes[columns[f"known {role}"]]) for role, rows in forest.velocities.items()
    }


def _built(tree: Tree, nodes: Tensor, columns: Mapping[str, Tensor], like: Forest) -> Forest:
    """The forest of `tree` from the columns of all its nodes, in the order `nodes`."""
    kept = _placed(nodes, columns["kept"])
    row = torch.where(kept, kept.cumsum(0) - 1, -1)
    order = nodes[columns["kept"]].argsort()
    log_prob = _placed(nodes, columns["log_prob"])
    forest = replace(
        like, tree=tree, states=columns["states"][order], row=row, log_prob=log_prob, velocities={}, scores={}
    )
    for role in like.velocities:
        known = nodes[columns[f"known {role}"]]
        values = columns[f"velocity {role}"]
        forest = forest.with_velocities(role, known.sort().values, values[known.argsort().to(values.device)])
    for name in like.scores:
        forest = forest.with_scores(name, _placed(nodes, columns[f"score {name}"]))
    return forest


def _placed(nodes: Tensor, values: Tensor) -> Tensor:
    """[N] `values` [N] of `nodes` [N], in the order of the nodes."""
    return torch.empty_like(values).index_copy(0, nodes.to(values.device), values)


def gather_output(processes: Processes, tree: Tree, output: RewardOutput) -> RewardOutput:
    """The scores of all leaves, in the order of `tree.leaves`; `info` stays with the process that has the images."""
    nodes = _by_process(processes, tree)
    return gather_scores(processes, output, torch.searchsorted(tree.leaves, nodes[tree.index[nodes] == tree.num_steps]))


def gather_scores(processes: Processes, output: RewardOutput, order: Tensor | None = None) -> RewardOutput:
    """The scores of all processes, those of the first one first. order [L]: the place of each of these; None: it is theirs."""

    def gathered(values: Tensor) -> Tensor:
        by_process = processes.gather(values)
        if order is None:
            return by_process
        return by_process.new_empty(by_process.shape).index_copy(0, order.to(by_process.device), by_process)

    lacking = output.scores.new_full((len(output.scores),), torch.nan)  # a component that only other shares have
    names = _all_names(processes, output.components)
    components = {name: gathered(output.components.get(name, lacking)) for name in names}
    uncertain = processes.total(output.uncertainty is not None) > 0  # a share may hold no sample whose part states one
    uncertainty = torch.full_like(output.scores, torch.nan) if output.uncertainty is None else output.uncertainty
    return RewardOutput(
        gathered(output.scores), gathered(output.valid), components, elapsed=output.elapsed,
        uncertainty=gathered(uncertainty) if uncertain else None, channels=output.channels,
    )  # fmt: skip


def _all_names(processes: Processes, own: Iterable[str]) -> list[str]:
    """The names that some process has, in one order for all."""
    text = json.dumps(sorted(own)) + "\n"
    told = bytes(processes.gather(torch.tensor(list(text.encode()), dtype=torch.uint8)).tolist()).decode()
    return sorted({name for line in told.splitlines() for name in json.loads(line)})


def _by_process(processes: Processes, tree: Tree) -> Tensor:
    """[N] the nodes of `tree`: those of the first process's groups, then the second's, and so on."""
    return processes.owners(tree.group).argsort(stable=True)
