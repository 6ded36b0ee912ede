"""sample_mask: which positions of each sample are kept and which are masked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3ae_fast import _backends, _checks
from m3ae_fast._backends import Impl
from m3ae_fast.ops.sample_mask import reference
from m3ae_fast.seqlens import SeqLens

BACKENDS = _backends.load(__package__, "cpp", "triton", "cuda")


class SampledMask(NamedTuple):
    """Positions within their sample, ascending within a sample, packed sample after sample; int32.

    Attributes:
        ids_keep: [sum of num_keep]. ids_mask: [sum of lengths - num_keep].
    """

    ids_keep: Tensor
    ids_mask: Tensor


def sample_mask(
    lengths: SeqLens | Iterable[int] | Tensor,
    num_keep: SeqLens | Iterable[int] | Tensor | int,
    *,
    seed: int,
    step: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    stream: int = 0,
    shared: bool = False,
    device: torch.device | str | None = None,
    impl: Impl | None = None,
) -> SampledMask:
    """Draw a random mask for every sample of a batch.

    A sample keeps the `num_keep` positions with the smallest random words, ties by position. Words come from
    Philox4x32-10 keyed by (seed, step, sample id, stream, position) and nothing else: the same bits on every device and
    backend, for any thread count, and however samples are grouped into batches or ranks.

    Args:
        lengths: B lengths: SeqLens, ints or an integer tensor [B] (one on a GPU is copied to the host: a sync).
        num_keep: how many to keep of each, 0 <= num_keep <= length: as `lengths`, or one int for all.
        seed: in [0, 2**64). step: the training step, in [0, 2**32).
        sample_ids: [B] the samples' numbers in the whole data set, ints or an integer tensor, in [0, 2**56). None:
            0 .. B-1.
        stream: in [0, 256): another mask of the same sample and step, of its text for example.
        shared: one draw for the batch, that of sample id 0 (all lengths and all num_keep must be equal), as the public
            code of arXiv:2205.14204 does.
        device: where the result lives; None: where the SeqLens does, else the CPU.
        impl: "reference", "cpp", "triton", "cuda"; None selects the preferred one for the device.

    Returns:
        SampledMask(ids_keep, ids_mask).

    Raises:
        ValueError: a number outside its range, sizes that disagree, unequal lengths with shared=True. (sample_ids in a
            GPU tensor are not looked at: it would sync.) TypeError: not integers.

    Under torch.compile give SeqLens. Python specializes on the ints 0 and 1, so steps 0 and 1 compile for themselves.

    Source: random masking without replacement, arXiv:2111.06377, section 3; Philox: Salmon et al., SC11.
    """
    _checks.integer("seed", seed, 0, 2**64)
    _checks.integer("step", step, 0, 2**32)
    _checks.integer("stream", stream, 0, 2**8)
    if not isinstance(lengths, SeqLens):
        lengths = SeqLens(lengths)
    device = lengths.cu.device if device is None else torch.device(device)
    cu = lengths.cu.to(device)
    batch = cu.shape[0] - 1
    if isinstance(num_keep, (int, torch.SymInt)):
        _checks.integer("num_keep", num_keep, 0, 2**31)
        total_keep = num_keep * batch
        cu_keep = torch.arange(batch + 1, dtype=torch.int32, device=device) * num_keep
    else:
        if not isinstance(num_keep, SeqLens):
            num_keep = SeqLens(num_keep)
        total_keep, cu_keep = num_keep.total, num_keep.cu.to(device)
    if cu_keep.shape[0] != cu.shape[0]:
        raise ValueError(f"num_keep must have {batch} entries, as lengths has, got {cu_keep.shape[0] - 1}")
    if shared and sample_ids is not None:
        raise ValueError("sample_ids must be None with shared=True: the batch has one draw, that of sample id 0")
    if shared:
        ids = torch.zeros(batch, dtype=torch.int64, device=device)
    elif sample_ids is None:
        ids = torch.arange(batch, device=device)
    else:
        ids = _sample_ids(sample_ids, batch)

    impl = _backends.pick(BACKENDS, impl, cu)
    if impl != "cpp" and not torch.compiler.is_compiling():  # the C++ backend looks for itself
        _check_on_host(lengths, num_keep, ids, shared)
    ids = ids.to(device)
    if impl == "reference":
        return SampledMask(*reference.sample_mask(cu, cu_keep, ids, lengths.total, total_keep, seed, step, stream))
    signed = seed - 2**64 if seed >= 2**63 else seed  # an operator's integers are int64
    return SampledMask(
        *_sample_mask(impl, cu, cu_keep, ids, lengths.total, total_keep, lengths.max, signed, step, stream, shared)
    )


def _sample_ids(sample_ids: Sequence[int] | Tensor, batch: int) -> Tensor:
    """[B] int64, where they are."""
    if not isinstance(sample_ids, Tensor):
        sample_ids = list(sample_ids)
        for each in sample_ids:
            _checks.integer("sample_ids", each, 0, 2**56)
        sample_ids = torch.tensor(sample_ids, dtype=torch.int64, device="cpu")
    _checks.shape("sample_ids", sample_ids, (batch,))
    _checks.dtype("sample_ids", sample_ids, _checks.INTEGERS)
    return sample_ids.to(torch.int64).contiguous()


def _check_on_host(lengths: SeqLens, num_keep: SeqLens | int, sample_ids: Tensor, shared: bool) -> None:
    """What csrc/ops/sample_mask/sample_mask.cpp checks, from what the host knows: nothing syncs."""
    if sample_ids.device.type == "cpu":
        for each in sample_ids.tolist():
            _checks.integer("sample_ids", each, 0, 2**56)
    keeps = num_keep.lengths if isinstance(num_keep, SeqLens) else (num_keep,) * len(lengths)
    for i, (length, keep) in enumerate(zip(lengths.lengths, keeps, strict=True)):
        if keep > length:
            raise ValueError(
                f"num_keep must be in [0, length] for every sample, got {keep} of {length} positions in sample {i}"
            )
        if shared and (length, keep) != (lengths.lengths[0], keeps[0]):
            raise ValueError(
                "lengths and num_keep must be the same for all samples with shared=True, "
                f"got {keep} of {length} in sample {i} and {keeps[0]} of {lengths.lengths[0]} in sample 0"
            )


@_backends.operator(BACKENDS, "forward")
def _sample_mask(
    cu: Tensor, cu_keep: Tensor, sample_ids: Tensor, total: int, total_keep: int, max_length: int, seed: int, step: int,
    stream: int, shared: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ids_keep, ids_mask. More to keep than there is: the kernels' checks refuse it."""
    return cu.new_empty(total_keep), cu.new_empty(max(total - total_keep, 0))
