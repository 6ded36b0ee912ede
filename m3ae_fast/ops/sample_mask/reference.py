"""sample_mask, the definition: integer arithmetic in plain PyTorch, any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def sample_mask(
    cu: Tensor, cu_keep: Tensor, sample_ids: Tensor, total: int, total_keep: int, seed: int, step: int, stream: int
) -> tuple[Tensor, Tensor]:
    """Keep each sample's positions with the smallest (word, position); the word of a position is

    philox4x32(counter=(position >> 2, id, stream | (id >> 32) << 8, step), key=(seed, seed >> 32))[position & 3]
    """
    flat = torch.arange(total, device=cu.device)
    sample = torch.bucketize(flat, cu[1:], right=True)
    position = flat - cu[sample]
    ids = sample_ids[sample]
    zero = torch.zeros_like(flat)
    counter = (position >> 2, ids & WORD, stream | (ids >> 32) << 8, step + zero)
    words = philox4x32(counter, (seed & WORD, seed >> 32 & WORD))
    word = torch.stack(words).gather(0, (position & 3)[None])[0]
    order = torch.argsort(sample << 32 | word, stable=True)  # by sample, then word, then position
    rank = torch.empty_like(flat).scatter_(0, order, flat) - cu[sample]
    keep = rank < (cu_keep[1:] - cu_keep[:-1])[sample]
    order = torch.argsort(keep.logical_not(), stable=True)
    position = position[order].to(torch.int32)
    return position[:total_keep].clone(), position[total_keep:].clone()


def philox4x32(counter: Sequence[Tensor], key: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of Salmon et al. (SC11): int64 tensors that hold 32-bit words, in and out."""
    x, y, z, w = counter
    key0, key1 = key
    for _ in range(10):
        high_a, low_a = _multiply(x, 0xD2511F53)
        high_b, low_b = _multiply(z, 0xCD9E8D57)
        x, y, z, w = high_b ^ y ^ key0, low_b, high_a ^ w ^ key1, low_a
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return x, y, z, w


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product, in two halves of b: the whole would not fit into a signed int64."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & WORD
