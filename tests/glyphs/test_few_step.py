"""The few-step generators: what differs from the base, what they are trained on, and that they write."""

import filecmp
import json

import pytest
import torch

import flowalign as fa
from flowalign.data import load_prompts
from flowalign.glyphs import FEW_STEP, FEW_STEP_SCHEDULE, PIPELINE
from flowalign.glyphs.few_step_training import FewStepRecipe, Pairs, make_pairs, reflow_loss, train_few_step
from rewards import OCR
from samplers import PlainShift, normal

QUIET = lambda stage, step, loss: None  # noqa: E731
TINY = FewStepRecipe(pairs=8, shard=4, batch_size=4, steps=4, schedule_steps=8, checkpoint_every=2)


@pytest.mark.parametrize("steps", FEW_STEP)
def test_only_the_transformer_and_the_shift_differ_from_the_base(steps):
    folder = FEW_STEP[steps]
    files = {path.relative_to(PIPELINE) for path in PIPELINE.rglob("*") if path.is_file()}
    assert files == {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    differ = {str(name) for name in files if not filecmp.cmp(PIPELINE / name, folder / name, shallow=False)}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert differ == {weights, "scheduler/scheduler_config.json", "README.md"}
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler == {**json.loads((PIPELINE / "scheduler/scheduler_config.json").read_text()), "shift": 1.0}


@pytest.mark.parametrize(("steps", "levels"), [(1, [1.0]), (4, [1.0, 0.9, 0.75, 0.5])])
def test_they_sample_on_the_grid_that_they_were_trained_on(steps, levels):
    policy = fa.load_policy(f"glyphs-{steps}step", trainable="none")
    assert policy.sampling == fa.Sampling(steps, 1.0, fa.Size(24, 48), PlainShift())
    assert FEW_STEP_SCHEDULE.sigmas(steps, torch.tensor).tolist() == pytest.approx([*levels, 0.0])


@pytest.mark.parametrize(("steps", "least"), [(4, 0.4), (1, 0.4)])
def test_they_write_words_that_can_be_read(steps, least):
    """The base in 6 steps without guidance: 31 %. On 64 held-out words a share of one half has a standard error of 6 %."""
    policy, prompts = fa.load_policy(f"glyphs-{steps}step", trainable="none"), _prompts(64)
    result = fa.evaluate(policy, prompts, [OCR(metric="exact", fold={"0": "O"})], batch_size=64)
    assert float(result.scores["ocr"].mean()) > least


def _prompts(count):
    return load_prompts("flowalign.glyphs:held_out_prompts")[:count]


def test_pairs_are_the_teachers_and_are_read_again(tmp_path):
    made = []

    def teacher(noise, prompts):
        made.append(len(prompts))
        return 2 * noise

    pairs = make_pairs(teacher, (3, 2, 2), TINY, tmp_path, QUIET)
    assert torch.equal(pairs.x0, 2 * pairs.noise) and len(pairs.prompts) == 8 and made == [4, 4]
    assert torch.equal(pairs.noise[4:], normal((4, 3, 2, 2), 0, "pairs", 1))
    again = make_pairs(teacher, (3, 2, 2), TINY, tmp_path, QUIET)
    assert made == [4, 4] and torch.equal(again.x0, pairs.x0) and again.prompts == pairs.prompts
    held_out = {record.prompt for record in _prompts(512)}
    assert not held_out & set(pairs.prompts)


@pytest.mark.parametrize("steps", [1, 4])
def test_loss_is_zero_for_the_velocity_of_the_pairs_and_half_its_square_off_it(steps):
    """On the line of a pair z − x0 is the same at each level; an offset c costs c²."""
    noise = torch.randn(8, 3, 2, 2)
    pairs = Pairs(noise, 0.5 * noise, [f"{row}" for row in range(8)])
    seen = []

    def velocity(x, sigma, prompts):
        rows = torch.tensor([int(prompt) for prompt in prompts])
        torch.testing.assert_close(x, torch.lerp(pairs.x0[rows], noise[rows], sigma.view(-1, 1, 1, 1)))
        seen.extend(sigma.tolist())
        return 0.5 * noise[rows] + offset

    for step, offset in enumerate((0.0, 0.3)):
        loss = reflow_loss(velocity, pairs, steps, TINY, step)
        assert float(loss) == pytest.approx(offset**2, abs=1e-7)
    levels = FEW_STEP_SCHEDULE.sigmas(steps, torch.tensor)[:-1].tolist()
    assert set(seen) <= set(levels)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path):
    def trained(folder, *stops):
        torch.manual_seed(0)
        network = torch.nn.Linear(1, 1)
        noise = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
        pairs = Pairs(noise, 0.5 * noise, [""] * 8)
        for stop in stops:
            torch.manual_seed(0)
            network = torch.nn.Linear(1, 1)
            recipe = FewStepRecipe(batch_size=4, steps=stop, schedule_steps=8, checkpoint_every=2)
            train_few_step(network, lambda x, sigma, prompts, n=network: n(x), pairs, 4, recipe, folder, QUIET)
        return network.weight.item(), network.bias.item()

    assert trained(tmp_path / "a", 4) == trained(tmp_path / "b", 2, 4)
