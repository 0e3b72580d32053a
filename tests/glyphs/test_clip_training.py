"""Training of the Glyphs CLIP: what a batch holds, the loss in closed form, and a resumed run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from flowalign.glyphs.clip_checkpoint import configuration
from flowalign.glyphs.clip_figures import other_colors, other_letters
from flowalign.glyphs.clip_training import (
    SIZES,
    ClipRecipe,
    Samples,
    Stage,
    captions,
    change_one,
    contrast,
    damage,
    draw_examples,
    draw_families,
    draw_lines,
    is_held_out,
    scenes_of,
    train_clip,
)
from flowalign.glyphs.parts import build_tokenizer
from flowalign.glyphs.prompts import held_out_prompts, make_prompt, train_prompts
from flowalign.glyphs.renderer import render
from rewards.image.clip import GLYPHS

BATCH = Stage(families=2, neighbours=1, lines=1, samples=2, wrong=3, until=2)
TINY = ClipRecipe(
    stages=(replace(BATCH, lines=0, wrong=0, until=1), BATCH), steps=2, schedule_steps=2, warmup=1, checkpoint_every=1
)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def samples(trusted: bool) -> Samples:
    """Grey pictures, asked to show KITE and read as MOON."""
    asked, read = (scenes_of([make_prompt(word, "red", "white")] * 3) for word in ("KITE", "MOON"))
    return Samples(torch.full((3, 3, 24, 48), 0.5), asked, read, torch.full((3,), trusted))


def test_scenes_and_captions_are_inverse() -> None:
    prompts = [record["prompt"] for record in held_out_prompts()[:40]]
    assert captions(scenes_of(prompts)) == prompts
    assert bool(is_held_out(scenes_of(prompts)).all())
    assert not bool(is_held_out(scenes_of([record["prompt"] for record in train_prompts()])).any())


def test_a_neighbour_differs_in_one_column_and_each_column_is_drawn(generator: torch.Generator) -> None:
    scenes = torch.stack([torch.randint(size, (500,), generator=generator) for size in SIZES.tolist()], 1)
    differs = change_one(scenes, generator) != scenes
    assert differs.sum(1).tolist() == [1] * 500
    assert float(differs.float().mean(0).sub(1 / 6).abs().max()) < 0.06
    assert bool((change_one(scenes, generator) < SIZES).all())


def test_a_batch_holds_families_of_distinct_scenes_and_no_held_out_word(generator: torch.Generator) -> None:
    scenes = torch.cat([draw_families(300, 3, generator) for _ in range(5)])
    assert not bool(is_held_out(scenes).any())
    scenes = draw_families(10, 3, generator)
    assert len(scenes.unique(dim=0)) == len(scenes) > 35
    near = (scenes[:, None] != scenes[None]).sum(2) == 1
    assert bool(near.any(1).all())


def test_a_line_holds_all_scenes_that_differ_in_one_column(generator: torch.Generator) -> None:
    for _ in range(8):
        line = draw_lines(1, generator)
        varies = [column for column in range(6) if len(line[:, column].unique()) > 1]
        assert len(varies) == 1 and line[:, varies[0]].tolist() == list(range(SIZES[varies[0]]))
    assert draw_lines(0, generator).shape == (0, 6)
    assert not bool(is_held_out(draw_lines(300, generator)).any())


def test_no_near_miss_of_a_scene_is_a_held_out_word(generator: torch.Generator) -> None:
    scene = scenes_of([held_out_prompts()[0]["prompt"]]).repeat(2000, 1)
    scene[:, 0] = (scene[:, 0] + 1) % 26  # one letter from a held-out word
    near = change_one(scene, generator)
    assert not bool(is_held_out(near).any()) and (near != scene).sum(1).tolist() == [1] * 2000


def test_a_trusted_sample_shows_what_is_read_and_another_is_a_damaged_picture_of_what_was_asked_for(
    generator: torch.Generator,
) -> None:
    trusted, other = (draw_examples(BATCH, samples(kind), generator) for kind in (True, False))
    assert captions(trusted.scenes[-2:]) == [make_prompt("MOON", "red", "white")] * 2
    assert captions(other.scenes[-2:]) == [make_prompt("KITE", "red", "white")] * 2
    for examples, asked in ((trusted, "MOON"), (other, "KITE")):
        wrong = examples.wrong != scenes_of([make_prompt(asked, "red", "white")])
        assert wrong.shape == (2, 3, 6) and wrong.sum(2).tolist() == [[1] * 3] * 2
    middle = slice(8, 16)  # rows and columns within the letters
    for grey, drawn in ((trusted.intact, other.intact), (other.damaged, other.intact)):
        assert float(grey[-2:, 1, middle, middle].std()) < 0.1 < float(drawn[-2:, 1, middle, middle].std())


def test_damage_changes_every_picture_and_stays_near_it(generator: torch.Generator) -> None:
    pictures, other = (render([word] * 64, ["red"] * 64, ["yellow"] * 64) for word in ("WWWW", "AWWW"))
    change = (damage(pictures, other, generator) - pictures).abs()
    assert bool((change.flatten(1).amax(1) > 0.1).all()) and float(change.mean()) < 0.15


class Given:
    """An open_clip.CLIP whose features are its inputs."""

    logit_scale = torch.tensor(math.log(2.0))

    def encode_image(self, pixels: Tensor, normalize: bool) -> Tensor:
        return pixels

    encode_text = encode_image


def test_the_loss_has_a_damaged_copy_for_captions_only() -> None:
    """Orthogonal pairs, of which the damaged copies have cosine 1/2: by caption e² + 2 + e¹ for three, by picture e² + 2."""
    features = one_hot(torch.arange(3), 4).float()
    damaged = 0.5 * features
    loss, found = contrast(Given(), torch.cat([features, damaged]), features)
    by_text = -math.log(math.e**2 / (math.e**2 + 2 + math.e))
    by_image = -math.log(math.e**2 / (math.e**2 + 2))
    assert loss.item() == pytest.approx((by_text + by_image) / 2, rel=1e-6) and found == 1.0


def test_the_loss_has_wrong_captions_for_the_last_pictures_only() -> None:
    """As above with cosine 0 for the damaged, and 3/4 and 1 1/4 for two wrong captions of the last picture."""
    features = one_hot(torch.arange(3), 4).float()
    texts = torch.cat([features, 0.75 * features[2:], 1.25 * features[2:]])
    loss, found = contrast(Given(), torch.cat([features, 0 * features]), texts, samples=1)
    pair = -math.log(math.e**2 / (math.e**2 + 2))
    by_text, last = (
        -math.log(math.e**2 / (math.e**2 + 3)),
        -math.log(math.e**2 / (math.e**2 + 2 + math.e**1.5 + math.e**2.5)),
    )
    assert loss.item() == pytest.approx((by_text + (2 * pair + last) / 3) / 2, rel=1e-6)
    assert found == pytest.approx(2 / 3)


def network() -> Any:
    torch.manual_seed(0)
    vision = {"image_size": 24, "patch_size": 12, "width": 16, "head_width": 8, "layers": 1}
    text = {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(8, vision, text)


def trained(recipe: ClipRecipe, file: Path) -> dict[str, Tensor]:
    made = network()

    def tokens(prompts: list[str]) -> Tensor:
        return scenes_of(prompts)

    train_clip(made, tokens, lambda x: x[..., :24], samples(True), recipe, file, lambda step, loss, found: None)
    return made.state_dict()


def test_a_resumed_run_is_the_run_that_was_not_stopped_and_every_part_moves(tmp_path: Path) -> None:
    straight, start = trained(TINY, tmp_path / "straight.pt"), network().state_dict()

    class Stop(Exception):
        pass

    def stop(step: int, loss: float, found: float) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        train_clip(network(), scenes_of, lambda x: x[..., :24], samples(True), TINY, tmp_path / "stopped.pt", stop)
    resumed = trained(TINY, tmp_path / "stopped.pt")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [name for name in start if torch.equal(start[name], straight[name])] == []


def test_the_shipped_configuration_is_what_the_script_writes() -> None:
    shipped = json.loads((GLYPHS / "open_clip_config.json").read_text())
    assert json.loads(json.dumps(configuration(build_tokenizer()))) == shipped


def test_the_others_of_the_figures_are_distinct_and_near(generator: torch.Generator) -> None:
    scene = scenes_of([make_prompt("KITE", "red", "yellow")])[0]
    letters, colors = other_letters(scene, generator), other_colors(scene)
    assert letters.shape == (31, 6) and len(letters.unique(dim=0)) == 31 and len(colors.unique(dim=0)) == 6
    assert (letters != scene).sum(1).tolist() == [1] * 31 and not bool((letters[:, 4:] != scene[4:]).any())
    assert (colors != scene).sum(1).tolist() == [1] * 6 and not bool((colors[:, :4] != scene[:4]).any())
