"""Peers: the processes whose batches a loss takes for one batch. A process of its own has none."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Peers:
    """What the processes hold in one forward pass. All of them make it, in the same order, and gather the same.

    Means over the processes, which DDP and FSDP2 take of gradients, are then those of one process: each computes its
    part of a mean over everything, a mean over its own times `share`, and `gather` adds up the gradients that the parts
    have by its rows (the local loss of open_clip, whose memory is that of a process's own rows against all).

    Args:
        joined: with all of torch's default process group, which needs a backend for CPUs; False: alone.
        counts: of what this process has, by name.

    Attributes:
        counts: [processes] of each name.
        rank: of this process among them.
    """

    def __init__(self, joined: bool, **counts: int):
        self.counts, self.rank = {name: [count] for name, count in counts.items()}, 0
        if joined:
            own = torch.tensor([*counts.values()], device="cpu")
            every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(every, own)
            self.counts = dict(zip(counts, torch.stack(every, 1).tolist(), strict=True))
            self.rank = dist.get_rank()
        self.alone = len(next(iter(self.counts.values()))) == 1

    def share(self, name: str) -> float:
        """What a mean over this process's own is multiplied by: 1 where all processes have as many."""
        if self.alone:
            return 1.0
        counts = self.counts[name]
        return counts[self.rank] * len(counts) / max(sum(counts), 1)

    def gather(self, name: str, *rows: Tensor) -> tuple[Tensor, ...]:
        """[counts[name] of this process, ...] -> [of all processes, ...] in the order of their ranks, with gradients.

        Args:
            rows: one or more tensors of the same shape and dtype, which are sent together.
        """
        if self.alone:
            return rows
        return _Gather.apply(torch.stack(rows, 1), self.counts[name], self.rank).unbind(1)

    def own(self, columns: Tensor, name: str) -> Tensor:
        """[B, counts[name] of all processes] -> [B, counts[name] of this one]."""
        return columns.split(self.counts[name], 1)[self.rank]


class _Gather(torch.autograd.Function):
    """Rows of each process, as many as `counts` says, -> those of all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        sent = F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, max(counts) - len(rows)))  # gloo sends the same from each
        every = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(every, sent)
        return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.counts)[ctx.rank], None, None
