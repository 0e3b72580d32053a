"""A reward on Qwen2-VL with the processor and the network of transformers, written out."""

from typing import Any

import torch
import transformers
from torch import Tensor

from rewards.qwen.weights import split_heads
from tests.helpers import tiny_qwen as tiny


def by_hand(
    state: dict[str, Tensor],
    kind: str,
    tokens: list[str],
    positions: str,
    pictures: list[Any],
    texts: list[str],
    media: str,
) -> Tensor:
    """The last hidden states [n, K, 64] at the tokens, for `pictures` in [0, 1], per text a list of one or two, at tiny.PIXELS."""
    words = transformers.AutoTokenizer.from_pretrained(tiny.base(kind))
    words.add_tokens(tokens, special_tokens=True)
    size = {"shortest_edge": tiny.PIXELS, "longest_edge": tiny.PIXELS}
    images = transformers.Qwen2VLImageProcessor(size=size)
    videos = transformers.Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    maker = {"qwen2_vl": transformers.Qwen2VLProcessor, "qwen2_5_vl": transformers.Qwen2_5_VLProcessor}[kind]
    processor = maker(images, words, videos, chat_template=tiny.CHAT)
    chats = [
        [{"role": "user", "content": [{"type": media}] * len(seen) + [{"type": "text", "text": text}]}]
        for seen, text in zip(pictures, texts, strict=True)
    ]
    asked = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    flat = {f"{media}s": [one for seen in pictures for one in seen]}
    inputs = processor(text=asked, **flat, padding=True, padding_side="right", do_rescale=False, return_tensors="pt")
    network = _network(split_heads(state)[0], kind)
    if positions == "sequential":
        inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(len(texts), -1)
    with torch.no_grad():
        hidden = network(**inputs).last_hidden_state
    ids = words.convert_tokens_to_ids(tokens)
    rows = [hidden[row][torch.isin(inputs["input_ids"][row], torch.tensor(ids))] for row in range(len(texts))]
    return torch.stack(rows)


def _network(state: dict[str, Tensor], kind: str) -> Any:
    config = transformers.AutoConfig.from_pretrained(tiny.base(kind))
    config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
    maker = {"qwen2_vl": transformers.Qwen2VLModel, "qwen2_5_vl": transformers.Qwen2_5_VLModel}[kind]
    network = maker(config).float()
    network.load_state_dict(state)
    return network.eval()
