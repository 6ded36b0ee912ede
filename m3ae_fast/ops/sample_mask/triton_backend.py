"""sample_mask in Triton: all words of the batch at once, then one program a sample that splits its positions.

The kernels hold 32-bit words as uint32 and pass through memory and arguments as int32.
"""

import triton
import triton.language as tl

from m3ae_fast._triton import Resource, cdiv, jit, next_power_of_2, row_options

COUNTERS = 256  # of a program of _draw_kernel, at most: four words each
BLOCK = 4096  # words that a sample's program takes at a time, at most
SCALARS = ["seed_low", "seed_high", "step", "stream"]  # they change with each call: a value must not be compiled in


def _word(value):
    """The low 32 bits as a signed number: always of one type for Triton."""
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def forward(cu, cu_keep, sample_ids, total, total_keep, max_length, seed, step, stream, shared, ids_keep, ids_mask):
    batch, words = sample_ids.shape[0], cu.new_empty(total)
    if batch == 0 or max_length == 0:
        return
    counters = min(next_power_of_2(cdiv(max_length, 4)), COUNTERS)
    _draw_kernel[(batch, cdiv(max_length, 4 * counters))](
        cu, sample_ids, words, _word(seed), _word(seed >> 32), _word(step), _word(stream), counters,
        **row_options(4 * counters),
    )  # fmt: skip
    block = min(next_power_of_2(max_length), BLOCK)
    _select_kernel[(batch,)](cu, cu_keep, words, ids_keep, ids_mask, block, **row_options(block))


@jit(do_not_specialize=SCALARS)
def _draw_kernel(
    cu_ptr, sample_ids_ptr, words_ptr, seed_low, seed_high, step, stream, COUNTERS: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(0)
    first = tl.load(cu_ptr + sample)
    length = tl.load(cu_ptr + sample + 1) - first
    counter = tl.program_id(1) * COUNTERS + tl.arange(0, COUNTERS)
    sample_id = tl.load(sample_ids_ptr + sample)
    x = counter.to(tl.uint32)
    y = tl.zeros([COUNTERS], tl.uint32) + sample_id.to(tl.uint32)
    z = tl.zeros([COUNTERS], tl.uint32) + (stream.to(tl.uint32) | (sample_id >> 32).to(tl.uint32) << 8)
    w = tl.zeros([COUNTERS], tl.uint32) + step.to(tl.uint32)
    key0, key1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _ in tl.static_range(10):  # csrc/philox.h
        a_high, a_low = tl.umulhi(x, 0xD2511F53), x * 0xD2511F53
        b_high, b_low = tl.umulhi(z, 0xCD9E8D57), z * 0xCD9E8D57
        x, y, z, w = b_high ^ y ^ key0, b_low, a_high ^ w ^ key1, a_low
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    position = 4 * counter
    out = words_ptr + first + position
    tl.store(out, x.to(tl.int32, bitcast=True), mask=position < length)
    tl.store(out + 1, y.to(tl.int32, bitcast=True), mask=position + 1 < length)
    tl.store(out + 2, z.to(tl.int32, bitcast=True), mask=position + 2 < length)
    tl.store(out + 3, w.to(tl.int32, bitcast=True), mask=position + 3 < length)


@triton.jit
def _below(words_ptr, length, limit, BLOCK: tl.constexpr):
    """How many words are less than limit."""
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word = tl.load(words_ptr + at, mask=at < length, other=-1).to(tl.uint32, bitcast=True)  # -1: below no limit
        count += (word < limit).to(tl.int32)
    return tl.sum(count, 0)


@jit()
def _select_kernel(cu_ptr, cu_keep_ptr, words_ptr, ids_keep_ptr, ids_mask_ptr, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    first, first_keep = tl.load(cu_ptr + sample), tl.load(cu_keep_ptr + sample)
    length = tl.load(cu_ptr + sample + 1) - first
    keep = tl.load(cu_keep_ptr + sample + 1) - first_keep
    words_ptr += first
    # The largest limit with no more than `keep` words below it, bit by bit; the first few equal to it fill up.
    limit, bit = tl.full([], 0, tl.uint32), tl.full([], 1 << 31, tl.uint32)
    below = keep * 0
    for _ in range(32):
        count = _below(words_ptr, length, limit | bit, BLOCK)
        limit = tl.where(count <= keep, limit | bit, limit)
        below = tl.where(count <= keep, count, below)
        bit = bit >> 1
    ties = keep - below
    kept_before, ties_before = keep * 0, keep * 0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        word = tl.load(words_ptr + at, mask=inside, other=-1).to(tl.uint32, bitcast=True)
        equal = (inside & (word == limit)).to(tl.int32)
        tie = ties_before + tl.cumsum(equal, 0) <= ties
        kept = (inside & ((word < limit) | ((equal == 1) & tie))).to(tl.int32)
        rank = kept_before + tl.cumsum(kept, 0) - kept  # kept positions before this one
        tl.store(ids_keep_ptr + first_keep + rank, at, mask=kept == 1)
        tl.store(ids_mask_ptr + (first - first_keep) + at - rank, at, mask=inside & (kept == 0))
        kept_before += tl.sum(kept, 0)
        ties_before += tl.sum(equal, 0)


def resources():
    offsets = {"cu_ptr": "*i32", "words_ptr": "*i32"}
    draw = offsets | {"sample_ids_ptr": "*i64"} | dict.fromkeys(SCALARS, "i32")
    pointers = dict.fromkeys(("cu_keep_ptr", "ids_keep_ptr", "ids_mask_ptr"), "*i32")
    for block in (32, 256, BLOCK):  # captions, images, anything long
        counters, options = min(block // 4, COUNTERS), row_options(block)
        yield Resource(
            f"sample_mask draw {block}", _draw_kernel, draw, {"COUNTERS": counters}, row_options(4 * counters)
        )
        yield Resource(f"sample_mask select {block}", _select_kernel, offsets | pointers, {"BLOCK": block}, options)
