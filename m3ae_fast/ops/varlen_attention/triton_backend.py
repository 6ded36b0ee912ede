"""varlen_attention in Triton.

A program holds a block of queries (or, backward, of keys) of one sequence and head. Up to SHORT keys, they are all one
block: q, k, v are read once, the softmax is taken at once, and one kernel makes all gradients. Beyond, the other side
is streamed: forward with an online softmax, backward in one kernel for dq and one for dk and dv. No two programs add to
one sum. Rows past the last sequence are cleared by programs of their own.

Vectors of a GPU program are powers of two wide: a head of 80 or 96 channels is read in two pieces, 64 + 16 or 64 + 32,
so that no product runs over padding (a single piece of 128 would be 37 or 25 % of it).
"""

import functools

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton, seqlens

INTERPRETED = tl.constexpr(_triton.INTERPRETED)
WIDEST = 512  # channels of a head, as TILES has them
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


# Below, `base` points at a head's first channel in row 0, `stride` leads to the next row, `real` masks the rows that
# exist. A tile is a tuple of one or two pieces, [rows, HEAD] and, where REST is not 0, [rows, REST].


@triton.jit
def _load(base, stride, rows, real, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr):
    at = base + rows.to(tl.int64)[:, None] * stride
    d = tl.arange(0, HEAD)
    first = tl.load(at + d, mask=real[:, None] & (d < WIDTH), other=0.0)
    if REST == 0:
        return (first,)
    else:
        e = HEAD + tl.arange(0, REST)
        return first, tl.load(at + e, mask=real[:, None] & (e < WIDTH), other=0.0)


@triton.jit
def _store(base, stride, rows, real, tile, WIDTH: tl.constexpr):
    at = base + rows.to(tl.int64)[:, None] * stride
    for i in tl.static_range(len(tile)):
        d = i * tile[0].shape[1] + tl.arange(0, tile[i].shape[1])
        tl.store(at + d, tile[i].to(base.dtype.element_ty), mask=real[:, None] & (d < WIDTH))


@triton.jit
def _zeros(ROWS: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr):
    first = tl.zeros([ROWS, HEAD], tl.float32)
    if REST == 0:
        return (first,)
    else:
        return first, tl.zeros([ROWS, REST], tl.float32)


@triton.jit
def _dot(a, b, sum):
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as integers, and says nothing
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    return tl.dot(a, b, sum, input_precision="ieee")


@triton.jit
def _outer(a, b):
    """a b^T of two tiles. Bitwise the transpose of b a^T, where both run as the same instruction (`_tiling`)."""
    sum = _dot(a[0], tl.trans(b[0]), None)
    if len(a) == 2:
        sum = _dot(a[1], tl.trans(b[1]), sum)
    return sum


@triton.jit
def _add(sum, weights, tile):
    """sum + weights tile, the weights rounded to the tile's dtype."""
    weights = weights.to(tile[0].dtype)
    if len(tile) == 1:
        return (_dot(weights, tile[0], sum[0]),)
    else:
        return _dot(weights, tile[0], sum[0]), _dot(weights, tile[1], sum[1])


@triton.jit
def _scaled(tile, factor):
    if len(tile) == 1:
        return (tile[0] * factor,)
    else:
        return tile[0] * factor, tile[1] * factor


@triton.jit
def _clear(
    base, stride, block, blocks, begin, end,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros in the rows [begin, end), shared by `blocks` programs."""
    for first in range(begin + block * BLOCK, end, blocks * BLOCK):
        rows = first + tl.arange(0, BLOCK)
        _store(base, stride, rows, rows < end, _zeros(BLOCK, HEAD, REST), WIDTH)


@triton.jit
def _store_stats(stats_ptr, rows, real, peak, total, HEAD_ROWS):
    """What op.py says of stats, of a head's rows; without keys peak and total are 0."""
    tl.store(stats_ptr + rows, peak, mask=real)
    tl.store(stats_ptr + HEAD_ROWS + rows, tl.log2(total), mask=real)


@triton.jit
def _clear_stats(stats_ptr, block, blocks, begin, end, HEAD_ROWS, BLOCK: tl.constexpr):
    zeros = tl.zeros([BLOCK], tl.float32)
    for first in range(begin + block * BLOCK, end, blocks * BLOCK):
        rows = first + tl.arange(0, BLOCK)
        _store_stats(stats_ptr, rows, rows < end, zeros, zeros, HEAD_ROWS)


@triton.jit
def _program(blocks, HEADS: tl.constexpr):
    """(block, head, sequence): blocks of a head run side by side, so that what they share stays in L2."""
    program = tl.program_id(0)
    return program % blocks, (program // blocks % HEADS).to(tl.int64), program // blocks // HEADS


# Weights are 2^((score - peak) * factor): the difference comes first, and is exact where it matters, however large the
# scores are. Scores are halves, which no two are too far apart for, with the sign of the scale. A row whose scores are
# all -inf has a total of 0, which makes it NaN as in eager PyTorch: peaks start at the lowest finite number.


@triton.jit
def _direction(scale):
    """(what makes a product a score, the factor)."""
    scale = tl.cast(scale, tl.float32)  # of a number that fp32 has not, the interpreter makes fp64
    sign = tl.where(scale < 0, -0.5, tl.where(scale == 0, 0.0, 0.5))
    return sign, tl.where(scale == 0, 1.0, tl.abs(scale) * (2 * LOG2E))


@triton.jit
def _scores(a, b, real, direction):
    """Scores of two tiles, -inf where not real."""
    return tl.where(real, _outer(a, b) * direction, float("-inf"))


@_triton.jit(do_not_specialize=["batch", "blocks", "q_rows"])
def _forward_kernel(
    q_ptr, q_row, q_head, k_ptr, k_row, k_head, v_ptr, v_row, v_head, out_ptr, stats_ptr, cu_q_ptr, cu_k_ptr,
    batch, blocks, q_rows, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block of queries. WHOLE: all keys of a sequence are one block."""
    block, head, sequence = _program(blocks, HEADS)
    out_ptr += head * WIDTH
    stats_ptr += head * q_rows
    begin = tl.load(cu_q_ptr + sequence)
    if sequence == batch:  # the rows past the last sequence
        _clear(out_ptr, HEADS * WIDTH, block, blocks, begin, q_rows, WIDTH, HEAD, REST, BLOCK_Q)
        _clear_stats(stats_ptr, block, blocks, begin, q_rows, HEADS * q_rows, BLOCK_Q)
        return
    end = tl.load(cu_q_ptr + sequence + 1)
    begin += block * BLOCK_Q
    if begin >= end:
        return
    first, last = tl.load(cu_k_ptr + sequence), tl.load(cu_k_ptr + sequence + 1)
    q_ptr += head * q_head
    k_ptr += head // GROUPS * k_head
    v_ptr += head // GROUPS * v_head
    rows = begin + tl.arange(0, BLOCK_Q)
    q = _load(q_ptr, q_row, rows, rows < end, WIDTH, HEAD, REST)
    sum = _zeros(BLOCK_Q, HEAD, REST)
    direction, factor = _direction(scale)
    if WHOLE:
        keys = first + tl.arange(0, BLOCK_K)
        k = _load(k_ptr, k_row, keys, keys < last, WIDTH, HEAD, REST)
        v = _load(v_ptr, v_row, keys, keys < last, WIDTH, HEAD, REST)
        scores = _scores(q, k, (keys < last)[None, :], direction)
        most = tl.maximum(tl.max(scores, 1), LOWEST)
        weights = tl.exp2((scores - most[:, None]) * factor)
        total = tl.sum(weights, 1)
        sum = _add(sum, weights, v)
    else:
        most = tl.full([BLOCK_Q], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(first, last, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            k = _load(k_ptr, k_row, keys, keys < last, WIDTH, HEAD, REST)
            v = _load(v_ptr, v_row, keys, keys < last, WIDTH, HEAD, REST)
            scores = _scores(q, k, (keys < last)[None, :], direction)
            higher = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2((scores - higher[:, None]) * factor)
            shrink = tl.exp2((most - higher) * factor)
            total = total * shrink + tl.sum(weights, 1)
            sum = _add(_scaled(sum, shrink[:, None]), weights, v)
            most = higher
    keyless = first == last
    sum = _scaled(sum, 1 / tl.where(keyless, 1.0, total)[:, None])
    _store(out_ptr, HEADS * WIDTH, rows, rows < end, sum, WIDTH)
    peak = tl.where(keyless, 0.0, tl.where(scale < 0, -2 * most, 2 * most))
    _store_stats(stats_ptr, rows, rows < end, peak, total, HEADS * q_rows)


@_triton.jit(do_not_specialize=["batch", "blocks", "q_rows", "k_rows"])
def _backward_keys_kernel(
    q_ptr, q_row, q_head, k_ptr, k_row, k_head, v_ptr, v_row, v_head, dout_ptr, dout_row, dout_head,
    stats_ptr, dlse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr, dq_ptr, dq_row, dq_head, dk_ptr, dv_ptr, dk_row, dk_head,
    batch, blocks, q_rows, k_rows, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk and dv (of the same strides) of a block of keys; where that is all keys (WHOLE), dq too, and delta made here.

    delta is what a row of dscores loses to the softmax's normalization: sum(dout * out) - dlse. Where one key has all
    the weight, out is its value, and dweights - delta is exactly 0: it is added up as dweights are.
    """
    block, key_head, sequence = _program(blocks, HEADS // GROUPS)
    dk_ptr += key_head * dk_head
    dv_ptr += key_head * dk_head
    first, begin = tl.load(cu_k_ptr + sequence), tl.load(cu_q_ptr + sequence)
    if sequence == batch:  # the rows past the last sequence
        _clear(dk_ptr, dk_row, block, blocks, first, k_rows, WIDTH, HEAD, REST, BLOCK_K)
        _clear(dv_ptr, dk_row, block, blocks, first, k_rows, WIDTH, HEAD, REST, BLOCK_K)
        if WHOLE:
            for group in range(GROUPS):
                at = dq_ptr + (key_head * GROUPS + group) * dq_head
                _clear(at, dq_row, block, blocks, begin, q_rows, WIDTH, HEAD, REST, BLOCK_Q)
        return
    last, end = tl.load(cu_k_ptr + sequence + 1), tl.load(cu_q_ptr + sequence + 1)
    first += block * BLOCK_K
    if first >= last and not WHOLE:  # WHOLE: queries without keys have a dq, zero
        return
    keys = first + tl.arange(0, BLOCK_K)
    k = _load(k_ptr + key_head * k_head, k_row, keys, keys < last, WIDTH, HEAD, REST)
    v = _load(v_ptr + key_head * v_head, v_row, keys, keys < last, WIDTH, HEAD, REST)
    dk = _zeros(BLOCK_K, HEAD, REST)
    dv = _zeros(BLOCK_K, HEAD, REST)
    direction, factor = _direction(scale)
    for group in range(GROUPS):
        head = key_head * GROUPS + group
        for start in tl.range(begin, end, BLOCK_Q, disable_licm=True):
            rows = start + tl.arange(0, BLOCK_Q)
            at = head * q_rows + rows
            q = _load(q_ptr + head * q_head, q_row, rows, rows < end, WIDTH, HEAD, REST)
            dout = _load(dout_ptr + head * dout_head, dout_row, rows, rows < end, WIDTH, HEAD, REST)
            # Keys are the rows here, so that the products for dk and dv take their weights from registers.
            real = (keys < last)[:, None] & (rows < end)[None, :]
            scores = _scores(k, q, real, direction)
            dweights = _outer(v, dout)
            if WHOLE:  # the softmax itself, once more: a rounding of its total would not cancel in dweights - delta
                weights = tl.exp2((scores - tl.maximum(tl.max(scores, 0), LOWEST)[None, :]) * factor)
                total = tl.where((first < last) & (rows < end), tl.sum(weights, 0), 1.0)
                weights *= (1 / total)[None, :]
                delta = tl.sum(weights * dweights, 0)
                if dlse_ptr is not None:
                    delta -= tl.load(dlse_ptr + at, mask=rows < end, other=0.0)
            else:
                peak = tl.load(stats_ptr + at, mask=rows < end, other=0.0) * direction
                log_total = tl.load(stats_ptr + HEADS * q_rows + at, mask=rows < end, other=0.0)
                weights = tl.exp2((scores - peak[None, :]) * factor - log_total[None, :])
                delta = tl.load(delta_ptr + at, mask=rows < end, other=0.0)
            dscores = weights * (dweights - delta[None, :])
            dv = _add(dv, weights, dout)
            dk = _add(dk, dscores, q)
            if WHOLE:
                dq = _add(_zeros(BLOCK_Q, HEAD, REST), tl.trans(dscores), k)
                _store(dq_ptr + head * dq_head, dq_row, rows, rows < end, _scaled(dq, scale), WIDTH)
    _store(dk_ptr, dk_row, keys, keys < last, _scaled(dk, scale), WIDTH)
    _store(dv_ptr, dk_row, keys, keys < last, dv, WIDTH)


@_triton.jit(do_not_specialize=["batch", "blocks", "q_rows"])
def _backward_queries_kernel(
    q_ptr, q_row, q_head, k_ptr, k_row, k_head, v_ptr, v_row, v_head, out_ptr, dout_ptr, dout_row, dout_head,
    stats_ptr, dlse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr, dq_ptr, dq_row, dq_head, batch, blocks, q_rows, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and delta for the keys' kernel."""
    block, head, sequence = _program(blocks, HEADS)
    dq_ptr += head * dq_head
    begin = tl.load(cu_q_ptr + sequence)
    if sequence == batch:  # the rows past the last sequence
        _clear(dq_ptr, dq_row, block, blocks, begin, q_rows, WIDTH, HEAD, REST, BLOCK_Q)
        return
    end = tl.load(cu_q_ptr + sequence + 1)
    begin += block * BLOCK_Q
    if begin >= end:
        return
    first, last = tl.load(cu_k_ptr + sequence), tl.load(cu_k_ptr + sequence + 1)
    k_ptr += head // GROUPS * k_head
    v_ptr += head // GROUPS * v_head
    rows = begin + tl.arange(0, BLOCK_Q)
    at = head * q_rows + rows
    q = _load(q_ptr + head * q_head, q_row, rows, rows < end, WIDTH, HEAD, REST)
    dout = _load(dout_ptr + head * dout_head, dout_row, rows, rows < end, WIDTH, HEAD, REST)
    out = _load(out_ptr + head * WIDTH, HEADS * WIDTH, rows, rows < end, WIDTH, HEAD, REST)
    row = tl.arange(0, BLOCK_Q)
    delta = tl.sum(tl.where(row[:, None] == row[None, :], _outer(dout, out), 0.0), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < end, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < end)
    peak = tl.load(stats_ptr + at, mask=rows < end, other=0.0) * 0.5
    log_total = tl.load(stats_ptr + HEADS * q_rows + at, mask=rows < end, other=0.0)
    share = tl.where(first == last, 0.0, tl.exp2(-log_total))
    dq = _zeros(BLOCK_Q, HEAD, REST)
    for start in range(first, last, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = _load(k_ptr, k_row, keys, keys < last, WIDTH, HEAD, REST)
        v = _load(v_ptr, v_row, keys, keys < last, WIDTH, HEAD, REST)
        powers = (_outer(q, k) * 0.5 - peak[:, None]) * (scale * (2 * LOG2E))
        weights = tl.exp2(
            tl.where((keys < last)[None, :], powers, float("-inf"))
        )  # without the total, which is divided by at the end
        dq = _add(dq, weights * (_outer(dout, v) - delta[:, None]), k)
    _store(dq_ptr, dq_row, rows, rows < end, _scaled(dq, (scale * share)[:, None]), WIDTH)


# Per kernel (largest tile width, block of queries, block of keys, warps, pipeline stages); blocks shrink to the longest
# sequence. Found by `python -m benchmarks.resources`: no register spills, wgmma on sm_90, tcgen05 on sm_100. Untimed.
# "fp32": products run outside the tensor cores there, and one block of all keys would spill, as it would on sm_80 at 80
# channels and more.
SHORT = 128
WHOLE_WIDTH = {"sm_120": 64, "sm_100": 128, "sm_90": 128, "sm_80": 64, "fp32": 0}
TILES = {
    "sm_90": {
        "forward": ((128, 64, 64, 4, 2), (512, 32, 32, 8, 1)),
        "queries": ((128, 64, 64, 4, 2), (512, 32, 32, 8, 1)),
        "keys": ((128, 64, 64, 4, 2), (512, 32, 32, 8, 1)),
        "forward_whole": ((128, 128, SHORT, 8, 1),),
        "keys_whole": ((96, 64, SHORT, 8, 1), (128, 32, SHORT, 8, 1)),
    },
    "sm_80": {
        "forward": ((128, 128, 64, 8, 2), (512, 32, 32, 8, 1)),
        "queries": (
            (64, 64, 64, 4, 2),
            (80, 64, 64, 4, 2),
            (128, 32, 32, 8, 1),
            (256, 32, 32, 4, 1),
            (512, 32, 32, 8, 1),
        ),
        "keys": ((80, 32, 64, 4, 2), (128, 32, 32, 4, 1), (512, 32, 32, 8, 1)),
        "forward_whole": ((64, 128, SHORT, 8, 1),),
        "keys_whole": ((64, 16, SHORT, 8, 1),),
    },
    "fp32": {
        "forward": ((80, 16, 32, 4, 1), (128, 16, 16, 4, 1), (512, 16, 16, 8, 1)),
        "queries": ((80, 16, 32, 4, 1), (128, 16, 16, 4, 1), (512, 16, 16, 8, 1)),
        "keys": ((80, 32, 32, 8, 1), (512, 16, 16, 8, 1)),
    },
}
# On sm_100 the sums of products lie in a memory of their own, of 512 columns; 64 queries of 80 channels need 560.
TILES["sm_100"] = TILES["sm_90"] | {
    "keys_whole": ((64, 64, SHORT, 8, 1), (80, 32, SHORT, 4, 1), (128, 32, SHORT, 8, 1)),
}
# sm_120 multiplies as sm_80 does, by mma.sync alone.
TILES["sm_120"] = TILES["sm_80"] | {"queries": ((80, 64, 64, 4, 2), (512, 32, 32, 8, 1))}
NEWER = {9: "sm_90", 10: "sm_100", 12: "sm_120"}  # by the first digits of a GPU's compute capability


@functools.cache
def _generation(device):
    """The architecture whose tiles a GPU takes; the interpreter's, which takes any, is sm_90."""
    return "sm_90" if _triton.INTERPRETED else NEWER.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def _architecture(x):
    return "fp32" if x.dtype == torch.float32 and not _triton.INTERPRETED else _generation(x.device)


def _power_of_two(n, low=16):
    return max(low, _triton.next_power_of_2(n))


def _pieces(width):
    """(HEAD, REST): powers of two, at least 16 for the products, that cover the width."""
    if width <= 16 or width == _power_of_two(width):
        return _power_of_two(width), 0
    head = _power_of_two(width) // 2
    rest = _power_of_two(width - head)
    return (head, rest) if rest < head else (2 * head, 0)


def _tiling(kernel, architecture, width, max_q, max_k, whole=False):
    """(constexprs and launch options, block sizes among them)."""
    head, rest = _pieces(width)
    rows = TILES[architecture][f"{kernel}_whole" if whole else kernel]
    _, block_q, block_k, warps, stages = next(row for row in rows if head + rest <= row[0])
    if whole and max_q > block_q:
        block_q = min(block_q, 64)  # several blocks: less of the last is padding
    block_q, block_k = min(block_q, _power_of_two(max_q)), min(block_k, _power_of_two(max_k))
    if whole and max(block_q, block_k) <= 64:
        warps = 4
    if kernel == "keys" and not whole and block_q < 64 and architecture in ("sm_90", "sm_100"):
        block_k = min(block_k, 32)  # too few for wgmma and tcgen05, as the queries were that these scores are of
    return dict(WIDTH=width, HEAD=head, REST=rest, BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=stages)


def _strided(x):
    """What the kernels take for [rows, heads, width] with a dense last dimension: pointer, row and head strides."""
    return x, x.stride(0), x.stride(1)


def _is_whole(architecture, width, max_k):
    return max_k <= SHORT and sum(_pieces(width)) <= WHOLE_WIDTH[architecture]


def _grid(length, block, heads, batch):
    """(blocks of a sequence, grid): one more sequence clears the rows past the last."""
    blocks = max(1, _triton.cdiv(length, block))
    return blocks, (blocks * heads * (batch + 1),)


def _lengths(q, cu_q, cu_k, max_q, max_k, scale):
    """(cu_k, max_q, max_k, scale), what is None as it is meant."""
    cu_k = cu_q if cu_k is None else cu_k
    scale = q.shape[2] ** -0.5 if scale is None else scale
    return cu_k, seqlens.longest(cu_q, max_q), seqlens.longest(cu_k, max_k), scale


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, out, stats):
    (rows, heads, width), batch = q.shape, cu_q.shape[0] - 1
    cu_k, max_q, max_k, scale = _lengths(q, cu_q, cu_k, max_q, max_k, scale)
    architecture = _architecture(q)
    whole = _is_whole(architecture, width, max_k)
    tiling = _tiling("forward", architecture, width, max_q, max_k, whole)
    blocks, grid = _grid(max_q, tiling["BLOCK_Q"], heads, batch)
    _forward_kernel[grid](
        *_strided(q), *_strided(k), *_strided(v), out, stats, cu_q, cu_k, batch, blocks, rows, scale,
        HEADS=heads, GROUPS=heads // k.shape[1], WHOLE=whole, **tiling,
    )  # fmt: skip


def backward(dout, dlse, q, k, v, out, stats, cu_q, cu_k, max_q, max_k, scale, dq, dk, dv):
    (rows, heads, width), batch = q.shape, cu_q.shape[0] - 1
    key_rows, key_heads = k.shape[:2]
    cu_k, max_q, max_k, scale = _lengths(q, cu_q, cu_k, max_q, max_k, scale)
    architecture = _architecture(q)
    whole = _is_whole(architecture, width, max_k)
    inputs = (*_strided(q), *_strided(k), *_strided(v))
    grouping = dict(HEADS=heads, GROUPS=heads // key_heads)
    delta = None
    if not whole:
        delta = torch.empty_like(stats[0])
        tiling = _tiling("queries", architecture, width, max_q, max_k)
        blocks, grid = _grid(max_q, tiling["BLOCK_Q"], heads, batch)
        _backward_queries_kernel[grid](
            *inputs, out, *_strided(dout), stats, dlse, delta, cu_q, cu_k, *_strided(dq), batch, blocks, rows, scale,
            **grouping, **tiling,
        )  # fmt: skip
    tiling = _tiling("keys", architecture, width, max_q, max_k, whole)
    blocks, grid = _grid(max_k, tiling["BLOCK_K"], key_heads, batch)
    _backward_keys_kernel[grid](
        *inputs, *_strided(dout), stats, dlse, delta, cu_q, cu_k, *_strided(dq), dk, *_strided(dv), batch, blocks, rows,
        key_rows, scale, WHOLE=whole, **grouping, **tiling,
    )  # fmt: skip


# Real-model calls for resources(): cases.py's and the other head widths. Name, width, longest queries and keys.
REAL = (
    ("m3ae_small_encoder", 64, 81, 81),
    ("m3ae_small_decoder", 32, 297, 297),
    ("m3ae_huge_encoder", 80, 81, 81),
    ("mae_base_encoder", 64, 50, 50),
    ("mae_base_decoder", 32, 197, 197),
    ("cross_decoder", 32, 147, 50),
    ("long_512", 64, 512, 512),
    *((f"width {width}, {length}", width, length, length) for width in (96, 128, 256) for length in (81, 400)),
    ("width 80, 400", 80, 400, 400),
)


def resources():
    """What benchmarks/resources.py compiles: see m3ae_fast/_triton.py."""
    kernels = {"forward": _forward_kernel, "queries": _backward_queries_kernel, "keys": _backward_keys_kernel}
    for architecture in TILES:
        kind = "fp32" if architecture == "fp32" else "bf16"
        for name, width, max_q, max_k in REAL[:4] if architecture == "fp32" else REAL:
            whole = _is_whole(architecture, width, max_k)
            for kernel in ("forward", "keys") if whole else ("forward", "queries", "keys"):
                tiling = _tiling(kernel, architecture, width, max_q, max_k, whole)
                options = {key: tiling.pop(key) for key in ("num_warps", "num_stages")}
                constexprs = dict(HEADS=16, GROUPS=1, WHOLE=whole, dlse_ptr=None, **tiling)
                if whole:
                    constexprs["delta_ptr"] = None
                names = kernels[kernel].arg_names
                yield _triton.Resource(
                    f"varlen_attention {kernel}{' whole' if whole else ''} {name} {kind}",
                    kernels[kernel],
                    {n: _type(n, kind) for n in names if n not in constexprs},
                    {n: value for n, value in constexprs.items() if n in names},
                    options,
                    None if kind == "fp32" else "mma" if tiling["BLOCK_Q"] < 64 or tiling["BLOCK_K"] < 64 else "wgmma",
                    None if kind == "fp32" else architecture,
                )


def _type(name, kind):
    """The type of a kernel's argument, as Triton spells it."""
    if name.endswith("_ptr"):
        return "*i32" if name.startswith("cu_") else "*fp32" if name in ("stats_ptr", "delta_ptr") else f"*{kind}"
    return "fp32" if name == "scale" else "i32:16" if name.endswith(("_row", "_head")) else "i32"
