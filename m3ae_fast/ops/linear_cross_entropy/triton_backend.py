"""linear_cross_entropy on a GPU: the products through torch (cuBLAS), the rest in Triton.

The rows that count are packed to the front. How many they are stays on the device, or the host would wait for it: so
products run over all T rows in chunks of a byte budget, the surplus ones zero, and the other kernels skip the surplus.
The softmax turns a chunk's logits into their gradients in place; dx takes the place of the packed x.
"""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._triton import Resource, jit, sequence_of

LOGITS_BYTES = 128 << 20  # of a chunk: each one reads and adds to the whole of dweight, in fp32
ALIGNMENT = (
    64  # elements of a row of logits: a vocabulary of 30,522 has rows that vector loads and cuBLAS would trip over
)
COUNT = dict(BLOCK=4096, num_warps=8)
SOFTMAX = dict(BLOCK=4096, num_warps=8)
COLUMNS = dict(BLOCK_ROWS=64, BLOCK=64, num_warps=4)


@jit(do_not_specialize=["total", "sequences", "ignore_index"])
def _count_kernel(target_ptr, cu_ptr, counted_ptr, total, sequences, ignore_index, BLOCK: tl.constexpr):
    """counted[t]: the rows that count among the first t, for t in [0, total]. One program."""
    end = total
    if cu_ptr is not None:
        end = tl.load(cu_ptr + sequences)
    before = tl.full([], 0, tl.int32)
    tl.store(counted_ptr, before)
    for start in range(0, total, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = (t < end) & (t < total)
        counts = (inside & (tl.load(target_ptr + t, mask=inside, other=0) != ignore_index)).to(tl.int32)
        tl.store(counted_ptr + 1 + t, before + tl.cumsum(counts, 0), mask=t < total)
        before += tl.sum(counts, 0)


@triton.jit
def _share(counted_ptr, cu_ptr, total, sequences, row, REDUCTION: tl.constexpr):
    """fp64: what the loss of a row that counts weighs in the reduced loss."""
    parts = tl.full([], 1, tl.int64)
    if REDUCTION == "mean":
        parts = tl.load(counted_ptr + total).to(tl.int64)
    elif REDUCTION == "sample_mean":
        sequence = sequence_of(cu_ptr, sequences, row)
        end = tl.minimum(tl.load(cu_ptr + sequence + 1), total)
        here = tl.load(counted_ptr + end) - tl.load(counted_ptr + tl.load(cu_ptr + sequence))
        parts = here.to(tl.int64) * sequences
    return 1.0 / parts.to(tl.float64)


@jit(do_not_specialize=["total"])
def _pack_kernel(
    x_ptr, counted_ptr, packed_ptr, rows_ptr, loss_ptr, hit_ptr, total, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """packed[i], rows[i]: the i-th row that counts, or zeros and -1. The others' loss and hit are 0."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    i = tl.load(counted_ptr + t).to(tl.int64)
    if tl.load(counted_ptr + t + 1) > i:
        tl.store(rows_ptr + i, t)
        tl.store(packed_ptr + i * WIDTH + d, tl.load(x_ptr + t * WIDTH + d, mask=d < WIDTH), mask=d < WIDTH)
    else:
        tl.store(loss_ptr + t, 0.0)
        if hit_ptr is not None:
            tl.store(hit_ptr + t, 0.0)
    if t >= tl.load(counted_ptr + total):
        tl.store(rows_ptr + t, -1)
        tl.store(packed_ptr + t * WIDTH + d, tl.zeros([BLOCK], packed_ptr.dtype.element_ty), mask=d < WIDTH)


@jit()
def _unpack_kernel(packed_ptr, counted_ptr, dx_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    i = tl.load(counted_ptr + t).to(tl.int64)
    mask = (tl.load(counted_ptr + t + 1) > i) & (d < WIDTH)
    tl.store(dx_ptr + t * WIDTH + d, tl.load(packed_ptr + i * WIDTH + d, mask=mask, other=0.0), mask=d < WIDTH)


@jit(do_not_specialize=["total", "sequences"])
def _softmax_kernel(
    logits_ptr, rows_ptr, target_ptr, counted_ptr, cu_ptr, dloss_ptr, loss_ptr, hit_ptr, total, sequences, stride,
    label_smoothing, VOCAB: tl.constexpr, BLOCK: tl.constexpr, REDUCTION: tl.constexpr, SMOOTHED: tl.constexpr,
    GRADIENT: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """A row's part of loss and hits; GRADIENT: its logits become dlogits. CLEAR: a surplus row's become zero."""
    logits_ptr += tl.program_id(0).to(tl.int64) * stride
    row = tl.load(rows_ptr + tl.program_id(0))
    lanes = tl.arange(0, BLOCK)
    if row < 0:
        if CLEAR:
            for start in range(0, VOCAB, BLOCK):
                zeros = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + lanes, zeros, mask=start + lanes < VOCAB)
        return
    target = tl.load(target_ptr + row)
    wanted = tl.load(logits_ptr + target, mask=(target >= 0) & (target < VOCAB), other=0.0).to(tl.float32)
    number = wanted == wanted  # NaN is larger than any, as torch.argmax has it
    most = wanted
    scaled = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        v = start + lanes
        logits = tl.load(logits_ptr + v, mask=v < VOCAB, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(logits, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        scaled = scaled * tl.exp(most - shift) + tl.exp(logits - shift)
        most = higher
        above = tl.where(number, 1 - (logits <= wanted).to(tl.int32), 0)
        equal = tl.where(number, (logits == wanted).to(tl.int32), (logits != logits).to(tl.int32))
        beaten |= above | equal & (v < target).to(tl.int32)
        if SMOOTHED:
            plain += tl.where(v < VOCAB, wanted - logits, 0.0)
    sum = tl.sum(scaled, 0)
    loss = tl.log(sum) + (most - wanted)
    if SMOOTHED:
        loss += label_smoothing * (tl.sum(plain, 0) / VOCAB)
    hit = 1.0 - tl.max(beaten, 0)
    share = _share(counted_ptr, cu_ptr, total, sequences, row, REDUCTION)
    tl.store(loss_ptr + row, loss * share)
    if hit_ptr is not None:
        tl.store(hit_ptr + row, hit * share)
    if GRADIENT:
        dloss = share.to(tl.float32)
        if dloss_ptr is not None:
            dloss *= tl.load(dloss_ptr + (row if REDUCTION == "none" else 0))
        scale = dloss / sum
        spread = dloss * label_smoothing / VOCAB
        for start in range(0, VOCAB, BLOCK):
            v = start + lanes
            logits = tl.load(logits_ptr + v, mask=v < VOCAB, other=float("-inf")).to(tl.float32)
            dlogits = tl.exp(logits - most) * scale - tl.where(v == target, dloss * (1 - label_smoothing), 0.0) - spread
            tl.store(logits_ptr + v, dlogits.to(logits_ptr.dtype.element_ty), mask=v < VOCAB)


@jit(do_not_specialize=["first", "rows", "total"])
def _dbias_kernel(
    dlogits_ptr, counted_ptr, dbias_ptr, first, rows, total, stride,
    VOCAB: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dbias += the sums of a chunk's columns, [first, first + rows) of the packed rows."""
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = tl.minimum(tl.load(counted_ptr + total) - first, rows)
    sum = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    for start in range(0, here, BLOCK_ROWS):
        i = start + tl.arange(0, BLOCK_ROWS)
        at = dlogits_ptr + i.to(tl.int64)[:, None] * stride + v[None, :]
        sum += tl.load(at, mask=(i < here)[:, None] & (v < VOCAB)[None, :], other=0.0).to(tl.float32)
    before = tl.load(dbias_ptr + v, mask=v < VOCAB)
    tl.store(dbias_ptr + v, before + tl.sum(sum, 0), mask=v < VOCAB)


def _add_product(sum, a, b):
    """sum += a b, in sum's fp32."""
    if a.dtype == sum.dtype:
        sum.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(sum, a, b, out_dtype=sum.dtype, out=sum)
    else:  # the interpreter's tensors: PyTorch's CPU products have no out_dtype
        sum.addmm_(a.to(sum.dtype), b.to(sum.dtype))


def _row_options(width):
    block = _triton.next_power_of_2(width)
    return dict(WIDTH=width, BLOCK=block, num_warps=min(8, max(1, block // 256)))


def forward(
    x, weight, bias, target, cu_seqlens, dloss, ignore_index, reduction, label_smoothing, need, loss, hit, dx, dweight,
    dbias,
):  # fmt: skip
    (total, width), vocab = x.shape, weight.shape[0]
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    row_loss, row_hit = loss, hit
    if reduction != "none":
        row_loss = x.new_empty(total, dtype=torch.float64)
        row_hit = None if hit is None else torch.empty_like(row_loss)
    _, need_x, need_weight, need_bias = need
    gradient = need_x or need_weight or need_bias
    stride = _triton.cdiv(vocab, ALIGNMENT) * ALIGNMENT
    chunks = max(1, _triton.cdiv(total * stride * x.element_size(), LOGITS_BYTES))
    rows_each = _triton.cdiv(total, chunks)
    # In one chunk, dweight is one product, rounded once; in many, it is added up in fp32. dbias is always.
    sums = dbias if dbias is None else dbias.new_zeros(vocab, dtype=torch.float32)
    added_up = None
    if need_weight and chunks > 1:
        added_up = dweight if dweight.dtype == torch.float32 else dweight.new_zeros(vocab, width, dtype=torch.float32)
    if need_weight and (total == 0 or added_up is dweight):
        dweight.zero_()
    if total > 0:
        counted, rows = (x.new_empty(size, dtype=torch.int32) for size in (total + 1, total))
        _count_kernel[(1,)](target, cu_seqlens, counted, total, sequences, ignore_index, **COUNT)
        packed = torch.empty_like(x)
        _pack_kernel[(total,)](x, counted, packed, rows, row_loss, row_hit, total, **_row_options(width))
        buffer = x.new_empty(rows_each, stride)
        if not x.is_cuda:  # the interpreter's: oneDNN's products on AMX multiply a row's padding, NaN perhaps, by zero
            buffer.zero_()
    for first in range(0, total, max(rows_each, 1)):
        some = packed[first : first + rows_each]
        logits = buffer[: some.shape[0], :vocab]
        if bias is None:
            torch.mm(some, weight.t(), out=logits)
        else:
            torch.addmm(bias, some, weight.t(), out=logits)
        _softmax_kernel[(some.shape[0],)](
            logits, rows[first:], target, counted, cu_seqlens, dloss, row_loss, row_hit, total, sequences, stride,
            label_smoothing, VOCAB=vocab, REDUCTION=reduction, SMOOTHED=label_smoothing > 0, GRADIENT=gradient,
            CLEAR=gradient and bias is not None, **SOFTMAX,
        )  # fmt: skip
        if need_bias:
            _dbias_kernel[(_triton.cdiv(vocab, COLUMNS["BLOCK"]),)](
                logits, counted, sums, first, some.shape[0], total, stride, VOCAB=vocab, **COLUMNS
            )
        if added_up is not None:
            _add_product(added_up, logits.t(), some)
        elif need_weight:
            torch.mm(logits.t(), some, out=dweight)
        if need_x:
            torch.mm(logits, weight, out=some)
    if need_x and total > 0:
        _unpack_kernel[(total,)](packed, counted, dx, **_row_options(width))
    if added_up is not None and added_up is not dweight:
        dweight.copy_(added_up)
    if need_bias:
        dbias.copy_(sums)
    for each, out in ((row_loss, loss), (row_hit, hit)):
        if each is not out:
            _triton.sum_values(each, out)


def resources():
    """What benchmarks/resources.py compiles: see m3ae_fast/_triton.py."""
    vocab, width = 30522, 512
    integers = dict.fromkeys(("target_ptr", "counted_ptr", "rows_ptr", "cu_ptr"), "*i32")
    sizes = dict.fromkeys(("total", "sequences", "ignore_index", "first", "rows"), "i32") | {"stride": "i32:16"}
    rest = {"label_smoothing": "fp32"} | {"dbias_ptr": "*fp32", "loss_ptr": "*fp64", "hit_ptr": "*fp64"}
    flags = dict(dloss_ptr=None, VOCAB=vocab, REDUCTION="sample_mean", SMOOTHED=False, GRADIENT=True, CLEAR=False)
    for kind in ("bf16", "fp32"):
        values = dict.fromkeys(("x_ptr", "packed_ptr", "dx_ptr", "logits_ptr", "dlogits_ptr"), f"*{kind}")
        types = integers | sizes | rest | values
        for name, kernel, launch in (
            ("count", _count_kernel, COUNT),
            ("pack", _pack_kernel, _row_options(width)),
            ("unpack", _unpack_kernel, _row_options(width)),
            ("softmax", _softmax_kernel, flags | SOFTMAX),
            ("softmax smoothed bias", _softmax_kernel, flags | SOFTMAX | dict(SMOOTHED=True, CLEAR=True)),
            ("dbias", _dbias_kernel, dict(VOCAB=vocab) | COLUMNS),
        ):
            constexprs = {n: value for n, value in launch.items() if n != "num_warps"}
            signature = {n: types[n] for n in kernel.arg_names if n not in constexprs}
            options = {"num_warps": launch["num_warps"]}
            yield Resource(f"linear_cross_entropy {name} m3ae_small {kind}", kernel, signature, constexprs, options)
