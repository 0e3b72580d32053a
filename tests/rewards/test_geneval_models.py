"""GenEval's detector and color classifier: their arithmetic by hand, and loading from tiny checkpoints of the real layouts."""

import json
from pathlib import Path

import pytest
import torch

from rewards import CLIPColors, GenEval, Mask2Former, RewardBatch, score
from rewards.geneval.clauses import CLASSES, COLORS
from rewards.geneval.clip_colors import cut_out
from rewards.geneval.mask2former import RENAMED, check_classes, instances

COCO = {number: {new: old for old, new in RENAMED.items()}.get(name, name) for number, name in enumerate(CLASSES)}


def test_instances_by_hand():
    """Three queries, two classes: a sure one, one with an unsure mask, one without an object."""
    classes = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.01, 0.01, 0.98]]).log()
    masks = torch.full((3, 4, 6), -20.0)
    masks[0, 1:3, 2:5] = 20
    masks[1, 0, 0], masks[1, 3, 5] = torch.tensor(0.6).logit(), torch.tensor(0.8).logit()
    found = instances(classes, masks)
    assert found.boxes.tolist() == [[2, 1, 5, 3], [0, 0, 6, 4]] and found.labels.tolist() == [0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.8 * 0.7]))
    assert torch.equal(found.masks[0], masks[0] > 0) and found.masks.shape == (2, 4, 6)


def test_a_query_may_be_two_classes_and_an_empty_mask_is_nothing():
    classes = torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]]).log()
    masks = torch.stack([torch.full((2, 2), 20.0), torch.full((2, 2), -20.0)])
    assert instances(classes, masks).labels.tolist() == [0, 1]
    assert len(instances(classes[1:], masks[1:]).boxes) == 0


def test_classes_are_compared_by_name_and_number():
    check_classes(COCO, CLASSES)
    check_classes({**COCO, 57: "sofa", 3: "motorbike"}, CLASSES)
    for wrong in (
        {**COCO, 0: "bicycle", 1: "person"},
        {0: "person"},
        {number: f"LABEL_{number}" for number in range(80)},
    ):
        with pytest.raises(ValueError, match="expected the 80 of COCO instances"):
            check_classes(wrong, CLASSES)


def test_objects_are_cut_out():
    image = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)
    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    masks[0, 1, 2] = True
    plain, masked = (
        cut_out(image, torch.tensor([[1.4, 0.6, 3.4, 2.6]]), None),
        cut_out(image, torch.tensor([[1.0, 1, 3, 3]]), masks),
    )
    assert torch.equal(plain[0], image[:, 1:3, 1:3])
    assert masked[0][:, 0, 1].tolist() == image[:, 1, 2].tolist() and set(masked[0].flatten().tolist()) - {0x99} == set(
        image[:, 1, 2].tolist()
    )
    outside = cut_out(image, torch.tensor([[-3.0, -2, 0, 0], [9, 9, 12, 12]]), None)
    assert torch.equal(outside[0], image[:, :1, :1]) and torch.equal(outside[1], image[:, 3:, 4:])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Mask2Former with the names of COCO, saved as transformers does."""
    from safetensors.torch import save_file
    from transformers import Mask2FormerConfig, Mask2FormerModel, SwinConfig

    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, image_size=32,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, num_queries=6,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, id2label=COCO,
        label2id={name: number for number, name in COCO.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    folder, head = tmp_path_factory.mktemp("mask2former"), torch.nn.Linear(32, 81)
    weights = {f"model.{key}": value for key, value in Mask2FormerModel(config).state_dict().items()}
    weights |= {"class_predictor.weight": 8 * head.weight.detach(), "class_predictor.bias": head.bias.detach()}
    save_file(weights | {"criterion.empty_weight": torch.ones(81)}, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    return folder


def test_a_tiny_detector_sees_each_picture_alone(checkpoint):
    detector = Mask2Former(str(checkpoint), short_side=32, long_side=64, device="cpu")
    images = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    answers = detector.detect(images, CLASSES)
    assert len(answers) == 2 and all(len(each.boxes) > 0 for each in answers)
    assert all(each.masks.shape == (len(each.boxes), 20, 30) for each in answers)
    assert torch.equal(detector.detect(images[1:], CLASSES)[0].scores, answers[1].scores)
    record = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    assert score(GenEval(detector), RewardBatch(prompts=["p"], images=images[:1], metadata=[record])).valid.all()
    detector.close()
    assert torch.equal(detector.detect(images, CLASSES)[0].scores, answers[0].scores)  # loads again


def test_its_answer_is_that_of_the_whole_model(checkpoint, monkeypatch):
    """On a picture that needs neither resizing nor padding. Its loss, which needs scipy, is left out."""
    from transformers.models.mask2former import modeling_mask2former as modeling

    class NoLoss(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.eos_coef, self.num_labels = 0.1, 80
            self.register_buffer("empty_weight", torch.ones(81))

    monkeypatch.setattr(modeling, "Mask2FormerLoss", NoLoss)
    whole = modeling.Mask2FormerForUniversalSegmentation.from_pretrained(checkpoint).eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        answer = whole((image / 255 - mean[:, None, None]) / std[:, None, None])
    masks = torch.nn.functional.interpolate(answer.masks_queries_logits, (64, 64), mode="bilinear")
    expected = instances(answer.class_queries_logits[0], masks[0])
    (found,) = Mask2Former(str(checkpoint), short_side=64, long_side=64, device="cpu").detect(image, CLASSES)
    torch.testing.assert_close(found.scores, expected.scores)
    assert len(found.boxes) and torch.equal(found.labels, expected.labels) and torch.equal(found.boxes, expected.boxes)


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    inner = next(key for key in weights if "transformer_module" in key)
    for changed, message in (
        (
            {key: value for key, value in weights.items() if key != "class_predictor.bias"},
            r"without \['class_predictor.bias'\]",
        ),
        ({key: value for key, value in weights.items() if key != inner}, "without"),
        (weights | {"model.other": torch.ones(1)}, r"with \['model.other'\]"),
    ):
        save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            Mask2Former(str(tmp_path), device="cpu").load()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny model of open_clip: its name and a file of its weights."""
    import open_clip

    folder = Path(tmp_path_factory.mktemp("clip"))
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-geneval.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-geneval", load_weights=False).state_dict(), folder / "weights.pt")
    return "tiny-geneval", str(folder / "weights.pt")


def test_a_tiny_classifier_answers_as_clip_by_hand(clip):
    import open_clip
    from PIL import Image
    from torch.nn.functional import normalize

    colors = CLIPColors(*clip, device="cpu")
    image = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[0.0, 0, 20, 30], [10, 5, 40, 40], [0, 0, 40, 40]])
    answer = colors.classify(image, boxes, None, "stop sign", COLORS)
    model, _, transform = open_clip.create_model_and_transforms(clip[0], pretrained=clip[1])
    for box, color in zip(boxes.long().tolist(), answer, strict=True):
        crop = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(box)
        with torch.no_grad():
            seen = model.eval().encode_image(transform(crop)[None])
            near = []
            for name in COLORS:
                texts = [
                    f"a photo of a {name} stop sign",
                    f"a photo of a {name}-colored stop sign",
                    f"a photo of a {name} object",
                ]
                mean = normalize(model.encode_text(open_clip.tokenize(texts)), dim=-1).mean(0)
                near.append(torch.cosine_similarity(seen[0], mean, dim=0).item())
        assert color == COLORS[max(range(10), key=near.__getitem__)]
    assert colors.classify(image, boxes[:0], None, "dog", COLORS) == []
    assert colors.classify(image, boxes[1:2], None, "stop sign", COLORS) == answer[1:2]
    colors.close()


def test_the_classifier_of_the_benchmark_has_quick_gelu():
    """OpenAI's weights were trained with it; open_clip 3 builds "ViT-L-14" with GELU and only warns."""
    import open_clip

    default = CLIPColors()
    assert open_clip.get_model_config(default.model)["quick_gelu"]
    assert open_clip.get_pretrained_cfg(default.model, default.pretrained)["quick_gelu"]
    with pytest.raises(
        ValueError, match="trained with another activation; expected that of the weights: add '-quickgelu'"
    ):
        CLIPColors("ViT-L-14").load()


def test_wrong_options():
    with pytest.raises(ValueError, match="expected 0 < short_side <= long_side"):
        Mask2Former(short_side=900, long_side=800)
