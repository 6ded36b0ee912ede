"""linear_cross_entropy on a GPU: the products through torch (cuBLAS), the rest in Triton.

The rows that count are packed to the front. How many they are stays on the device, or the host would wait for it: so
products run over all T rows, the surplus ones zero, in as few chunks as a byte budget allows, and the softmax skips the
surplus. Vector loads and products would trip over 30,522 classes: some with a weight of 0 and a bias of -inf are added.
The softmax turns a chunk's logits into their gradients in place; dx takes the place of the packed x.
"""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._triton import Resource, jit, sequence_of

FP32_PARAMETERS = (torch.bfloat16, torch.float16)  # see _backends.for_product
LOGITS_BYTES = 512 << 20  # of a chunk: a second one reads and adds to the whole of dweight, in fp32
ALIGNMENT = 64  # of the number of classes
COUNT = dict(BLOCK=4096, num_warps=8)
SOFTMAX = dict(BLOCK=4096, num_warps=8)


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


@jit(do_not_specialize=["total", "step", "ignore_index"])
def _weigh_kernel(
    target_ptr, cu_ptr, class_weight_ptr, weights_ptr, total, step, ignore_index, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """weights[n], fp64: the class weights of the rows that count, added up over the n-th `step` sequences."""
    n = tl.program_id(0)
    begin, end = 0, total
    if cu_ptr is not None:
        begin, end = tl.load(cu_ptr + n * step), tl.minimum(tl.load(cu_ptr + (n + 1) * step), total)
    weights = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + t, mask=t < end, other=-1)
        counts = (t < end) & (target != ignore_index) & (target >= 0) & (target < VOCAB)
        weights += tl.load(class_weight_ptr + target, mask=counts, other=0.0).to(tl.float64)
    tl.store(weights_ptr + n, tl.sum(weights, 0))


@triton.jit
def _shares(counted_ptr, weights_ptr, cu_ptr, total, sequences, row, REDUCTION: tl.constexpr):
    """fp64: what the hit and lse^2 of a row that counts weigh in the reduced ones; what its cross entropy does."""
    parts = tl.full([], 1, tl.int64)
    means = 1
    mean = 0
    if REDUCTION == "mean":
        parts = tl.load(counted_ptr + total).to(tl.int64)
    elif REDUCTION == "sample_mean":
        mean = sequence_of(cu_ptr, sequences, row)
        means = sequences
        end = tl.minimum(tl.load(cu_ptr + mean + 1), total)
        here = tl.load(counted_ptr + end) - tl.load(counted_ptr + tl.load(cu_ptr + mean))
        parts = here.to(tl.int64) * sequences
    share = 1.0 / parts.to(tl.float64)
    loss_share = share
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + mean) * means
        loss_share = tl.where(weight == 0, 0.0, 1.0 / tl.where(weight == 0, 1.0, weight))
    return share, loss_share


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
    logits_ptr, rows_ptr, target_ptr, counted_ptr, weights_ptr, cu_ptr, class_weight_ptr, mean_weight_ptr, dloss_ptr,
    dlse_ptr, loss_ptr, hit_ptr, lse_ptr, z_loss_ptr, total, sequences, label_smoothing, lse_square_scale,
    VOCAB: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, REDUCTION: tl.constexpr, SMOOTHED: tl.constexpr,
    SQUARED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """A row's part of loss, hits and z-loss, its lse; GRADIENT: its logits become dlogits, a surplus row's zero.

    The loss is as csrc/ops/linear_cross_entropy/linear_cross_entropy_kernel.cpp has it.
    """
    logits_ptr += tl.program_id(0).to(tl.int64) * PADDED
    row = tl.load(rows_ptr + tl.program_id(0))
    lanes = tl.arange(0, BLOCK)
    if row < 0:
        if GRADIENT:
            for start in range(0, PADDED, BLOCK):
                zeros = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + start + lanes, zeros, mask=start + lanes < PADDED)
        return
    target = tl.load(target_ptr + row)
    is_class = (target >= 0) & (target < VOCAB)
    wanted = tl.load(logits_ptr + target, mask=is_class, other=0.0).to(tl.float32)
    number = wanted == wanted  # NaN is larger than any, as torch.argmax has it
    most = wanted
    scaled = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    beaten = tl.zeros([BLOCK], tl.int32)
    for start in range(0, PADDED, BLOCK):
        v = start + lanes
        logits = tl.load(logits_ptr + v, mask=v < PADDED, other=float("-inf")).to(tl.float32)
        logits = tl.where(v < VOCAB, logits, float("-inf"))  # an x of infinity times the weight of 0 is NaN
        higher = tl.maximum(most, tl.max(logits, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        scaled = scaled * tl.exp(most - shift) + tl.exp(logits - shift)
        most = higher
        before = (v < target).to(tl.int32)
        above = 1 - (logits <= wanted).to(tl.int32) | (logits == wanted).to(tl.int32) & before
        beaten |= tl.where(number, above, (logits != logits).to(tl.int32) & before)
        if SMOOTHED:
            below = tl.where(v < VOCAB, wanted - logits, 0.0)
            if class_weight_ptr is not None:
                below *= tl.load(class_weight_ptr + v, mask=v < VOCAB, other=0.0)
            plain += below
    sum = tl.sum(scaled, 0)
    loss = tl.log(sum) + (most - wanted)
    of_target = 1.0 - label_smoothing
    whole = 1.0  # what the softmax weighs in the gradient of the loss
    if class_weight_ptr is not None:
        of_target *= tl.load(class_weight_ptr + target, mask=is_class, other=0.0)
        whole = of_target
        if SMOOTHED:
            whole += label_smoothing * tl.load(mean_weight_ptr)
        loss *= whole
    if SMOOTHED:
        loss += label_smoothing * (tl.sum(plain, 0) / VOCAB)
    hit = 1.0 - tl.max(beaten, 0)
    share, loss_share = _shares(counted_ptr, weights_ptr, cu_ptr, total, sequences, row, REDUCTION)
    loss *= loss_share
    lse = tl.log(sum) + most
    if SQUARED:
        z_loss = lse_square_scale * lse * lse * share
        loss += z_loss
        if z_loss_ptr is not None:
            tl.store(z_loss_ptr + row, z_loss)
    tl.store(loss_ptr + row, loss)
    if hit_ptr is not None:
        tl.store(hit_ptr + row, hit * share)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse)
    if GRADIENT:
        incoming = 1.0
        if dloss_ptr is not None:
            incoming = tl.load(dloss_ptr + (row if REDUCTION == "none" else 0))
        dloss = loss_share.to(tl.float32) * incoming
        scale = dloss * whole
        if SQUARED:
            scale += 2 * lse_square_scale * lse * share.to(tl.float32) * incoming
        if dlse_ptr is not None:
            scale += tl.load(dlse_ptr + row)
        scale = scale / sum
        spread = dloss * label_smoothing / VOCAB
        for start in range(0, PADDED, BLOCK):
            v = start + lanes
            logits = tl.load(logits_ptr + v, mask=v < PADDED, other=float("-inf")).to(tl.float32)
            of_class = spread
            if SMOOTHED and class_weight_ptr is not None:
                of_class *= tl.load(class_weight_ptr + v, mask=v < VOCAB, other=0.0)
            dlogits = tl.exp(logits - most) * scale - tl.where(v == target, dloss * of_target, 0.0) - of_class
            tl.store(logits_ptr + v, dlogits.to(logits_ptr.dtype.element_ty), mask=v < PADDED)


def _add_product(sum, before, a, b):
    """sum = before * sum + a b, in sum's dtype, added up in fp32."""
    if a.dtype == sum.dtype:
        sum.addmm_(a, b, beta=before)
    elif a.is_cuda:
        torch.addmm(sum, a, b, beta=before, out_dtype=sum.dtype, out=sum)
    else:  # the interpreter's tensors: PyTorch's CPU products have no out_dtype
        sum.addmm_(a.to(sum.dtype), b.to(sum.dtype), beta=before)


def _pad(parameter, classes, dtype, fill):
    """The parameter in this dtype, with as many classes: those behind its own are filled."""
    count, *rest = parameter.shape
    if parameter.dtype == dtype and count == classes:
        return parameter
    padded = parameter.new_empty(classes, *rest, dtype=dtype)
    padded[:count] = parameter
    padded[count:] = fill
    return padded


def _row_options(width):
    block = _triton.next_power_of_2(width)
    return dict(WIDTH=width, BLOCK=block, num_warps=min(8, max(1, block // 256)))


def forward(
    x, weight, bias, target, cu_seqlens, class_weight, dloss, dlse, ignore_index, reduction, label_smoothing,
    lse_square_scale, need, loss, hit, lse, z_loss, dx, dweight, dbias,
):  # fmt: skip
    (total, width), vocab = x.shape, weight.shape[0]
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    row_loss, row_hit, row_z_loss = (
        out if out is None or reduction == "none" else x.new_empty(total, dtype=torch.float64)
        for out in (loss, hit, z_loss)
    )
    for each in (lse, row_z_loss):
        if each is not None:
            each.zero_()  # rows that do not count
    *_, need_x, need_weight, need_bias = need
    classes = _triton.cdiv(vocab, ALIGNMENT) * ALIGNMENT
    chunks = max(1, _triton.cdiv(total * classes * x.element_size(), LOGITS_BYTES))
    rows_each = max(1, _triton.cdiv(total, chunks))
    starts = range(0, total, rows_each)
    padded_weight = _pad(weight, classes, x.dtype, 0)
    padded_bias = _pad(x.new_zeros(vocab) if bias is None else bias, classes, x.dtype, float("-inf"))
    added_up = dweight  # in one chunk one product, rounded once; in many added up in fp32
    if need_weight and len(starts) > 1 and dweight.dtype != torch.float32:
        added_up = torch.empty_like(dweight, dtype=torch.float32)
    if need_bias:
        number, _ = _triton.chunks(rows_each, _triton.cdiv(classes, _triton.COLUMNS))
        partials = x.new_empty(len(starts), number, classes, dtype=torch.float32)
    if total > 0:
        counted, rows = (x.new_empty(size, dtype=torch.int32) for size in (total + 1, total))
        _count_kernel[(1,)](target, cu_seqlens, counted, total, sequences, ignore_index, **COUNT)
        weights = mean_weight = None
        if class_weight is not None and label_smoothing > 0:
            mean_weight = class_weight.mean()
        if class_weight is not None and reduction in ("mean", "sample_mean"):
            means, step = (1, sequences) if reduction == "mean" else (sequences, 1)
            weights = x.new_empty(means, dtype=torch.float64)
            _weigh_kernel[(means,)](
                target, cu_seqlens, class_weight, weights, total, step, ignore_index, VOCAB=vocab, **COUNT
            )
        packed = torch.empty_like(x)
        _pack_kernel[(total,)](x, counted, packed, rows, row_loss, row_hit, total, **_row_options(width))
        buffer = x.new_empty(rows_each, classes)
    elif need_weight:
        dweight.zero_()
    for chunk, first in enumerate(starts):
        some = packed[first : first + rows_each]
        logits = torch.addmm(padded_bias, some, padded_weight.t(), out=buffer[: some.shape[0]])
        _softmax_kernel[(some.shape[0],)](
            logits, rows[first:], target, counted, weights, cu_seqlens, class_weight, mean_weight, dloss, dlse,
            row_loss, row_hit, lse, row_z_loss, total, sequences, label_smoothing, lse_square_scale, VOCAB=vocab,
            PADDED=classes, REDUCTION=reduction, SMOOTHED=label_smoothing > 0, SQUARED=lse_square_scale > 0,
            GRADIENT=need_x or need_weight or need_bias, **SOFTMAX,
        )  # fmt: skip
        if need_bias:
            _triton.partial_sums(logits, partials[chunk])
        if need_weight:
            _add_product(added_up, int(chunk > 0), logits[:, :vocab].t(), some)
        if need_x:
            torch.mm(logits, padded_weight, out=some)
    if need_x and total > 0:
        _unpack_kernel[(total,)](packed, counted, dx, **_row_options(width))
    if added_up is not dweight:
        dweight.copy_(added_up)
    if need_bias:
        _triton.sum_partials(partials.flatten(0, 1), dbias)
    for each, out in ((row_loss, loss), (row_hit, hit), (row_z_loss, z_loss)):
        if each is not out:
            _triton.sum_values(each, out)


def resources():
    """What benchmarks/resources.py compiles: see m3ae_fast/_triton.py."""
    vocab, width = 30522, 512
    integers = dict.fromkeys(("target_ptr", "counted_ptr", "rows_ptr", "cu_ptr"), "*i32")
    sizes = dict.fromkeys(("total", "sequences", "step", "ignore_index"), "i32")
    floats = dict.fromkeys(("class_weight_ptr", "mean_weight_ptr", "dlse_ptr", "lse_ptr"), "*fp32")
    floats |= dict.fromkeys(("label_smoothing", "lse_square_scale"), "fp32")
    sums = dict.fromkeys(("loss_ptr", "hit_ptr", "z_loss_ptr", "weights_ptr"), "*fp64")
    flags = dict(VOCAB=vocab, PADDED=30528, REDUCTION="sample_mean", GRADIENT=True, dloss_ptr=None) | SOFTMAX
    absent = ("weights_ptr", "class_weight_ptr", "mean_weight_ptr", "dlse_ptr", "lse_ptr", "z_loss_ptr")
    plain = flags | dict.fromkeys(absent) | dict(SMOOTHED=False, SQUARED=False)
    for kind in ("bf16", "fp32"):
        values = dict.fromkeys(("x_ptr", "packed_ptr", "dx_ptr", "logits_ptr"), f"*{kind}")
        types = integers | sizes | floats | sums | values
        for name, kernel, launch in (
            ("count", _count_kernel, COUNT),
            ("weigh", _weigh_kernel, COUNT | dict(VOCAB=vocab)),
            ("pack", _pack_kernel, _row_options(width)),
            ("unpack", _unpack_kernel, _row_options(width)),
            ("softmax", _softmax_kernel, plain),
            ("softmax smoothed", _softmax_kernel, plain | dict(SMOOTHED=True)),
            ("softmax with all options", _softmax_kernel, flags | dict(SMOOTHED=True, SQUARED=True)),
        ):
            constexprs = {n: value for n, value in launch.items() if n != "num_warps"}
            signature = {n: types[n] for n in kernel.arg_names if n not in constexprs}
            options = {"num_warps": launch["num_warps"]}
            yield Resource(f"linear_cross_entropy {name} m3ae_small {kind}", kernel, signature, constexprs, options)
