"""CLIPScore("glyphs"), the CLIP that comes with the package: it runs as it is, on words that it has not seen."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.config import load_config
from flowalign.glyphs import PIPELINE, held_out_prompts, make_prompt
from flowalign.glyphs.prompts import INKS, LETTERS, PAPERS
from flowalign.glyphs.renderer import render
from rewards import CLIPScore, RewardBatch, score
from rewards.image.clip import GLYPHS, load_clip
from rewards.image.scorer import unit

WORDS = [record["target"] for record in held_out_prompts()]


@cache
def reward() -> CLIPScore:
    made = CLIPScore("glyphs")
    made.load()
    return made


def scenes(count: int) -> tuple[list[str], list[str], list[str]]:
    """Words, inks, papers of the first held-out prompts."""
    records = held_out_prompts()[:count]
    return WORDS[:count], [record["ink"] for record in records], [record["paper"] for record in records]


def prompts_of(words: list[str], inks: list[str], papers: list[str]) -> list[str]:
    return [make_prompt(*each) for each in zip(words, inks, papers, strict=True)]


def scores(images: Tensor, prompts: list[str], grad: bool = False, made: CLIPScore | None = None) -> Tensor:
    return score(made or reward(), RewardBatch(prompts=prompts, images=images), grad=grad).scores[:, 0]


def one_letter_off(words: list[str]) -> list[str]:
    """The n-th word with its letter n mod 4 nine letters on."""
    changed = []
    for number, word in enumerate(words):
        place = number % 4
        letter = LETTERS[(LETTERS.index(word[place]) + 9) % 26]
        changed.append(word[:place] + letter + word[place + 1 :])
    return changed


def test_it_finds_the_caption_of_a_picture_among_32_that_are_held_out() -> None:
    clip = load_clip("glyphs", None, torch.float32)
    pictures, captions = render(*scenes(256)), prompts_of(*scenes(256))
    images, texts = unit(clip.images(clip.preprocess(pictures))), unit(clip.texts(captions))
    for rows in torch.arange(256).split(32):  # each set on its own
        assert float(((images[rows] @ texts[rows].T).argmax(1) == torch.arange(32)).float().mean()) >= 0.9
    torch.testing.assert_close((images * texts).sum(1), scores(pictures, captions))


def test_a_wrong_letter_a_wrong_ink_and_a_wrong_paper_lower_the_score() -> None:
    words, inks, papers = scenes(64)
    prompts, right = prompts_of(words, inks, papers), render(words, inks, papers)
    next_ink, next_paper = (
        {name: names[(number + 1) % 4] for number, name in enumerate(names)} for names in (list(INKS), list(PAPERS))
    )
    wrong = {
        "letter": render(one_letter_off(words), inks, papers),
        "ink": render(words, [next_ink[ink] for ink in inks], papers),
        "paper": render(words, inks, [next_paper[paper] for paper in papers]),
    }
    own = scores(right, prompts)
    for what, pictures in wrong.items():
        lower = scores(pictures, prompts)
        assert float((lower < own).float().mean()) > 0.95, what
        assert float(own.mean() - lower.mean()) > 0.05, what


def test_the_more_letters_are_wrong_and_the_more_is_blurred_the_lower_the_score() -> None:
    from torchvision.transforms.functional import gaussian_blur

    words, inks, papers = scenes(64)
    prompts, pictures = prompts_of(words, inks, papers), render(words, inks, papers)
    others = ["".join(one_letter_off([letter * 4])[0][0] for letter in word) for word in words]  # all letters differ
    means = [
        float(scores(render([o[:n] + w[n:] for w, o in zip(words, others, strict=True)], inks, papers), prompts).mean())
        for n in range(5)
    ]
    assert means == sorted(means, reverse=True) and means[0] - means[4] > 0.3
    blurred = [float(scores(gaussian_blur(pictures, 9, sigma), prompts).mean()) for sigma in (0.5, 1.5, 2.5)]
    assert blurred == sorted(blurred, reverse=True)


def test_the_gradient_is_that_of_finite_differences() -> None:
    words, inks, papers = scenes(4)
    made, prompts = CLIPScore("glyphs", dtype="fp64"), prompts_of(one_letter_off(words), inks, papers)
    generator = torch.Generator().manual_seed(0)
    images = render(words, inks, papers).double() * 0.8 + 0.1
    along = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scores(leaf, prompts, True, made).sum(), leaf)
    above, below = (scores((images + h * along).requires_grad_(), prompts, True, made).sum() for h in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * along).sum(), (above - below).detach() / 2e-5, rtol=1e-6, atol=1e-8)


def test_a_few_steps_along_the_gradient_raise_the_score() -> None:
    words, inks, papers = scenes(8)
    prompts, images = prompts_of(one_letter_off(words), inks, papers), render(words, inks, papers)
    start = scores(images, prompts)
    for _ in range(5):
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scores(leaf, prompts, True).sum(), leaf)
        images = (images + 0.3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
    assert bool((scores(images, prompts) > start + 0.05).all())


def test_the_folder_is_small_and_reads_as_the_pipeline_does() -> None:
    assert sum(file.stat().st_size for file in GLYPHS.iterdir()) <= 2**21
    assert "license: apache-2.0" in (GLYPHS / "README.md").read_text()
    from transformers import AutoTokenizer

    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (GLYPHS, PIPELINE / "tokenizer"))
    asked = [*prompts_of(*scenes(16)), "", "a zebra, 7 times"]
    assert ours(asked).input_ids == theirs(asked).input_ids and len(ours) == len(theirs)


def test_its_spec_is_that_of_the_shipped_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where a folder of this name lies in the working directory."""
    spec = CLIPScore("glyphs").spec
    assert (spec.checkpoint, spec.licence, spec.memory) == ("glyphs", "code and weights Apache-2.0", "cpu")
    assert spec.differentiable and CLIPScore().spec.memory == "S" and "MIT" in CLIPScore().spec.licence
    monkeypatch.chdir(tmp_path)
    Path("glyphs").mkdir()
    CLIPScore("glyphs").load()


def test_a_configuration_names_it() -> None:
    config, _ = load_config(
        ["configs/methods/flow_grpo.yaml", "configs/models/glyphs.yaml", "configs/rewards/clip_glyphs.yaml"], []
    )
    assert repr(config.reward) == repr(CLIPScore("glyphs"))
