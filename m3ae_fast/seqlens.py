"""SeqLens: the lengths of packed sequences, on the host and as cumulative offsets on the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from operator import index

import torch
from torch import Tensor

from m3ae_fast import _checks, _pytree


class SeqLens:
    """Lengths of B packed sequences, kept on the host and on the device, so that reading them never synchronizes.

    Args:
        lengths: B non-negative integers: an iterable, or an integer tensor [B] (one on a GPU is copied: a sync).
        device: where `.cu` lives; default CPU.

    Attributes:
        cu: [B + 1] int32 on the device, cumulative offsets, cu[0] = 0.
        lengths: tuple of B ints, on the host.
        max: the longest length, 0 for an empty batch; larger where `at` was given a larger one.
        total: the sum of the lengths.

    Raises:
        ValueError: a negative length, or a total past int32. TypeError: not integers.
    """

    __slots__ = ("cu", "lengths", "max", "total")

    def __init__(self, lengths: Iterable[int] | Tensor, device: torch.device | str | None = None):
        if isinstance(lengths, Tensor):
            _checks.shape("lengths", lengths, (None,))
            _checks.dtype("lengths", lengths, (torch.int64, torch.int32, torch.int16, torch.uint8))
            lengths = _checks.numbers("lengths", lengths)
        if not isinstance(lengths, Iterable):
            raise TypeError(f"lengths must be integers, one a sequence, got {type(lengths).__name__}")
        lengths = tuple(lengths)
        if not all(type(n) is int and n >= 0 for n in lengths):
            lengths = tuple(n if isinstance(n, bool) or not hasattr(n, "__index__") else index(n) for n in lengths)
            for length in lengths:
                _checks.integer("lengths", length, 0)
        self.lengths = lengths
        self.max = max(self.lengths, default=0)
        self.total = sum(self.lengths)
        if self.total >= 2**31:
            raise ValueError(f"lengths must sum to less than 2**31 rows, got {self.total}")
        offsets = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device="cpu")
        self.cu = offsets if device is None else offsets.to(device, non_blocking=True)

    def __len__(self) -> int:
        return len(self.lengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SeqLens) and self.lengths == other.lengths and self.cu.device == other.cu.device

    def __hash__(self) -> int:
        return hash((self.lengths, self.cu.device))

    def __repr__(self) -> str:
        return f"SeqLens({list(self.lengths)}, device={str(self.cu.device)!r})"

    @property
    def device(self) -> torch.device:
        return self.cu.device

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> SeqLens:
        """The same lengths with `.cu` on `device`; host values are kept, so nothing syncs."""
        return self.at(self.cu.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SeqLens:
        """The same lengths with `.cu` in page-locked memory, from which a GPU reads while the host continues."""
        return self.at(self.cu.pin_memory())

    def at(self, cu: Tensor, max: int | None = None) -> SeqLens:
        """The same lengths with `.cu` in other memory, which holds the same offsets, or will before it is read.

        Args:
            cu: [B + 1] int32.
            max: at least the longest length, for kernels that are to expect longer ones; None: as it is.
        """
        moved = object.__new__(SeqLens)
        moved.lengths, moved.total, moved.cu = self.lengths, self.total, cu
        moved.max = self.max if max is None else max
        return moved


_pytree.register(SeqLens, ("cu",), ("lengths", "max", "total"))


def cu_seqlens(name: str, value: SeqLens | Tensor) -> Tensor:
    """The cumulative offsets of a SeqLens or of a bare `cu_seqlens` tensor [B + 1] (int32 or int64), as int32."""
    if isinstance(value, SeqLens):
        return value.cu
    cu = _checks.ids(name, _checks.tensor(name, value))
    if cu.numel() < 1:
        raise ValueError(f"{name} must have at least one entry (B + 1 cumulative offsets), got none")
    return cu


def longest(cu: Tensor, known: int | None) -> int:
    """The longest length: what the caller said, else what the offsets say, which only the CPU may look at."""
    if known is None:
        known = int((cu[1:] - cu[:-1]).max()) if cu.shape[0] > 1 else 0
    return known
