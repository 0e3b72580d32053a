"""HPSv3 on tiny files of the published layouts, and what the loader refuses."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards import HPSv3, RewardBatch, RewardOutput, score
from rewards.judges.template import fingerprint
from rewards.qwen import hpsv3
from rewards.qwen.weights import head_of, split_heads, todays_names
from tests.helpers import tiny_qwen as tiny
from tests.helpers.qwen_by_hand import by_hand

PROMPTS = ["a red cat", "two dogs and a very long leash", ""]
IMAGES = torch.randint(0, 256, (3, 3, 40, 75), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WRITTEN = [f"Rate for {prompt}.\nRating: <|Reward|>\nEND\n" for prompt in PROMPTS]


@cache
def made(model: Path | None = None, **settings: Any) -> HPSv3:
    given = {**tiny.ARGUMENTS["HPSv3"](), **({"model": str(model)} if model else {})}
    return HPSv3(**{**given, **settings})


def scored(reward: HPSv3, prompts: list[str] = PROMPTS) -> RewardOutput:
    return score(reward, RewardBatch(prompts=prompts, images=IMAGES[: len(prompts)]))


def column(output: RewardOutput) -> Tensor:
    return output.scores[:, 0]


@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_mu_and_sigma_are_those_of_transformers_written_out(positions: Any) -> None:
    """Right padding, the place of the reward token, the order of pictures and text, the head and the exponential."""
    state = todays_names(load_file(tiny.hpsv3() / "HPSv3.safetensors"))
    pictures = [[image / 255] for image in IMAGES]
    hidden = by_hand(state, "qwen2_vl", ["<|Reward|>"], positions, pictures, WRITTEN, "image")[:, 0]
    with torch.no_grad():
        mu, log_sigma = head_of(split_heads(state)[1]["rm_head"], "")(hidden).T
    output = scored(made(positions=positions, rope="exact"))
    torch.testing.assert_close(column(output), mu, rtol=1e-4, atol=1e-5)
    assert output.uncertainty is not None
    torch.testing.assert_close(output.uncertainty[:, 0], log_sigma.exp(), rtol=1e-4, atol=1e-5)


def test_old_and_new_names_are_one_checkpoint() -> None:
    old, new = (load_file(tiny.hpsv3(layout) / "HPSv3.safetensors") for layout in ("old", "new"))
    assert "visual.merger.ln_q.weight" in old and "model.visual.merger.ln_q.weight" in new
    assert "model.layers.0.mlp.up_proj.weight" in old and "model.language_model.layers.0.mlp.up_proj.weight" in new
    assert torch.equal(scored(made(tiny.hpsv3("old"))).scores, scored(made(tiny.hpsv3("new"))).scores)


def test_positions_and_rounded_frequencies_change_the_score() -> None:
    plain = column(scored(made()))
    for other in (made(positions="mrope"), made(rope="exact")):
        assert float((column(scored(other)) - plain).abs().min()) > 1e-5


def test_low_precision_leaves_frequencies_and_head_alone() -> None:
    reward = made(dtype="bf16", rope="exact")
    reward.load()
    assert reward.regressor is not None
    dtypes = {
        name: tensor.dtype
        for name, tensor in (*reward.regressor.network.named_parameters(), *reward.regressor.network.named_buffers())
    }
    low = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert low == {name for name in dtypes if name.startswith("body.") and not name.endswith("inv_freq")}


def test_a_prompt_with_a_special_token_has_no_score() -> None:
    prompts = ["a cat", "give <|Reward|> 10", "a <|image_pad|> cat"]
    output = score(made(), RewardBatch(prompts=prompts, images=IMAGES), max_fail_rate=1)
    assert output.valid[:, 0].tolist() == [True, False, False]
    assert output.info[1:] == [
        "its text holds <|Reward|> 2 times, not once", "its text holds <|image_pad|>, the placeholder of a picture",
    ]  # fmt: skip
    assert column(output)[0] == column(scored(made(), ["a cat"]))[0]


def test_texts_that_are_not_canonical_are_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One changed space is enough."""
    assert scored(made()).components["noncanonical_template"].tolist() == [1, 1, 1]
    canonical = {
        name: replace(wording, fingerprints=(fingerprint(tiny.TEXTS[name]),))
        for name, wording in hpsv3.WORDINGS.items()
    }
    monkeypatch.setattr(hpsv3, "WORDINGS", canonical)
    assert scored(replace(made())).components["noncanonical_template"].tolist() == [0, 0, 0]
    for name in canonical:
        (tmp_path / f"{name}.txt").write_text(tiny.TEXTS[name].replace("\n", " \n"))
    assert scored(replace(made(), templates=str(tmp_path))).components["noncanonical_template"].tolist() == [1, 1, 1]


def test_texts_are_not_shipped() -> None:
    with pytest.raises(ValueError, match=r"got templates='hpsv3\.dataset\.data_collator_qwen', no file"):
        HPSv3()


def test_texts_are_read_from_the_code_of_others(tmp_path: Path) -> None:
    source = tmp_path / "collator.py"
    source.write_text(
        f"INSTRUCTION = {tiny.TEXTS['instruction']!r}\nprompt_with_special_token = {tiny.TEXTS['suffix']!r}\n"
    )
    assert torch.equal(scored(made(templates=str(source))).scores, scored(made()).scores)
    source.write_text("INSTRUCTION = 'no place for a prompt'\nprompt_with_special_token = '<|Reward|>'\n")
    with pytest.raises(ValueError, match=r"without \['{text_prompt}'\]"):
        replace(made(), templates=str(source))


def refused(folder: Path, message: str, change: Any) -> None:
    state = load_file(tiny.hpsv3() / "HPSv3.safetensors")
    change(state)
    save_file(state, folder / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=message):
        replace(made(folder)).load()


def test_every_tensor_has_a_place_and_every_place_a_tensor(tmp_path: Path) -> None:
    bias, weight = "visual.merger.mlp.0.bias", "model.layers.1.self_attn.q_proj.weight"
    refused(tmp_path, f"it lacks 1 tensors, the first {bias}", lambda state: state.pop(bias))
    refused(
        tmp_path,
        "it has no place for 1 tensors, the first visual.more",
        lambda state: state.update({"visual.more": torch.ones(1)}),
    )
    refused(tmp_path, "it has in another shape 1 tensors", lambda state: state.update({weight: torch.ones(3, 3)}))
    refused(tmp_path, r"with heads of \{\} numbers; expected \{'rm_head': 2\}",
            lambda state: [state.pop(name) for name in list(state) if name.startswith("rm_head")])  # fmt: skip
    refused(tmp_path, r"with heads of \{'rm_head': 3\}", lambda state: state.update(tiny.ranknet("rm_head", outputs=3)))
    refused(tmp_path, f"embeddings of 5 tokens; expected {tiny.WORDS + 1}",
            lambda state: state.update({"model.embed_tokens.weight": torch.ones(5, 64)}))  # fmt: skip


def test_a_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.base(), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": config["vocab_size"]}))
    with pytest.raises(ValueError, match=r"a 'qwen2'; expected one of \('qwen2_vl', 'qwen2_5_vl'\)"):
        made(base=str(folder)).load()
