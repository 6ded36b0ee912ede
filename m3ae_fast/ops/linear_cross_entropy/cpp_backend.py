"""linear_cross_entropy on the CPU: a block of rows at a time, products by oneDNN, the rest by csrc/ops."""

import torch

from m3ae_fast._backends import address, code
from m3ae_fast._cpp import _C
from m3ae_fast.ops.linear.cpp_backend import ONEDNN, column_sums, product

BLOCK_BYTES = 24 << 20  # of logits. From 32 MiB on malloc gives every block fresh pages; small ones multiply badly
SLAB = 2048  # classes a product of the weight's gradient, which is added up over blocks: a small temporary


def forward(x, weight, bias, target, dloss, ignore_index, label_smoothing, need_x, need_weight, need_bias):
    (count, width), vocab = x.shape, weight.shape[0]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    loss, hit = (x.new_zeros(count, dtype=accumulate) for _ in range(2))
    dx = x.new_zeros(count if need_x else 0, width)
    dweight = x.new_empty(vocab if need_weight else 0, width)
    _C.prefer_huge_pages(address(dweight), dweight.nbytes)
    dbias = x.new_zeros(vocab if need_bias else 0, dtype=accumulate)
    if not (need_x or need_weight or need_bias):
        dloss = None
    rows = torch.empty_like(target)
    found = _C.rows_that_count(address(target), address(rows), count, vocab, ignore_index)
    if not found:
        return loss, hit, dx, dweight.zero_(), dbias.to(x.dtype)
    for index in rows[:found].split(max(1, BLOCK_BYTES // (vocab * x.dtype.itemsize))):
        block = x.index_select(0, index)
        logits = product(block, weight, bias)
        _C.cross_entropy_block(
            address(logits), address(index), address(target), address(dloss), address(loss), address(hit),
            *logits.shape, label_smoothing, code(x),
        )  # fmt: skip
        dlogits = logits  # where dloss is given
        if need_x:
            # in chains of a slab: oneDNN splits longer ones by the number of threads, which changes bits
            dx.index_copy_(0, index.long(), product(dlogits, weight.t(), terms=SLAB))
        if need_weight:
            _add_product(dweight, dlogits, block, first=index.data_ptr() == rows.data_ptr())
        if need_bias:
            dbias += column_sums(dlogits)
    return loss, hit, dx, dweight, dbias.to(x.dtype)


def _add_product(out, a, b, first):
    """out (+)= a^T b; `first`: out holds nothing yet."""
    if not (ONEDNN and a.dtype == torch.float32):
        out.addmm_(a.t(), b, beta=0 if first else 1)
        return
    for start in range(0, out.shape[0], SLAB):
        part, slab = out[start : start + SLAB], product(a[:, start : start + SLAB].t(), b.t())
        if first:
            part.copy_(slab)
        else:
            part.add_(slab)
