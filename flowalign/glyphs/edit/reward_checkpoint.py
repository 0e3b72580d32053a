"""The files of a small EditReward of Glyphs: a Qwen2.5-VL of 64 channels with two heads, laid out as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from flowalign.glyphs.edit.reward_pairs import all_edits
from flowalign.glyphs.renderer import HEIGHT, WIDTH
from rewards import EditReward
from rewards.qwen.edit_reward import HEADS
from rewards.qwen.regressor import Regressor

TEMPLATES = {  # our own; short, since every token is computed for each picture
    "instruction_following": "{text_prompt} done?",
    "quality": "{text_prompt} clean?",
    "suffix": " <|Reward|>",
}
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# tokens before the special ones: 256 bytes, and merges, so that a word of a prompt is one token
VOCABULARY = 320
HIDDEN, PATCH = 64, 6  # a token is 12 x 12 pixels: 8 of a picture, which is not resized
SPREAD = 0.1  # of the first weights: 0.02, the published one, is made for wider networks


def write_base(folder: Path) -> None:
    """config.json (flat, as published), tokenizer with chat template, and in `templates` the three texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    texts = folder / "templates"
    texts.mkdir(parents=True, exist_ok=True)
    for name, text in TEMPLATES.items():
        (texts / f"{name}.txt").write_text(text)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        ["user\nassistant\n, noisy, blurred, clean", *TEMPLATES.values(), *(edit.instruction for edit in all_edits())],
        trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_config(tokenizer), indent=1))


def _config(tokenizer: Any) -> dict[str, Any]:
    """config.json of Qwen/Qwen2.5-VL-7B-Instruct, small."""
    vision = {
        "depth": 1, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_heads": 4, "out_hidden_size": HIDDEN,
        "in_chans": 3, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2,
        "window_size": 112, "fullatt_block_indexes": [0], "initializer_range": SPREAD,
    }  # fmt: skip
    names = {
        "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>", "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    }  # fmt: skip
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "vocab_size": len(tokenizer) + 1,
        "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "hidden_act": "silu", "use_sliding_window": False,
        "max_window_layers": 3, "tie_word_embeddings": True, "dtype": "float32", "initializer_range": SPREAD,
        "vision_config": vision, **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()},
    }  # fmt: skip


def write_untrained(folder: Path, seed: int = 0) -> None:
    """model.safetensors of random weights: a body for the configuration in `folder`, and two heads."""
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = transformers.Qwen2_5_VLModel(settings).float()
        heads = {
            name: nn.Sequential(nn.Linear(HIDDEN, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2))
            for name in HEADS
        }
    _write(body, nn.ModuleDict(heads), folder)


def write_trained(regressor: Regressor, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """model.safetensors of a network that was loaded from `folder` and trained."""
    _write(regressor.network["body"], regressor.network["heads"], folder, dtype)


def _write(body: nn.Module, heads: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """With the names of the published checkpoint: `model.*`, and heads that count the dropout after their first ReLU."""
    numbers = {"0": "0", "2": "3", "4": "5"}  # of a layer here -> there
    state = {f"model.{name}": tensor for name, tensor in body.state_dict().items()}
    for name, tensor in heads.state_dict().items():
        head, number, part = name.split(".")
        state[f"rm_heads.{head}.{numbers[number]}.{part}"] = tensor
    save_file({name: tensor.contiguous().to(dtype) for name, tensor in state.items()}, folder / "model.safetensors")


def load_folder(folder: Path) -> EditReward:
    """The reward of a folder that was written here; it is loaded with its first use."""
    return EditReward(
        str(folder), str(folder), str(folder / "templates"), pixels=HEIGHT * WIDTH, dtype="fp32", batch_size=32
    )


def network_of(reward: EditReward) -> Regressor:
    reward.load()
    return cast(Regressor, reward.regressor)
