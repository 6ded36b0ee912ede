"""restore_tokens against the chain it replaces: cat mask tokens, gather by ids_restore, add positions and types."""

import measure
import pytest
import torch

from m3ae_fast import restore_tokens
from m3ae_fast.ops.restore_tokens import cases


def eager(kept, rows, slots, *, image_mask_token, image_position, image_type, text_mask_token=None, text_position=None,
          text_type=None):  # fmt: skip
    """As users write it: [kept; mask tokens] gathered into place, then positions gathered and added, then types."""
    holes = int((rows < 0).sum())
    patches = image_position.shape[0]
    is_text = (slots >= patches)[:, None]
    mask = image_mask_token.expand(holes, -1)
    if text_mask_token is not None:
        mask = torch.where(is_text[rows < 0], text_mask_token, mask)
    restore = torch.where(rows >= 0, rows, kept.shape[0] + (rows < 0).cumsum(0) - 1)
    x = torch.gather(torch.cat([kept, mask]), 0, restore[:, None].expand(-1, kept.shape[1]).long())
    tables = image_position if text_position is None else torch.cat([image_position, text_position])
    place = tables[slots.clamp(min=0)]
    type_ = image_type if text_type is None else torch.where(is_text, text_type, image_type)
    return x + torch.where(slots[:, None] >= 0, place + type_, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", cases.REAL)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def bench_restore_tokens(benchmark, case, mode, dtype):
    calls = measure.copies(lambda: cases.make(case, dtype), 8 << 20)
    first = calls[0]
    ours, theirs = (f(*first.args, **first.kwargs) for f in (restore_tokens, eager))
    torch.testing.assert_close(ours, theirs, rtol=3 * torch.finfo(dtype).eps, atol=6 * torch.finfo(dtype).eps)
    once = (ours.numel() + first.args[0].numel()) * dtype.itemsize  # read the kept rows, write the output
    providers = {"m3ae_fast": restore_tokens, "eager": eager}
    measure.compare_op(benchmark, "restore_tokens", f"{case} {str(dtype)[6:]}", calls, mode, providers, once)
