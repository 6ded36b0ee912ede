"""assemble_tokens, the definition: plain PyTorch, any device, any float dtype; its autograd is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def assemble_tokens(
    image_tokens: Tensor,
    text_tokens: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    cu_image: Tensor | None,
    cu_text: Tensor | None,
    cls_token: Tensor | None,
    text_embedding: Tensor | None,
    image_position: Tensor | None,
    text_position: Tensor | None,
    image_type: Tensor | None,
    text_type: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Per sample [cls; image rows; text rows], each source + (position + type), summed in fp32, rounded to dtype."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    known = cu_text if cu_image is None else cu_image
    cu_image, cu_text = (torch.zeros_like(known) if cu is None else cu for cu in (cu_image, cu_text))
    batch, device = known.shape[0] - 1, known.device
    has_cls = 0 if cls_token is None else 1
    width = image_tokens.shape[1]
    zero = torch.zeros(1, width, dtype=accumulate, device=device)

    # Which sample, which of its rows, which modality: for every output row t.
    total = batch * has_cls + image_tokens.shape[0] + text_tokens.shape[0]
    starts = cu_image + cu_text + has_cls * torch.arange(batch + 1, device=device)
    t = torch.arange(total, device=device)
    sample = torch.searchsorted(starts[1:].contiguous(), t, right=True)  # batch: past the last one
    offset = t - starts[sample] - has_cls
    images = F.pad(cu_image.diff(), (0, 1))[sample]
    inside = sample < batch
    is_image, is_text = inside & (offset >= 0) & (offset < images), inside & (offset >= images)

    def look_up(table: Tensor | None, ids: Tensor) -> Tensor:
        return zero if table is None else F.embedding(ids, table).to(accumulate)

    def part(tokens, embedding, ids, position, type_, first, chosen):
        """The rows of one modality where `chosen`, zeros elsewhere: (source, position + type)."""
        row = torch.where(chosen, first, tokens.shape[0])  # one past the end: a row of zeros
        if embedding is None:
            source = torch.cat([tokens.to(accumulate), zero]).index_select(0, row)
        else:
            source = look_up(embedding, F.pad(tokens, (0, 1))[row])
        place = look_up(position, row if ids is None else F.pad(ids, (0, 1))[row])
        return source, place + (zero if type_ is None else type_.to(accumulate))

    image, image_place = part(image_tokens, None, image_ids, image_position, image_type, cu_image[sample] + offset,
                              is_image)  # fmt: skip
    text, text_place = part(text_tokens, text_embedding, text_ids, text_position, text_type,
                            cu_text[sample] + offset - images, is_text)  # fmt: skip
    cls = zero if cls_token is None else cls_token.to(accumulate)
    is_cls, is_image, is_text = (inside & (offset < 0))[:, None], is_image[:, None], is_text[:, None]
    source = torch.where(is_image, image, torch.where(is_text, text, torch.where(is_cls, cls, zero)))
    place = torch.where(is_image, image_place, torch.where(is_text, text_place, zero))
    return (source + place).to(dtype)
