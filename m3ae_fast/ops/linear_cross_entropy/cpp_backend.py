"""linear_cross_entropy on the CPU: a block of rows at a time."""

import torch
import torch.nn.functional as F

from m3ae_fast.ops.linear.cpp_backend import product

BLOCK_BYTES = 16 << 20  # of logits


def forward(x, weight, bias, target, dloss, ignore_index, label_smoothing, need_x, need_weight, need_bias):
    count, width = x.shape
    vocab = weight.shape[0]
    accumulate = torch.promote_types(x.dtype, torch.float32)
    loss, hit = x.new_zeros(count, dtype=accumulate), x.new_zeros(count, dtype=accumulate)
    dx = x.new_zeros(count if need_x else 0, width)
    dweight = x.new_zeros(vocab if need_weight else 0, width)
    dbias = x.new_zeros(vocab if need_bias else 0)
    valid = (target != ignore_index).nonzero()[:, 0]
    named = target[valid]
    if ((named < 0) | (named >= vocab)).any():
        bad = named[(named < 0) | (named >= vocab)][0].item()
        raise ValueError(f"target must be in [0, {vocab}) or ignore_index ({ignore_index}), got {bad}")
    rows = max(1, BLOCK_BYTES // max(1, vocab * x.dtype.itemsize))
    for index in valid.split(rows):
        if not len(index):
            break
        block, named = x[index], target[index].long()
        logits = product(block, weight, bias).to(accumulate)
        loss[index] = F.cross_entropy(logits, named, reduction="none", label_smoothing=label_smoothing)
        hit[index] = (logits.argmax(1) == named).to(accumulate)
        if not (need_x or need_weight or need_bias):
            continue
        dlogits = logits.softmax(1) - label_smoothing / vocab
        dlogits[torch.arange(len(index)), named] -= 1 - label_smoothing
        dlogits = (dlogits * dloss[index, None]).to(x.dtype)
        if need_x:
            dx[index] = product(dlogits, weight.t())
        if need_weight:
            dweight += product(dlogits.t(), block.t())
        if need_bias:
            dbias += dlogits.sum(0)
    return loss, hit, dx, dweight, dbias
