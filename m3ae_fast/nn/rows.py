"""Some rows of a packed batch."""

import torch
from torch import Tensor

from m3ae_fast.ops import assemble_tokens, restore_tokens


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, D], rows [R] distinct row numbers -> [R, D]; the gradient is written in one pass, not scattered."""
    return restore_tokens(x, rows, torch.full_like(rows, -1))


def repeat_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, D], rows [R] row numbers, any of them any number of times -> [R, D]; gradients are summed in a fixed
    order."""
    cu = torch.arange(0, 2 * len(rows) + 1, max(len(rows), 1), dtype=torch.int32, device=rows.device)[:2]
    return assemble_tokens(None, rows, text_embedding=x, cu_text=cu)
