"""A forest's roles, masks and sums against hand enumeration; its file, bit for bit."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from samplers import (  # fmt: skip
    CPS,
    DDIM,
    FlowSDE,
    Forest,
    KeyedNoise,
    TransitionContext,
    Tree,
    VariancePreserving,
    chain,
    diffusers_sigmas,
    load_forest,
    rollout,
    save_forest,
    window,
)
from samplers.kernels.base import DEFAULT_CONTEXT, Step


def grown(tree: Tree, kernel=None, dtype: torch.dtype = torch.float32) -> Forest:
    noise = KeyedNoise(0, 0, list(range(tree.num_groups)), (3,))
    return rollout(
        lambda x, s, r: -0.3 * x, noise.start(tree), diffusers_sigmas(tree.num_steps), tree, kernel or FlowSDE(),
        noise.step, store_dtype=dtype,
    )  # fmt: skip


def test_a_role_is_read_where_it_was_set() -> None:
    forest = grown(Tree.cat([window(4, 3, 1, 2), window(4, 3, 0, 2)]))
    nodes = forest.tree.parents_of_edges.flip(0)
    values = torch.randn(len(nodes), 3)
    with_reference = forest.with_velocities("reference", nodes, values)
    assert torch.equal(with_reference.velocities["reference"].at(nodes), values)
    assert torch.equal((with_reference.velocities["reference"].row >= 0).nonzero().flatten(), nodes.sort().values)
    assert not forest.velocities  # the forest itself is unchanged
    with pytest.raises(ValueError, match="twice; expected once"):
        with_reference.with_velocities("reference", nodes, values)
    with pytest.raises(ValueError, match="of which nothing is here"):
        with_reference.velocities["reference"].at(forest.tree.leaves)
    with pytest.raises(ValueError, match="one row per distinct node"):
        forest.with_velocities("reference", nodes, values[:, :2])
    with pytest.raises(ValueError, match=r"known roles are \['reference'\]"):
        with_reference.role_steps("old", forest.tree.edges)


def test_the_rollouts_own_velocities_replay_its_log_probs() -> None:
    forest = grown(chain(5, 2))
    nodes = forest.tree.parents_of_edges
    forest = forest.with_velocities("old", nodes, -0.3 * forest.at(nodes))
    edges = forest.tree.edges.flip(0)
    torch.testing.assert_close(forest.role_steps("old", edges).log_prob(forest.at(edges)), forest.log_prob[edges])


def test_path_sums_and_what_is_kept() -> None:
    forest = grown(Tree.from_parents([-1, 0, 1, 1, 2, 3], [0, 1, 2, 2, 3, 3], [0, 1, 1, 1, 0, 0], 3))
    values = torch.tensor([9.0, 1.0, 10.0, 100.0, 9.0, 9.0])
    assert forest.path_sum(values).tolist() == [11.0, 101.0]
    assert forest.path_sum(values, forest.mask(torch.tensor([1, 3]))).tolist() == [1.0, 101.0]
    assert forest.kept.tolist() == [True, True, True, True, True, True]
    assert not bool(grown(window(4, 2, 2, 1)).kept[1])  # on the deterministic prefix, nobody asks for it again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_forest_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    forest = grown(Tree.cat([window(4, 3, 1, 2), window(4, 3, 0, 2)]), CPS(0.6, constants="full"), dtype)
    nodes = forest.tree.parents_of_edges
    forest = forest.with_velocities("old", nodes, -0.3 * forest.at(nodes))
    forest = forest.with_scores("process", torch.where(forest.kept, torch.randn(len(forest.tree)), torch.nan))
    save_forest(tmp_path / "a" / "forest.safetensors", forest)
    read = load_forest(tmp_path / "a" / "forest.safetensors")
    assert read.kernel == forest.kernel and read.evaluations == forest.evaluations
    for name in ("sigmas", "states", "row", "log_prob"):
        assert torch.equal(vars(read)[name].nan_to_num(7), vars(forest)[name].nan_to_num(7)), name
        assert vars(read)[name].dtype == vars(forest)[name].dtype
    assert torch.equal(read.tree.parent, forest.tree.parent) and torch.equal(read.tree.level, forest.tree.level)
    assert torch.equal(read.scores["process"].nan_to_num(7), forest.scores["process"].nan_to_num(7))
    edges = forest.tree.edges
    assert torch.equal(read.role_steps("old", edges).mean, forest.role_steps("old", edges).mean)


def test_a_kernel_with_a_table_is_rebuilt_too(tmp_path: Path) -> None:
    table = torch.linspace(0.99, 0.01, 4)
    kernel = DDIM(0.5).bind(VariancePreserving(table))
    save_forest(tmp_path / "f", replace(grown(chain(4, 2)), kernel=kernel))
    read = load_forest(tmp_path / "f").kernel
    sigma = torch.tensor([1.0, 0.5]).double()
    assert isinstance(read, DDIM) and read.path is not None and torch.equal(read.path.alphas_cumprod, table)
    assert torch.equal(read.coefficients(sigma, sigma - 0.25).std, kernel.coefficients(sigma, sigma - 0.25).std)


@dataclass(frozen=True)
class UsersKernel:
    """A kernel from outside samplers."""

    inner: FlowSDE
    reduce: str = "mean"
    constants: str = "full"

    def coefficients(self, sigma, sigma_next, level=1.0, step=None):
        return self.inner.coefficients(sigma, sigma_next, level, step)

    def __call__(self, x, v, sigma, sigma_next, ctx: TransitionContext = DEFAULT_CONTEXT) -> Step:
        return self.inner(x, v, sigma, sigma_next, ctx)


def test_a_users_kernel_is_passed_in_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "forest.safetensors"
    save_forest(path, grown(chain(3, 2), UsersKernel(FlowSDE(0.5))))
    with pytest.raises(ValueError, match="pass kernel="):
        load_forest(path)
    with pytest.raises(ValueError, match="which rolled this forest out"):
        load_forest(path, UsersKernel(FlowSDE(0.4)))
    assert load_forest(path, UsersKernel(FlowSDE(0.5))).kernel == UsersKernel(FlowSDE(0.5))


def test_a_kernel_that_json_cannot_hold_is_passed_in(tmp_path: Path) -> None:
    path = tmp_path / "forest.safetensors"
    forest = grown(chain(3, 2))
    save_forest(path, replace(forest, kernel=UsersKernel(lambda x: x)))
    with pytest.raises(ValueError, match="pass kernel="):
        load_forest(path)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"class": "samplers.kernels.flow_sde.FlowSDE", "fields": {"noise_level": {"class": "os.system", "fields": {}}}},
         "os.system, which is not rebuilt"),
        ({"class": "subprocess.Popen", "fields": {"args": "true"}}, "subprocess.Popen, which is not rebuilt"),
        ({"class": "samplers.kernels.base.torch", "fields": {}}, "not a kernel of samplers"),
        ({"class": "samplers.kernels.cps.Affine", "fields": {}}, "not a kernel of samplers"),
    ],
    ids=["nested", "outer", "not a class", "imported there"],
)  # fmt: skip
def test_a_file_cannot_name_what_is_not_a_dataclass_of_samplers(tmp_path: Path, description, message: str) -> None:
    path = tmp_path / "forest.safetensors"
    save_forest(path, grown(chain(3, 2)))
    with safe_open(str(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        header = json.loads(file.metadata()["forest"])
    save_file(tensors, path, {"forest": json.dumps(header | {"kernel": description})})
    with pytest.raises(ValueError, match=message):
        load_forest(path)
