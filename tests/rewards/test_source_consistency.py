"""What an edit kept of its source: closed forms, masks, sizes, and the gradient."""

import pytest
import torch
from PIL import Image

from flowalign.glyphs.edit.prompts import AXES, Edit, draw_edits, held_out_prompts
from flowalign.glyphs.prompts import Scene
from rewards import RewardBatch, RewardError, SourceConsistency, score

KITE = Scene("KITE", "red", "white")
NO_SHIFT = torch.zeros(1, 2, dtype=torch.long)


def consistency(images, sources, metadata=None, **options):
    conditions = [[] if source is None else [source] for source in sources]
    batch = RewardBatch(prompts=["p"] * len(images), images=images, conditions=conditions, metadata=metadata or [])
    return score(SourceConsistency(**options), batch, max_fail_rate=1.0)


def test_it_is_one_less_the_mean_difference_over_kept_pixels():
    source = torch.rand(3, 2, 3)
    edited = source.clone()
    edited[:, 0, 0] = 1 - source[:, 0, 0]  # to be changed
    edited[1, 1, 2] = source[1, 1, 2] * 0.5  # to be kept, one channel of 5 pixels
    keep = {"keep": ["011", "111"]}
    output = consistency(torch.stack([edited] * 2), [source] * 2, [keep, {}])
    lost, asked = float(source[1, 1, 2]) * 0.5, float((edited - source)[:, 0, 0].abs().sum())
    assert output.scores[:, 0].tolist() == pytest.approx([1 - lost / 15, 1 - (lost + asked) / 18])
    assert output.components["kept"].tolist() == pytest.approx([5 / 6, 1])
    assert torch.equal(
        output.scores,
        consistency(torch.stack([edited] * 2), [source] * 2, [{"m": k} for k in (keep["keep"], None)], key="m").scores,
    )


@pytest.mark.parametrize("axis", AXES)
def test_right_results_and_sources_of_glyphs_keep_all_and_other_papers_do_not(axis):
    record = next(record for record in held_out_prompts() if record["axis"] == axis)
    target = {"ink": "blue", "paper": "pink", "word": "LAMP"}[axis]
    sources, results = draw_edits([Edit(KITE, axis, target)], NO_SHIFT)
    kept = (sources - results).abs().amax(1)[0] < 1 / 255
    rows = ["".join(str(int(pixel)) for pixel in row) for row in kept.tolist()]
    other = draw_edits([Edit(Edit(KITE, axis, target).result, "paper", "cyan")], NO_SHIFT)[1]
    images = torch.cat([results, sources, other])
    right, source, wrong = consistency(images, [sources[0]] * 3, [{"keep": rows}] * 3).scores[:, 0].tolist()
    assert right == pytest.approx(1, abs=1e-4) and source == 1  # kept may differ by less than a level
    changed = 1 - (135 + 25) / 3 / 255  # white -> cyan
    if axis == "ink":  # paper alone is to be kept
        assert wrong == pytest.approx(changed, abs=1e-4)
    else:  # of a new paper the ink; of a new word the paper, and ink where the words agree
        assert wrong == pytest.approx(1, abs=1e-4) if axis == "paper" else changed < wrong < changed + 0.03
    assert len(record["keep"]) == 24 and {len(row) for row in record["keep"]} == {48}


def test_a_source_or_a_mask_of_another_size_is_resized():
    source = torch.zeros(3, 4, 4)
    source[:, :, 2:] = 1
    edited = torch.zeros(3, 2, 2)
    edited[:, :, 1] = 1
    assert (
        consistency(edited[None], [edited.repeat_interleave(2, 1).repeat_interleave(2, 2)]).scores.item() < 1
    )  # bilinear
    flat = torch.full((3, 5, 7), 0.25)
    assert consistency(torch.full((1, 3, 2, 2), 0.75), [flat]).scores.item() == pytest.approx(0.5)
    changed = torch.zeros(1, 3, 2, 2)
    changed[..., 0, 0] = 1
    mask = ["1011", "1111", "1111", "1111"]  # one of the four pixels below (0, 0) may change
    output = consistency(changed, [torch.zeros(3, 2, 2)], [{"keep": mask}])
    assert output.scores.item() == 1 and output.components["kept"].item() == 0.75


def test_a_mask_may_be_an_image(tmp_path):
    mask = Image.new("L", (2, 1))
    mask.putpixel((1, 0), 255)
    mask.save(path := tmp_path / "mask.png")
    edited = torch.tensor([[[[1.0, 0.25]]]]).expand(1, 3, 1, 2).contiguous()
    assert consistency(edited, [torch.zeros(3, 1, 2)], [{"keep": str(path)}]).scores.item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (["01", "1"], "of one length"),
        (["0x"], 'rows of "0" and "1"'),
        ([], 'rows of "0" and "1"'),
        (7, "the path of a mask image"),
        (["00"], "keeps no pixel of 1 x 2"),
        ("nowhere.png", "'nowhere.png', which cannot be read"),
        ("tests/rewards/test_source_consistency.py", "cannot be read"),
    ],
)
def test_a_mask_that_says_nothing_is_no_score(keep, reason):
    images = torch.rand(2, 3, 1, 2)
    output = consistency(images, list(images), [{"keep": keep}, {"keep": ["10"]}])
    assert output.valid[:, 0].tolist() == [False, True] and reason in output.info[0] and output.info[1] == ""


def test_without_a_source_there_is_no_score():
    images = torch.rand(2, 3, 2, 2)
    output = consistency(images, [images[0], None])
    assert output.valid[:, 0].tolist() == [True, False] and "no source image" in output.info[1]
    with pytest.raises(RewardError, match="expected conditions, which it reads"):
        score(SourceConsistency(), RewardBatch(prompts=["p"], images=images[:1]))


def test_the_gradient_is_that_of_finite_differences_and_none_where_there_is_no_score():
    source, draws = torch.full((3, 4, 6), 0.5), torch.Generator().manual_seed(0)
    images = (0.1 + 0.8 * torch.rand(2, 3, 2, 3, generator=draws, dtype=torch.float64)).requires_grad_()

    def total(images):
        batch = RewardBatch(
            prompts=["a", "b"], images=images, conditions=[[source], []], metadata=[{"keep": ["110", "111"]}, {}]
        )
        output = score(SourceConsistency(), batch, grad=True)
        return torch.where(output.valid, output.scores, 0).sum()

    (gradient,) = torch.autograd.grad(total(images), images)
    expected = -(images.detach()[0] - 0.5).sign() / 15
    expected[:, 0, 2] = 0
    assert torch.allclose(gradient[0], expected) and not gradient[1].any()
    along = torch.randn(images.shape, generator=draws, dtype=torch.float64)
    with torch.no_grad():
        change = (total(images + 1e-6 * along) - total(images - 1e-6 * along)) / 2e-6
    assert change.item() == pytest.approx((gradient * along).sum().item(), rel=1e-6)
