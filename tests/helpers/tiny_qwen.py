"""Very small checkpoints of rewards on Qwen2-VL and Qwen2.5-VL, with the names and layouts of the published ones."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from tests.helpers.tiny_rewards import folder, layer, shaken

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
WORDS = 256 + len(SPECIAL)  # of the base's tokenizer
ROWS = 272  # of the base's embeddings, which are more, as the published ones
PIXELS = 4 * 28 * 28
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEXTS = {
    "instruction": "Rate for {text_prompt}.\n",
    "suffix": "Rating: <|Reward|>\nEND\n",
    "instruction_following": "Done as asked? {text_prompt}\n",
    "quality": "Is the edit clean? {text_prompt}\n",
    "template": "V <|VQ_reward|>\nM <|MQ_reward|>\nT {text_prompt} <|TA_reward|>\n",
}
LORA = {"lora_r": 4, "lora_alpha": 8, "use_rslora": False}
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")  # of self_attn, of mlp


@cache
def texts() -> Path:
    """A folder with a text file per template, none of them canonical."""
    for name, text in TEXTS.items():
        (folder("qwen-texts") / f"{name}.txt").write_text(text)
    return folder("qwen-texts")


@cache
def base(kind: str = "qwen2_vl") -> Path:
    """Configuration (flat, as published), tokenizer with a chat template, and weights in two files with names before 4.52."""
    from transformers import Qwen2Tokenizer

    path = folder(f"base-{kind}")
    letters = sorted(ByteLevel.alphabet())
    words = Qwen2Tokenizer(vocab={letter: number for number, letter in enumerate(letters)}, merges=[])
    words.add_tokens(list(SPECIAL), special_tokens=True)
    words.chat_template = CHAT
    words.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(config(kind, words)))
    names = old(body(kind, ROWS, seed=0))
    half = sorted(names)[::2]
    save_file({name: names[name] for name in half}, path / "model-00001-of-00002.safetensors")
    save_file({name: names[name] for name in names if name not in half}, path / "model-00002-of-00002.safetensors")
    return path


def config(kind: str, words: Any) -> dict[str, Any]:
    """config.json of Qwen/Qwen2-VL-2B-Instruct or of Qwen/Qwen2.5-VL-7B-Instruct, small."""
    vision: dict[str, Any] = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 4, "hidden_size": 64, "in_chans": 3, "spatial_patch_size": 14}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 112}
        vision |= {"fullatt_block_indexes": [1], "tokens_per_second": 2, "in_chans": 3}
    ids = {
        name: words.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end", "image_pad", "video_pad")
    }
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": kind, "vocab_size": ROWS, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": True, "vision_config": vision,
        "vision_start_token_id": ids["vision_start"], "vision_end_token_id": ids["vision_end"],
        "image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"],
        "bos_token_id": words.convert_tokens_to_ids("<|endoftext|>"), "eos_token_id": words.convert_tokens_to_ids("<|im_end|>"),
    }  # fmt: skip


@cache
def body(kind: str, rows: int, seed: int) -> dict[str, Tensor]:
    """Random tensors with today's names, `visual.*` and `language_model.*`, of a base whose config.json is written."""
    import transformers
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(folder(f"base-{kind}"), dtype=torch.float32)
    settings.text_config.vocab_size = rows
    torch.manual_seed(seed)
    network = {"qwen2_vl": transformers.Qwen2VLModel, "qwen2_5_vl": transformers.Qwen2_5_VLModel}[kind](settings)
    return {name: tensor.clone() for name, tensor in shaken(network.float()).state_dict().items()}


def old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names before transformers 4.52."""
    return {name.replace("language_model.", "model."): tensor for name, tensor in state.items()}


def new(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names of a whole model since then."""
    body_names = ("visual.", "language_model.")
    return {f"model.{name}" if name.startswith(body_names) else name: tensor for name, tensor in state.items()}


def ranknet(name: str, outputs: int = 2, width: int = 64) -> dict[str, Tensor]:
    """A head of three layers."""
    return layer(f"{name}.0", 24, width) | layer(f"{name}.3", 16, 24) | layer(f"{name}.5", outputs, 16)


@cache
def hpsv3(layout: str = "old") -> Path:
    """The folder of HPSv3.safetensors: "old" or "new" names, the same numbers."""
    base()
    state, path = body("qwen2_vl", WORDS + 1, seed=1), folder(f"hpsv3-{layout}")
    torch.manual_seed(1)
    state = state | {"lm_head.weight": torch.zeros(WORDS + 1, 64)} | ranknet("rm_head")
    save_file({"old": old, "new": new}[layout](state), path / "HPSv3.safetensors")
    return path


@cache
def edit_reward(file: str = "model.safetensors") -> Path:
    """The folder of that file of a Qwen2.5-VL with two heads."""
    base("qwen2_5_vl")
    weights, path = body("qwen2_5_vl", WORDS + 1, seed=2), folder(f"edit_reward-{file}")
    torch.manual_seed(2)
    state = new(weights | ranknet("rm_heads.head_0") | ranknet("rm_heads.head_1"))
    save_file(state, path / file) if file.endswith(".safetensors") else torch.save({"model": state}, path / file)
    return path


@cache
def video_reward(layout: str = "whole") -> Path:
    """model_config.json and checkpoint-20 (and an older one that is broken) with the same numbers: "whole" is model.pth of a PEFT
    model, "lora" the adapter and the rest beside the base."""
    base()
    path, state = folder(f"video_reward-{layout}"), old(body("qwen2_vl", ROWS, seed=0))
    (path / "model_config.json").write_text(json.dumps({"peft_lora_config": LORA}))
    for step in ("checkpoint-9", "checkpoint-20"):
        (path / step).mkdir(exist_ok=True)
    (path / "checkpoint-9" / "model.pth").write_text("broken")
    torch.manual_seed(3)
    rest = {
        "rm_head.weight": torch.randn(1, 64) / 8,
        "model.embed_tokens.weight": state["model.embed_tokens.weight"][: WORDS + 3],
    }
    adapter = {}
    for number in range(2):
        for block, names in zip(("self_attn", "mlp"), PLACES, strict=True):
            for name in names:
                place = f"model.layers.{number}.{block}.{name}"
                out, inputs = state[f"{place}.weight"].shape
                adapter[f"{place}.lora_A.weight"] = torch.randn(LORA["lora_r"], inputs) / inputs**0.5
                adapter[f"{place}.lora_B.weight"] = torch.randn(out, LORA["lora_r"]) / 4
    if layout == "lora":
        save_file(peft(adapter), path / "checkpoint-20" / "adapter_model.safetensors")
        torch.save(peft(rest), path / "checkpoint-20" / "non_lora_state_dict.pth")
        return path
    changed = {name.partition(".lora_")[0] for name in adapter}
    whole = {}
    for name, tensor in {**state, **rest, "lm_head.weight": rest["model.embed_tokens.weight"]}.items():
        place, _, kind = name.rpartition(".")
        whole[f"{place}.base_layer.{kind}" if place in changed else name] = tensor
    whole |= {name.replace(".weight", ".default.weight"): tensor for name, tensor in adapter.items()}
    torch.save(peft(whole), path / "checkpoint-20" / "model.pth")
    return path


ARGUMENTS: dict[str, Callable[[], dict[str, object]]] = {  # of each reward, by the name of its class
    "HPSv3": lambda: {"model": str(hpsv3()), "base": str(base()), "pixels": PIXELS, **shared()},
    "EditReward": lambda: {"model": str(edit_reward()), "base": str(base("qwen2_5_vl")), "pixels": PIXELS, **shared()},
    "VideoAlign": lambda: {
        "model": str(video_reward()), "base": str(base()), "min_pixels": PIXELS, "max_pixels": PIXELS,
        **shared(), "templates": str(texts() / "template.txt"),
    },
}  # fmt: skip


def shared() -> dict[str, object]:
    return {"templates": str(texts()), "dtype": "fp32"}


def peft(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names in a PEFT model."""
    return {f"base_model.model.{name}": tensor for name, tensor in state.items()}
