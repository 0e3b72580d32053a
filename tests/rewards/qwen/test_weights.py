"""Names and parts of checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards.qwen.weights import find_first, head_of, merge_lora, split_heads, todays_names
from tests.helpers import tiny_qwen as tiny

ONE = torch.ones(1)


def names(*old: str) -> list[str]:
    return list(todays_names(dict.fromkeys(old, ONE)))


def test_names_of_all_releases_become_todays() -> None:
    expected = ["visual.blocks.0.norm1.weight", "language_model.layers.0.mlp.up_proj.weight", "language_model.embed_tokens.weight",
                "language_model.norm.weight", "rm_head.0.weight"]  # fmt: skip
    old = ["visual.blocks.0.norm1.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight",
           "model.norm.weight", "rm_head.0.weight"]  # fmt: skip
    new = [*(f"model.{name}" for name in expected[:-1]), "rm_head.0.weight"]
    for layout in (old, new, expected):
        assert names(*layout) == expected
        assert names(*(f"base_model.model.{name}" for name in layout)) == expected
    assert names("lm_head.weight") == []
    place = "base_model.model.model.layers.0.mlp.up_proj"
    both = names(f"{place}.lora_A.default.weight", f"{place}.base_layer.weight")
    assert both == [f"language_model.layers.0.mlp.up_proj.{end}" for end in ("lora_A.weight", "base_layer.weight")]
    with pytest.raises(ValueError, match=r"got 'model\.norm\.weight' as a second tensor"):
        names("model.language_model.norm.weight", "model.norm.weight")


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
@pytest.mark.parametrize("inside", ["", ".base_layer"])
def test_lora_is_added(rslora: bool, scale: float, inside: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, down, up, bias = (torch.randn(size, generator=generator) for size in ((3, 5), (4, 5), (3, 4), (3,)))
    state = {
        f"a{inside}.weight": weight.bfloat16(),
        f"a{inside}.bias": bias,
        "a.lora_A.weight": down,
        "a.lora_B.weight": up,
    }
    merged = merge_lora({**state, "b.weight": ONE}, alpha=8, rslora=rslora)
    assert merged.keys() == {"a.weight", "a.bias", "b.weight"} and merged["b.weight"] is ONE
    torch.testing.assert_close(merged["a.weight"], weight.bfloat16().float() + scale * up @ down)


def test_half_a_lora_is_refused() -> None:
    whole = {"a.weight": torch.ones(2, 2), "a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(2, 1)}
    assert merge_lora(whole, 1)
    for missing in whole:
        with pytest.raises(ValueError, match=rf"got a LoRA of 'a' without \['{missing}'\]"):
            merge_lora({name: tensor for name, tensor in whole.items() if name != missing}, 1)


def test_heads_are_split_off_and_built() -> None:
    x = torch.randn(7, 64)
    state = tiny.ranknet("rm_heads.head_0") | tiny.ranknet("rm_heads.head_1") | {"visual.x": ONE}
    body, heads = split_heads(state)
    assert body == {"visual.x": ONE} and heads.keys() == {"head_0", "head_1"}
    state = heads["head_1"]

    def linear(number: int, x: Tensor) -> Tensor:
        return x @ state[f"{number}.weight"].T + state[f"{number}.bias"]

    torch.testing.assert_close(head_of(state, "")(x), linear(5, linear(3, linear(0, x).relu()).relu()))
    weight = torch.randn(1, 64)
    torch.testing.assert_close(head_of(split_heads({"rm_head.weight": weight})[1]["rm_head"], "")(x), x @ weight.T)


def test_other_heads_are_refused() -> None:
    good = split_heads(tiny.ranknet("rm_head"))[1]["rm_head"]
    for bad in ({"bias": ONE}, good | {"layer_1.0.weight": ONE}, {**good, "3.weight": torch.ones(16, 3)},
                {name: tensor for name, tensor in good.items() if name != "5.bias"}):  # fmt: skip
        with pytest.raises(ValueError, match=r"got a head of there with the tensors .*; expected weight, or 0.weight"):
            head_of(bad, "there")


def test_the_first_file_that_is_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b.pth").touch()
    assert find_first("model", str(tmp_path), ("a.safetensors", "b.pth")) == tmp_path / "b.pth"
    (tmp_path / "a.safetensors").touch()
    assert find_first("model", str(tmp_path), ("a.safetensors", "b.pth")) == tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="and no d there"):
        find_first("model", str(tmp_path), ("c", "d"))
