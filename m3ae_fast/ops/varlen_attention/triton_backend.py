"""varlen_attention in Triton.

A program holds a block of queries (or, backward, of keys) of one sequence and head. Up to SHORT keys, all keys are one
block: q, k, v are read once, the softmax is taken at once, and one kernel makes all gradients. Beyond, the other side is
streamed: forward with an online softmax, backward in one kernel for dq and one for dk, dv. Nothing is added up by two
programs. Rows past the last sequence are cleared by programs of their own.

Vectors of a GPU program are powers of two wide: a head of 80 or 96 channels is read in two pieces, 64 + 16 or 64 + 32,
so that no product runs over padding (a single piece of 128 would be 37 or 25 % of it).
"""

import torch
import triton
import triton.language as tl

from m3ae_fast import _backends

INTERPRETED = tl.constexpr(_backends.INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# Below, `x` is (pointer, row stride, head stride) of [rows, heads, WIDTH], a tile is a tuple of one or two pieces,
# [rows, HEAD] and, where REST is not 0, [rows, REST]; `real` masks the rows that exist.


@triton.jit
def _load(x, head, rows, real, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr):
    at = x[0] + head.to(tl.int64) * x[2] + rows.to(tl.int64)[:, None] * x[1]
    d = tl.arange(0, HEAD)
    first = tl.load(at + d, mask=real[:, None] & (d < WIDTH), other=0.0)
    if REST == 0:
        return (first,)
    else:
        e = HEAD + tl.arange(0, REST)
        return first, tl.load(at + e, mask=real[:, None] & (e < WIDTH), other=0.0)


@triton.jit
def _store(x, head, rows, real, tile, WIDTH: tl.constexpr):
    at = x[0] + head.to(tl.int64) * x[2] + rows.to(tl.int64)[:, None] * x[1]
    for i in tl.static_range(len(tile)):
        d = i * tile[0].shape[1] + tl.arange(0, tile[i].shape[1])
        tl.store(at + d, tile[i].to(x[0].dtype.element_ty), mask=real[:, None] & (d < WIDTH))


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
    """a b^T of two tiles."""
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
    x, head, block, blocks, begin, end,
    WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros in the rows [begin, end), shared by `blocks` programs."""
    for first in range(begin + block * BLOCK, end, blocks * BLOCK):
        rows = first + tl.arange(0, BLOCK)
        _store(x, head, rows, rows < end, _zeros(BLOCK, HEAD, REST), WIDTH)


@triton.jit
def _clear_lse(lse, head, block, blocks, begin, end, BLOCK: tl.constexpr):
    for first in range(begin + block * BLOCK, end, blocks * BLOCK):
        rows = first + tl.arange(0, BLOCK)
        tl.store(lse + head.to(tl.int64) * end + rows, float("-inf"), mask=rows < end)


@triton.jit
def _program(blocks, HEADS: tl.constexpr):
    """(block, head, sequence): blocks of a head run side by side, so that what they share stays in L2."""
    program = tl.program_id(0)
    return program % blocks, program // blocks % HEADS, program // blocks // HEADS


@triton.jit(do_not_specialize=["batch", "blocks", "q_rows"])
def _forward(
    q, k, v, out, lse, cu_q, cu_k, batch, blocks, q_rows, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """WHOLE: all keys of a sequence are one block."""
    block, head, sequence = _program(blocks, HEADS)
    begin = tl.load(cu_q + sequence)
    if sequence == batch:
        _clear(out, head, block, blocks, begin, q_rows, WIDTH, HEAD, REST, BLOCK_Q)
        _clear_lse(lse, head, block, blocks, begin, q_rows, BLOCK_Q)
        return
    rows = begin + block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    end = tl.load(cu_q + sequence + 1)
    if begin + block * BLOCK_Q >= end:
        return
    real = rows < end
    first, last = tl.load(cu_k + sequence), tl.load(cu_k + sequence + 1)
    tile = _load(q, head, rows, real, WIDTH, HEAD, REST)
    sum = _zeros(BLOCK_Q, HEAD, REST)
    lanes = tl.arange(0, BLOCK_K)
    if WHOLE:
        keys = first + lanes
        k_tile = _load(k, head // GROUPS, keys, keys < last, WIDTH, HEAD, REST)
        v_tile = _load(v, head // GROUPS, keys, keys < last, WIDTH, HEAD, REST)
        scores = tl.where((keys < last)[None, :], _outer(tile, k_tile) * (scale * LOG2E), float("-inf"))
        most = tl.max(scores, 1)
        shift = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp2(scores - shift[:, None])
        total = tl.sum(weights, 1)
        sum = _add(sum, weights, v_tile)
    else:
        most = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        for start in range(first, last, BLOCK_K):
            keys = start + lanes
            k_tile = _load(k, head // GROUPS, keys, keys < last, WIDTH, HEAD, REST)
            v_tile = _load(v, head // GROUPS, keys, keys < last, WIDTH, HEAD, REST)
            scores = tl.where((keys < last)[None, :], _outer(tile, k_tile) * (scale * LOG2E), float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - shift[:, None])
            shrink = tl.exp2(most - shift)
            total = total * shrink + tl.sum(weights, 1)
            sum = _add(_scaled(sum, shrink[:, None]), weights, v_tile)
            most = higher
    sum = _scaled(sum, 1 / tl.where(total == 0.0, 1.0, total)[:, None])
    _store(out, head, rows, real, sum, WIDTH)
    tl.store(lse + head.to(tl.int64) * q_rows + rows, (most + tl.log2(total)) * LN2, mask=real)


@triton.jit(do_not_specialize=["batch", "blocks", "q_rows", "k_rows"])
def _backward_keys(
    q, k, v, dout, lse, dlse, delta, cu_q, cu_k, dq, dk, dv, batch, blocks, q_rows, k_rows, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; where it is all keys (WHOLE), dq too, and delta is made here."""
    block, key_head, sequence = _program(blocks, HEADS // GROUPS)
    first, begin = tl.load(cu_k + sequence), tl.load(cu_q + sequence)
    if sequence == batch:
        _clear(dk, key_head, block, blocks, first, k_rows, WIDTH, HEAD, REST, BLOCK_K)
        _clear(dv, key_head, block, blocks, first, k_rows, WIDTH, HEAD, REST, BLOCK_K)
        if WHOLE:
            for head in range(key_head * GROUPS, key_head * GROUPS + GROUPS):
                _clear(dq, head, block, blocks, begin, q_rows, WIDTH, HEAD, REST, BLOCK_Q)
        return
    last, end = tl.load(cu_k + sequence + 1), tl.load(cu_q + sequence + 1)
    keys = first + block * BLOCK_K + tl.arange(0, BLOCK_K)
    if not WHOLE:
        if first + block * BLOCK_K >= last:
            return
    k_tile = _load(k, key_head, keys, keys < last, WIDTH, HEAD, REST)
    v_tile = _load(v, key_head, keys, keys < last, WIDTH, HEAD, REST)
    dk_sum = _zeros(BLOCK_K, HEAD, REST)
    dv_sum = _zeros(BLOCK_K, HEAD, REST)
    for head in range(key_head * GROUPS, key_head * GROUPS + GROUPS):
        for start in range(begin, end, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            real = rows < end
            q_tile = _load(q, head, rows, real, WIDTH, HEAD, REST)
            dout_tile = _load(dout, head, rows, real, WIDTH, HEAD, REST)
            at = head.to(tl.int64) * q_rows + rows
            # Keys are rows here, so that both products with queries take their weights from registers.
            exponent = _outer(k_tile, q_tile) * (scale * LOG2E) - tl.load(lse + at, mask=real, other=0.0)[None, :] * LOG2E
            both = (keys < last)[:, None] & real[None, :]
            weights = tl.where(both, tl.exp2(exponent), 0.0)
            dweights = _outer(v_tile, dout_tile)
            if WHOLE:
                shift = tl.sum(weights * dweights, 0)
                if dlse is not None:
                    shift -= tl.load(dlse + at, mask=real, other=0.0)
            else:
                shift = tl.load(delta + at, mask=real, other=0.0)
            dscores = tl.where(both, weights * (dweights - shift[None, :]), 0.0)
            dv_sum = _add(dv_sum, weights, dout_tile)
            dk_sum = _add(dk_sum, dscores, q_tile)
            if WHOLE:
                dq_tile = _add(_zeros(BLOCK_Q, HEAD, REST), tl.trans(dscores), k_tile)
                _store(dq, head, rows, real, _scaled(dq_tile, scale), WIDTH)
    _store(dk, key_head, keys, keys < last, _scaled(dk_sum, scale), WIDTH)
    _store(dv, key_head, keys, keys < last, dv_sum, WIDTH)


@triton.jit(do_not_specialize=["batch", "blocks", "q_rows"])
def _backward_queries(
    q, k, v, out, dout, lse, dlse, delta, cu_q, cu_k, dq, batch, blocks, q_rows, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries, and for the keys' kernel delta = sum(dout * out) - dlse."""
    block, head, sequence = _program(blocks, HEADS)
    begin = tl.load(cu_q + sequence)
    if sequence == batch:
        _clear(dq, head, block, blocks, begin, q_rows, WIDTH, HEAD, REST, BLOCK_Q)
        return
    rows = begin + block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    end = tl.load(cu_q + sequence + 1)
    if begin + block * BLOCK_Q >= end:
        return
    real = rows < end
    first, last = tl.load(cu_k + sequence), tl.load(cu_k + sequence + 1)
    q_tile = _load(q, head, rows, real, WIDTH, HEAD, REST)
    dout_tile = _load(dout, head, rows, real, WIDTH, HEAD, REST)
    out_tile = _load(out, head, rows, real, WIDTH, HEAD, REST)
    at = head.to(tl.int64) * q_rows + rows
    shift = tl.sum(dout_tile[0].to(tl.float32) * out_tile[0].to(tl.float32), 1)
    if REST > 0:
        shift += tl.sum(dout_tile[1].to(tl.float32) * out_tile[1].to(tl.float32), 1)
    if dlse is not None:
        shift -= tl.load(dlse + at, mask=real, other=0.0)
    tl.store(delta + at, shift, mask=real)
    lse_rows = tl.load(lse + at, mask=real, other=0.0) * LOG2E
    sum = _zeros(BLOCK_Q, HEAD, REST)
    for start in range(first, last, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k_tile = _load(k, head // GROUPS, keys, keys < last, WIDTH, HEAD, REST)
        v_tile = _load(v, head // GROUPS, keys, keys < last, WIDTH, HEAD, REST)
        both = (keys < last)[None, :] & real[:, None]
        exponent = _outer(q_tile, k_tile) * (scale * LOG2E) - lse_rows[:, None]
        weights = tl.where(both, tl.exp2(exponent), 0.0)
        dweights = _outer(dout_tile, v_tile)
        sum = _add(sum, tl.where(both, weights * (dweights - shift[:, None]), 0.0), k_tile)
    _store(dq, head, rows, real, _scaled(sum, scale), WIDTH)


# Block sizes and launch options (queries, keys, warps, stages) by kernel and the largest tile width they serve; in the
# WHOLE kernels the key block follows the longest sequence. Chosen by offline compilation: no register spills.
SHORT = 128
TILES = {
    "forward": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 512: (64, 32, 8, 1)},
    "forward_whole": {64: (128, SHORT, 8, 1), 128: (128, SHORT, 8, 1)},
    "queries": {64: (64, 64, 4, 2), 128: (64, 64, 8, 1), 512: (32, 32, 8, 1)},
    "keys": {64: (64, 64, 4, 2), 128: (64, 64, 8, 1), 512: (32, 32, 8, 1)},
    "keys_whole": {64: (64, SHORT, 8, 1), 128: (32, SHORT, 8, 1)},
}


def _power_of_two(n, low=16):
    return max(low, triton.next_power_of_2(n))


def _pieces(width):
    """(HEAD, REST): powers of two, at least 16 for the products, that cover the width."""
    if width <= 16 or width == _power_of_two(width):
        return _power_of_two(width), 0
    head = _power_of_two(width) // 2
    rest = _power_of_two(width - head)
    return (head, rest) if rest < head else (2 * head, 0)


def _tiling(kernel, width, max_q, max_k):
    """(constexprs and launch options, block sizes among them)."""
    head, rest = _pieces(width)
    block_q, block_k, warps, stages = next(v for most, v in TILES[kernel].items() if head + rest <= most)
    return dict(
        WIDTH=width, HEAD=head, REST=rest, BLOCK_Q=min(block_q, _power_of_two(max_q)),
        BLOCK_K=min(block_k, _power_of_two(max_k)), num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _strided(x):
    """What the kernels take for [rows, heads, width] with a dense last dimension: pointer, row and head strides."""
    return x, x.stride(0), x.stride(1)


def _longest(cu, longest):
    """A GPU caller always says; in the interpreter, on the CPU, the offsets may be looked at."""
    if longest is not None or cu.shape[0] == 1:
        return longest or 0
    return int((cu[1:] - cu[:-1]).max())


def _is_short(max_k, width):
    return max_k <= SHORT and sum(_pieces(width)) <= 128


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    (rows, heads, width), batch = q.shape, cu_q.shape[0] - 1
    max_q, max_k = _longest(cu_q, max_q), _longest(cu_k, max_k)
    out = q.new_empty(q.shape)
    lse = q.new_empty(heads, rows, dtype=torch.float32)
    whole = _is_short(max_k, width)
    tiling = _tiling("forward_whole" if whole else "forward", width, max_q, max_k)
    blocks = max(1, triton.cdiv(max_q, tiling["BLOCK_Q"]))
    _forward[(blocks * heads * (batch + 1),)](
        _strided(q), _strided(k), _strided(v), _strided(out), lse, cu_q, cu_k, batch, blocks, rows, scale,
        HEADS=heads, GROUPS=heads // k.shape[1], WHOLE=whole, **tiling,
    )  # fmt: skip
    return out, lse


def backward(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, dq, dk, dv):
    (rows, heads, width), batch = q.shape, cu_q.shape[0] - 1
    key_rows, key_heads = k.shape[:2]
    max_q, max_k = _longest(cu_q, max_q), _longest(cu_k, max_k)
    whole = _is_short(max_k, width)
    grouping = dict(HEADS=heads, GROUPS=heads // key_heads)
    inputs = (_strided(q), _strided(k), _strided(v))
    delta = None
    if not whole:
        delta = torch.empty_like(lse)
        tiling = _tiling("queries", width, max_q, max_k)
        blocks = max(1, triton.cdiv(max_q, tiling["BLOCK_Q"]))
        _backward_queries[(blocks * heads * (batch + 1),)](
            *inputs, _strided(out), _strided(dout), lse, dlse, delta, cu_q, cu_k, _strided(dq), batch, blocks, rows,
            scale, **grouping, **tiling,
        )  # fmt: skip
    tiling = _tiling("keys_whole" if whole else "keys", width, max_q, max_k)
    blocks = 1 if whole else triton.cdiv(max_k, tiling["BLOCK_K"])
    _backward_keys[(blocks * key_heads * (batch + 1),)](
        *inputs, _strided(dout), lse, dlse, delta, cu_q, cu_k, _strided(dq), _strided(dk), _strided(dv), batch, blocks,
        rows, key_rows, scale, WHOLE=whole, **grouping, **tiling,
    )  # fmt: skip
