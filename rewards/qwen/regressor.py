"""Qwen2-VL with regression heads at reward tokens: pictures and a text in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rewards.image.checkpoints import pretrained, quiet
from rewards.image.scorer import at_least_fp32, wide
from rewards.qwen.vision import Eye, Patches
from rewards.qwen.weights import State, head_of, split_heads

Media = Literal["image", "video"]
Positions = Literal["sequential", "mrope"]
Rope = Literal["bf16", "exact"]
KINDS = {"qwen2_vl": "Qwen2VLModel", "qwen2_5_vl": "Qwen2_5_VLModel"}  # model_type -> class of transformers


@dataclass(frozen=True, eq=False)
class Turn:
    """What the user says: pictures (images or videos), then a text with each reward token once."""

    pictures: list[Patches]
    text: str


@dataclass(frozen=True, eq=False)
class Regressor:
    """A loaded network. network: "body" (Qwen2-VL without its language head) and "heads" by name. tokens: the ids of the
    reward tokens. media: what the pictures are. positions: "mrope", or "sequential", which numbers the tokens of a picture
    like words (see `load_regressor`)."""

    network: nn.ModuleDict
    tokenizer: Any
    tokens: tuple[int, ...]
    media: Media
    positions: Positions

    def __call__(self, turns: Sequence[Turn | str], head: str = "rm_head") -> tuple[Tensor, list[str]]:
        """What `head` says at the reward tokens, [n, K, O] in fp32 at least, and per turn why it has no numbers (NaN), or "".

        A text in place of a turn is why it cannot be asked. Turns do not see each other."""
        encoded = [turn if isinstance(turn, str) else self._encode(turn) for turn in turns]
        known = [(row, ids) for row, ids in enumerate(encoded) if not isinstance(ids, str)]
        reasons = [ids if isinstance(ids, str) else "" for ids in encoded]
        layer = cast(Any, self.network["heads"])[head]
        device, dtype = next(layer.parameters()).device, next(layer.parameters()).dtype
        values = torch.full(
            (len(turns), len(self.tokens), layer[-1].out_features), torch.nan, dtype=dtype, device=device
        )
        if known:
            rows = torch.tensor([row for row, _ in known], device=device)
            pictures = [picture for row, _ in known for picture in cast(Turn, turns[row]).pictures]
            hidden = self._at_tokens([ids for _, ids in known], pictures, device)
            values = values.index_copy(0, rows, layer(wide(hidden)))
        return values, reasons

    def _encode(self, turn: Turn) -> list[int] | str:
        """Token ids of the chat: as many placeholders as a picture has tokens. A text: why there are none."""
        pad = self.tokenizer.convert_ids_to_tokens(self._pad)
        content = [*({"type": self.media} for _ in turn.pictures), {"type": "text", "text": turn.text}]
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        parts = chat.split(pad)
        if len(parts) != len(turn.pictures) + 1:
            return f"its text holds {pad}, the placeholder of a picture"
        merged = self._config.vision_config.spatial_merge_size**2
        counts = [len(picture.rows) // merged for picture in turn.pictures]
        text = parts[0] + "".join(pad * count + part for count, part in zip(counts, parts[1:], strict=True))
        ids: list[int] = self.tokenizer(text).input_ids
        for token in self.tokens:
            if ids.count(token) != 1:
                return (
                    f"its text holds {self.tokenizer.convert_ids_to_tokens(token)} {ids.count(token)} times, not once"
                )
        return ids

    def _at_tokens(self, encoded: list[list[int]], pictures: list[Patches], device: torch.device) -> Tensor:
        """The last hidden states [n, K, D] at the reward tokens; shorter texts are padded on the right."""
        body = cast(Any, self.network["body"])
        length = max(map(len, encoded))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in encoded], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded], device=device)
        rows = torch.cat([picture.rows for picture in pictures]).to(device, body.dtype)
        grids = torch.tensor([picture.grid for picture in pictures], device=device)
        grid_name = f"{self.media}_grid_thw"
        if self.positions == "mrope":
            kinds = (ids == self._pad).int() * (1 if self.media == "image" else 2)
            positions, _ = body.get_rope_index(ids, kinds, attention_mask=mask, **{grid_name: grids})
        else:
            positions = torch.arange(length, device=device).expand(len(ids), length)
        pixels = "pixel_values" if self.media == "image" else "pixel_values_videos"
        hidden = body(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            **{pixels: rows, grid_name: grids},
        ).last_hidden_state
        places = torch.stack([(ids == token).int().argmax(1) for token in self.tokens], 1)
        return cast(Tensor, hidden[torch.arange(len(ids), device=device)[:, None], places])

    def eye(self, min_pixels: int, max_pixels: int) -> Eye:
        """With the patches of this network."""
        vision = self._config.vision_config
        return Eye(min_pixels, max_pixels, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    @property
    def _config(self) -> Any:
        return cast(Any, self.network["body"]).config

    @property
    def _pad(self) -> int:
        """The id of the placeholder of a picture."""
        return int(self._config.image_token_id if self.media == "image" else self._config.video_token_id)


def load_regressor(
    state: Mapping[str, Tensor],
    source: str,
    base: str,
    tokens: Sequence[str],
    outputs: Mapping[str, int],
    *,
    media: Media = "image",
    positions: Positions = "sequential",
    rope: Rope = "bf16",
    dtype: torch.dtype = torch.float32,
) -> Regressor:
    """From a state dict with today's names, of the file `source`; every tensor has its place and every place a tensor.

    base: hub id or folder of the model it was trained from, for configuration, tokenizer and chat template; the reward tokens
    are added to the tokenizer, in their order. outputs: the heads and how many numbers each gives. Heads are fp32 at least.

    positions: the public code calls the text model without positions, which are then 0, 1, 2, … for pictures too
    ("sequential"); "mrope" gives patches their time, row and column, and other scores. rope: the public code casts the model
    to bfloat16 with the frequencies of its rotary embeddings, which are then rounded whatever `dtype` is; "exact" keeps
    them. Both were read in that code, not measured with the published weights. Attention is always torch's own (sdpa), so
    that an installed flash-attn changes nothing.

    ValueError for other tensors, a vocabulary of another size and a base of another kind."""
    import transformers

    config = pretrained(transformers.AutoConfig, "base", base)
    words = pretrained(transformers.AutoTokenizer, "base", base)
    if config.model_type not in KINDS:
        raise ValueError(f"got base={base!r}, a {config.model_type!r}; expected one of {tuple(KINDS)}")
    words.add_tokens(list(tokens), special_tokens=True)
    body, heads = split_heads(state)
    layers = nn.ModuleDict({name: head_of(head, f"{name} in {source}") for name, head in heads.items()})
    widths = {name: cast(Any, layer)[-1].out_features for name, layer in layers.items()}
    if widths != dict(outputs):
        raise ValueError(f"got {source} with heads of {widths} numbers; expected {dict(outputs)}")
    network = _body(getattr(transformers, KINDS[config.model_type]), config, body, source, len(words), dtype)
    if rope == "bf16":
        for name, buffer in network.named_buffers():
            if name.endswith("inv_freq"):
                buffer.copy_(buffer.bfloat16())
    parts = nn.ModuleDict({"body": network, "heads": layers.to(at_least_fp32(dtype))})
    ids = tuple(words.convert_tokens_to_ids(list(tokens)))
    return Regressor(parts.eval().requires_grad_(False), words, ids, media, positions)


def _body(kind: Any, config: Any, state: State, source: str, words: int, dtype: torch.dtype) -> Any:
    """The network with exactly the tensors of `state`. Not `.to(dtype)`, which would round its frequencies too."""
    rows = len(state.get("language_model.embed_tokens.weight", ()))
    if rows not in (words, config.text_config.vocab_size) or rows < words:
        raise ValueError(
            f"got {source} with the embeddings of {rows} tokens; expected {words}, those of the base's tokenizer and the reward "
            "tokens: take the base that the checkpoint was trained from"
        )
    config.text_config.vocab_size = rows
    with quiet():
        network, found = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, attn_implementation="sdpa",
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    for what, names in (
        ("lacks", found["missing_keys"]),
        ("has no place for", found["unexpected_keys"]),
        ("has in another shape", found["mismatched_keys"]),
    ):
        if names:
            raise ValueError(
                f"got {source}, which is not a {kind.__name__} of this base: it {what} {len(names)} tensors, the first "
                f"{sorted(map(str, names))[0]}; expected all of them: else they would be random"
            )
    return network
