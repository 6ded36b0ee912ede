"""Grouping by id: what gradients of tables are summed by."""

import torch
from torch import Tensor


def group(ids: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(order, starts): id g is at order[starts[g] : starts[g + 1]] in `ids`, ascending, for each g below `groups`.

    Other ids are in no group.
    """
    ids, order = torch.sort(ids, stable=True)
    starts = torch.searchsorted(ids, torch.arange(groups + 1, dtype=ids.dtype, device=ids.device), out_int32=True)
    return order, starts
