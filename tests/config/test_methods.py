"""Each method's layer runs on Glyphs, and costs what its paper's topology costs: evaluations, trained steps, scores."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import ceil, comb
from pathlib import Path

import pytest
import torch

from flowalign.advantage import SignalContext
from flowalign.config import TrainConfig, load_config
from flowalign.errors import ConfigError
from flowalign.glyphs.process_reward import GlyphsProcessReward
from flowalign.rollouts.rolling import grow
from flowalign.rollouts.task import Rollout
from flowalign.run.preflight import forecast
from flowalign.trainers import PolicyGradient
from rewards import channels_of
from samplers import Chain, Forest, Probed, SplitTree, Tree, Window, generator
from tests.helpers.method_layers import BY_REWARD_GRADIENT, FOLDER, METHODS, ON_GLYPHS, glyphs_layers, reward_of

Load = Callable[[str], TrainConfig]


@pytest.fixture(scope="module")
def on_glyphs(tiny_pipeline: Path) -> Load:
    """Method -> its configuration on Glyphs, with a tiny pipeline in its place."""

    @cache
    def load(method: str) -> TrainConfig:
        given = [f"policy.path={tiny_pipeline}", *ON_GLYPHS.get(method, ())]
        return load_config(glyphs_layers(method), given)[0]

    return load


def trainer(config: TrainConfig) -> PolicyGradient:
    assert isinstance(config.trainer, PolicyGradient)
    return config.trainer


def forest_of(rollout: Rollout, tree: Tree) -> Forest:
    """The topology without states."""
    sigmas, nowhere = torch.linspace(1, 0, tree.num_steps + 1), torch.full((len(tree),), -1)
    return Forest(tree, sigmas, rollout.kernel, torch.empty(0, 1), nowhere, torch.zeros(len(tree)), 0)


def chosen(config: TrainConfig, rollout: Rollout, iteration: int = 0) -> tuple[Tree, torch.Tensor]:
    """The topology of one group, and which of its edges are trained for random rewards."""
    tree = grow(rollout, 0, iteration, [0])
    forest = forest_of(rollout, tree)
    scores = torch.rand(len(tree.leaves), 1, generator=torch.Generator().manual_seed(0)).double()
    signal = trainer(config).signal
    edges = signal.edges(forest, scores, torch.ones_like(scores, dtype=torch.bool), ("r",), SignalContext(0, iteration))
    return tree, edges.chosen


@pytest.mark.parametrize("method", METHODS)
def test_it_runs_on_glyphs_by_adding_its_layer(method: str, on_glyphs: Load) -> None:
    config = on_glyphs(method)
    assert config.run.name == f"{method}-glyphs-{reward_of(method)}"
    assert f"run {config.run.name}: 100 iterations × 8 prompts" in forecast(config)
    assert config.evaluation.num_inference_steps == 6
    if config.rollout.schedule is not None:
        assert config.evaluation.schedule is not None, "evaluated on the pipeline's own grid, as every method"


@pytest.mark.parametrize("method", BY_REWARD_GRADIENT)
def test_a_method_by_the_gradient_of_the_reward_refuses_ocr(method: str, tiny_pipeline: Path) -> None:
    layers = [*glyphs_layers(method), "configs/rewards/ocr_glyphs.yaml"]
    with pytest.raises(ConfigError, match=r"gradient|differentiable"):
        load_config(layers, [f"policy.path={tiny_pipeline}", *ON_GLYPHS.get(method, ())])


@pytest.mark.parametrize("method", METHODS)
def test_it_names_its_paper_and_the_source_of_each_number(method: str) -> None:
    text = (FOLDER / f"{method}.yaml").read_text()
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    header, lines = "\n".join(lines[:start]), lines[start:]
    assert re.search(r"\(\d{4}\.\d{5}", header.partition("\n")[0]), "its first line names an arXiv id"
    if "all other values are ours" in header:
        return
    for above, line in zip(["", *lines], lines, strict=False):
        value = line.partition("#")[0]
        if any(letter.isdigit() for letter in value.partition(":")[2]):
            assert "#" in line or above.strip().startswith("#") or "# " in above, line


# ------------------------------------------------------------------------------------------ cost

CHAIN, STEPS = 24, 10
COSTS: dict[str, tuple[int, int, int, int]] = {
    # (evaluations, distinct trained states, stochastic steps, decoded and scored) of one prompt
    "ddpo": (8 * STEPS, 8 * STEPS, 8 * STEPS, 8),
    "flow_grpo": (CHAIN * STEPS, CHAIN * 9, CHAIN * 9, CHAIN),  # 240, 216
    "flow_cps": (CHAIN * STEPS, CHAIN * 9, CHAIN * 9, CHAIN),
    "grpo_guard": (CHAIN * STEPS, CHAIN * 9, CHAIN * 9, CHAIN),
    "flow_dppo": (16 * STEPS, 16 * 9, 16 * 9, 16),
    "flow_grpo_fast": (CHAIN * STEPS, CHAIN * 2, CHAIN * 2, CHAIN),
    # a shared start saves G - 1 evaluations of the first stochastic step: 12·16 = 192, less 11
    "dance_grpo": (12 * 16 - 11, 12 * 15 - 11, 12 * 15, 12),
    "dance_grpo_best_of_n": (24 * 16 - 23, 24 * 15 - 23, 24 * 15, 24),
    "euphonium": (8 * 16 - 7, 8 * 15 - 7, 8 * 15, 8),  # 128, 120 of which 72 are trained
    "mixgrpo": (12 * 25 - 11, 12 * 4 - 11, 12 * 4, 12),  # 300, 48
    "mixgrpo_flash": (12 * (4 + ceil(0.4 * 21)) - 11, 12 * 4 - 11, 12 * 4, 12),
    "mixgrpo_flash_star": (12 * 9 - 11, 12 * 4 - 11, 12 * 4, 12),
    "tempflow_grpo": (4 * (9 + 6 * comb(10, 2)), 4 * 9, 4 * 6 * 9, 4 * 6 * 9),  # 1116, 36, 216, 216
    "branchgrpo": (203, 203 - 16, 218 - 16, 16),
    "branchgrpo_width": (203, 203 - 16, 218 - 16, 16),
    "branchgrpo_depth": (203, 203 - 16, 218 - 16, 16),
    "dynamic_treerpo": ((2**4 - 1) + 2**4 * (16 - 4), 2**4 - 1, 2**5 - 2, 2**4),  # 207, 15, 30, 16
    "densegrpo": (CHAIN * comb(11, 2), CHAIN * 9, CHAIN * 9, CHAIN * 10),  # 1320, 216
    "tp_grpo": (CHAIN * comb(11, 2), CHAIN * 9, CHAIN * 9, CHAIN * 10),  # 1320, 216, 240
    "flash_grpo": (8 * 20, 8, 8, 8),
    # prefix, previews of four steps, the other steps of those that stay: all leave one state by one stochastic step
    "preview_select": (2 + 96 * 4 + CHAIN * 7, 1, CHAIN, CHAIN),
    # all to the first assessment, those that stay to the second, the others to the end; the last step is not stochastic
    "parm_select": (CHAIN * 3 + 16 * 3 + 8 * 4, 8 * 9, 8 * 9, 8),
    # a probe of five steps shares its first; the states 6, 7 and 8 have four, three and two left
    "stepwise_flow_grpo": (CHAIN * (STEPS + 5 * 4 + 3 + 2 + 1), CHAIN * 8, CHAIN * 8, CHAIN * 9),
}


@pytest.mark.parametrize("method", COSTS)
def test_it_costs_what_its_formula_says(method: str, on_glyphs: Load) -> None:
    config = on_glyphs(method)
    rollout = config.rollout
    cost = rollout.plan.forecast(rollout.num_inference_steps, rollout.group_size)
    assert (cost.rollout, cost.train, cost.edges, cost.leaves) == COSTS[method]
    update = trainer(config).forecast(rollout)
    roles = len(trainer(config).roles())
    assert update.trained == 8 * cost.train
    assert update.frozen == update.trained * (roles + 1) - update.trained // update.updates  # reference, later updates


def test_the_papers_count_of_a_chain_that_shares_nothing(on_glyphs: Load) -> None:
    """MixGRPO: 300 evaluations and 48 trained steps of 12 images in 25 steps; DanceGRPO: 192."""
    for method, plan, expected in (
        ("mixgrpo", Window(size=4, shared_start=False), (300, 48, 48, 12)),
        ("dance_grpo", Chain(), (192, 180, 180, 12)),
    ):
        rollout = on_glyphs(method).rollout
        cost = plan.forecast(rollout.num_inference_steps, rollout.group_size)
        assert (cost.rollout, cost.train, cost.edges, cost.leaves) == expected


def test_euphonium_guides_four_steps_of_each_sample(on_glyphs: Load) -> None:
    """N_g = 4 gradients of the process reward per sample, in the last four of 16 steps."""
    config = on_glyphs("euphonium")
    guidance = config.rollout.reward_guidance
    assert guidance is not None and isinstance(guidance.judge(config.process_rewards), GlyphsProcessReward)
    assert config.process_rewards[0].name == "process"
    assert "at most 4.00 more scores per image" in forecast(config)


@pytest.mark.parametrize(("method", "kept"), [("dance_grpo", 12 * 9), ("dance_grpo_best_of_n", 8 * 9)])
def test_dance_grpo_trains_nine_of_fifteen_steps(method: str, kept: int, on_glyphs: Load) -> None:
    config = on_glyphs(method)
    assert int(chosen(config, config.rollout)[1].sum()) == kept


def test_the_window_of_mixgrpo_slides_and_its_tail_shortens(on_glyphs: Load) -> None:
    """l = 0 for 25 iterations, then 1; its Flash form takes 13 to 19 evaluations per image, 16.08 on average over l = 0..11."""
    mix, flash = on_glyphs("mixgrpo").rollout, on_glyphs("mixgrpo_flash").rollout
    first = []
    for iteration in (0, 24, 25, 299):
        tree = grow(mix, 0, iteration, [0])
        first.append(int(tree.index[tree.parents_of_edges].min()))
        assert len(tree.edges) == 48
    assert first == [0, 0, 1, 11]
    per_image = []
    for left in range(12):
        cost = grow(flash, 0, 20 * left, [0]).cost()
        alone = left + 4 + ceil(0.4 * (21 - left))
        per_image.append(alone)
        assert cost.rollout == left + 1 + 12 * (alone - left - 1)  # the prefix and the first stochastic step are shared
    assert (min(per_image), max(per_image), round(sum(per_image) / 12, 2)) == (13, 19, 16.08)


def with_last_step(config: TrainConfig) -> Rollout:
    """The rollout of a BranchGRPO layer with the paper's last step, which is trained."""
    plan = config.rollout.plan
    assert isinstance(plan, SplitTree)
    return replace(config.rollout, plan=replace(plan, train_last=True))


@pytest.mark.parametrize(
    ("method", "edges"),
    [("branchgrpo", 218), ("branchgrpo_width", 218 - 5 * 16), ("branchgrpo_depth", 218 - 4 * 16)],
)
def test_the_papers_count_of_branchgrpo(method: str, edges: int, on_glyphs: Load) -> None:
    """203 evaluations, 218 steps, 16 leaves; width pruning leaves 8.625 steps per leaf. The window of the script is 4 steps."""
    config = on_glyphs(method)
    rollout = with_last_step(config)
    cost = rollout.plan.forecast(20, 16)
    assert (cost.rollout, cost.edges, cost.leaves) == (203, 218, 16)
    tree, kept = chosen(config, rollout)
    assert int(kept.sum()) == edges
    left_out = set(tree.index[tree.parent[tree.edges[~kept]]].tolist())
    assert left_out == {"branchgrpo": set(), "branchgrpo_width": set(range(10, 20)), "branchgrpo_depth": {14, 15, 16, 17}}[method]  # fmt: skip
    if method == "branchgrpo_depth":
        later, kept = chosen(config, rollout, 30)
        assert set(later.index[later.parent[later.edges[~kept]]].tolist()) == {13, 14, 15, 16}


def test_branchgrpo_mix_trains_its_splits_and_a_window(on_glyphs: Load) -> None:
    """The released code's 34 edges with the window at steps 0 to 3, which then slides."""
    config = on_glyphs("branchgrpo_mix")
    for iteration, steps in ((0, {0, 1, 2, 3, 6, 9}), (30, {0, 1, 2, 3, 4, 6, 9})):
        tree, kept = chosen(config, config.rollout, iteration)
        assert set(tree.index[tree.parent[tree.edges[kept]]].tolist()) == steps
        assert int(kept.sum()) == sum(2 ** sum(split <= step for split in (0, 3, 6, 9)) for step in steps)
    assert grow(config.rollout, 0, 0, [0]).cost().edges == 34


def test_the_tree_of_dynamic_treerpo_gets_cheaper_towards_the_data(on_glyphs: Load) -> None:
    rollout = on_glyphs("dynamic_treerpo").rollout
    costs = [grow(rollout, 0, 25 * left, [0]).cost().rollout for left in (0, 4, 8)]
    assert costs == [207, 147, 87]


def test_the_papers_count_of_densegrpo(on_glyphs: Load) -> None:
    """264 scores: its code scores the state before the last, deterministic step too, which is the image again."""
    rollout = on_glyphs("densegrpo").rollout
    cost = Probed(Chain(), duplicate=True).forecast(rollout.num_inference_steps, rollout.group_size)
    assert (cost.rollout, cost.edges, cost.leaves) == (1320, 216, 264)


def test_several_rewards_have_a_clipped_term_each(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The layer of docs/methods.md over DanceGRPO."""
    (block,) = re.findall(r"```yaml\n# two_rewards\.yaml\n(.*?)```", (FOLDER.parents[1] / "docs" / "methods.md").read_text(), re.S)  # fmt: skip
    (tmp_path / "two_rewards.yaml").write_text(block)
    layers = ["configs/methods/dance_grpo.yaml", "configs/models/glyphs.yaml", "configs/rewards/ocr_glyphs.yaml"]
    config, _ = load_config([*layers, str(tmp_path / "two_rewards.yaml")], [f"policy.path={tiny_pipeline}"])
    assert channels_of(config.reward) == ("ocr", "jpeg_compressibility")
    rollout = config.rollout
    tree = grow(rollout, 0, 0, [0])
    scores = torch.rand(len(tree.leaves), 2, generator=torch.Generator().manual_seed(0)).double()
    edges = trainer(config).signal.edges(
        forest_of(rollout, tree), scores, torch.ones_like(scores, dtype=torch.bool), channels_of(config.reward), SignalContext(0, 0)
    )  # fmt: skip
    assert edges.advantages.values.shape == (180, 2) and int(edges.chosen.sum()) == 108
    ratio = edges.advantages.values.std(0)
    assert float(ratio[1] / ratio[0]) == pytest.approx(0.5, rel=1e-3)


def test_dgpo_draws_from_the_noisiest_seven_of_ten_levels(on_glyphs: Load) -> None:
    """Its code for OCR: random.sample(range(trunc_steps + 1), 4) with trunc_steps 6."""
    law = on_glyphs("dgpo").trainer.law  # type: ignore[attr-defined]
    assert sorted(law.draw(generator(0), 7, list(range(10)))) == list(range(7))
    with pytest.raises(ValueError, match="the 7 levels"):
        law.draw(generator(0), 8, list(range(10)))
