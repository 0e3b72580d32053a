"""ImageReward (2304.05977): BLIP trained on rankings by experts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from torch import Tensor, nn

from rewards.base import RewardSpec
from rewards.image.blip import read_network
from rewards.image.checkpoints import check_place, find_file, pretrained, read_state
from rewards.image.preprocess import Mode, Preprocess
from rewards.image.scorer import (
    DTYPES,
    Dtype,
    Scorer,
    at_least_fp32,
    call_scorer,
    check_settings,
    close_scorer,
    frozen,
    load_scorer,
    offload_scorer,
    wide,
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output over the training set; THUDM/ImageReward
TOKENS = 35  # of a prompt, with start and end: what is longer was cut in training


@dataclass(eq=False)
class ImageReward:
    """How good is this image for this prompt? r = (head(h) - 0.167) / 1.033, h: the first token of BLIP's text encoder.

    About -2.3 to 2. The text encoder looks at the image in every layer, so image and prompt are judged together, not as two
    vectors. Prompts are cut to 35 tokens. Code: THUDM/ImageReward; here on transformers' BLIP, with the published file.

    model: hub id or folder with ImageReward.pt and med_config.json. tokenizer: hub id or folder of bert-base-uncased (its
    vocab.txt), which the checkpoint does not bring. preprocess to batch_size: see rewards.image.scorer.Settings.
    FileNotFoundError and ValueError, when it is loaded, say what to get.
    """

    model: str = "THUDM/ImageReward"
    tokenizer: str = "bert-base-uncased"
    preprocess: Mode = "tensor"
    quantize: bool = False
    dtype: Dtype = "fp32"
    device: str | None = None
    batch_size: int = 32
    name: str = "image_reward"
    scorer: Scorer | None = field(default=None, init=False, repr=False)

    __call__, load, close, offload = call_scorer, load_scorer, close_scorer, offload_scorer

    def __post_init__(self) -> None:
        check_settings(self)
        check_place("model", self.model)
        check_place("tokenizer", self.tokenizer)

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(
            differentiable=self.preprocess == "tensor",
            licence="code Apache-2.0; weights: see the card of the checkpoint",
            checkpoint=self.model,
            memory="S",
        )

    def build(self) -> Scorer:
        from transformers import BertTokenizer

        path = find_file("model", self.model, "ImageReward.pt")
        config = json.loads(find_file("model", self.model, "med_config.json").read_text(encoding="utf-8"))
        tokenizer = pretrained(BertTokenizer, "tokenizer", self.tokenizer)
        tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
        if len(tokenizer) != config.get("vocab_size"):
            raise ValueError(
                f"got tokenizer={self.tokenizer!r} with {len(tokenizer)} tokens, [DEC] and [ENC] among them; expected "
                f"{config.get('vocab_size')}, those of the checkpoint: take bert-base-uncased"
            )
        tower, encoder, head = read_network(read_state(path), config, path)
        dtype = DTYPES[self.dtype]
        network = nn.ModuleList(
            [frozen(tower, dtype), frozen(encoder, dtype), frozen(head, at_least_fp32(dtype))]
        ).eval()

        def score(pixels: Tensor, prompts: list[str]) -> Tensor:
            tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            hidden = encoder(
                input_ids=tokens.input_ids.to(pixels.device),
                attention_mask=tokens.attention_mask.to(pixels.device),
                encoder_hidden_states=tower(pixel_values=pixels).last_hidden_state,
            ).last_hidden_state
            return (head(wide(hidden[:, 0]))[:, 0] - MEAN) / STD

        return Scorer(network, Preprocess(tower.config.image_size), score)
