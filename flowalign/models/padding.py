"""Rows of text embeddings of different length: padded where they are kept, without needless padding where they are used."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def padded(embeds: Tensor, length: int) -> Tensor:
    """[n, length, C] of embeddings [n, l, C], l <= length: zeros behind."""
    return pad(embeds, (0, 0, 0, length - embeds.shape[1]))


def unpadded(embeds: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
    """(embeddings [n, l, C] up to the longest row, mask [n, l]: true where a row has a token) of padded rows [n, L, C]. The mask is
    None where all are equally long, as the pipelines leave it out. lengths [n]: tokens of each row.

    Waits for the device once, since the shape of what follows depends on the lengths. On the meta device, where there are none, rows
    are as long as they can be."""
    if lengths.is_meta:
        return embeds, None
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    return (embeds[:, :longest], None) if shortest == longest else masked(embeds[:, :longest], lengths)


def masked(embeds: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(embeddings as they are, the mask) of padded rows; see `unpadded`."""
    return embeds, torch.arange(embeds.shape[1], device=lengths.device) < lengths[:, None]
