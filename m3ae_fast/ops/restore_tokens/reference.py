"""restore_tokens, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def restore_tokens(
    kept: Tensor,
    rows: Tensor,
    slots: Tensor,
    image_mask_token: Tensor | None,
    text_mask_token: Tensor | None,
    image_position: Tensor | None,
    text_position: Tensor | None,
    image_type: Tensor | None,
    text_type: Tensor | None,
) -> Tensor:
    """out[t] = (kept[rows[t]] if rows[t] >= 0 else mask_token) + (position[slots[t]] + type), summed in fp32."""
    out_dtype = kept.dtype
    for each in (image_mask_token, text_mask_token, image_position, text_position, image_type, text_type):
        if each is not None:
            out_dtype = torch.promote_types(out_dtype, each.dtype)
    accumulate = torch.float64 if out_dtype == torch.float64 else torch.float32
    width = kept.shape[1]
    zero = kept.new_zeros(1, width, dtype=accumulate)

    def vector(token: Tensor | None) -> Tensor:
        return zero if token is None else token.to(accumulate)[None]

    def table(position: Tensor | None, type_: Tensor | None) -> Tensor:
        empty = kept.new_zeros(0, width, dtype=accumulate)
        return empty if position is None else position.to(accumulate) + vector(type_)

    sources = torch.cat([kept.to(accumulate), vector(image_mask_token), vector(text_mask_token), zero])
    places = torch.cat([table(image_position, image_type), table(text_position, text_type), zero])
    patches = 0 if image_position is None else image_position.shape[0]
    masked = kept.shape[0] + torch.where(slots < 0, 2, torch.where(slots < patches, 0, 1))
    source = sources.index_select(0, torch.where(rows < 0, masked, rows))
    place = places.index_select(0, torch.where(slots < 0, places.shape[0] - 1, slots))
    return (source + place).to(out_dtype)
