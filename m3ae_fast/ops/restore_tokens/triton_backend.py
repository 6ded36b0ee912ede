"""restore_tokens in Triton: a program a row forward; backward, chunks of rows in tiles, and groups by position."""

import torch
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._groups import group
from m3ae_fast._triton import Resource, load_or_zero

BLOCK = 2048  # values of a row in one program, at most


def forward(
    kept, rows, slots, image_mask_token, text_mask_token, image_position, text_position, image_type, text_type, out
):
    width = kept.shape[1]
    block = min(_triton.next_power_of_2(width), BLOCK)
    _forward_kernel[(rows.shape[0], _triton.cdiv(width, block))](
        kept, rows, slots, image_mask_token, text_mask_token, image_position, text_position, image_type, text_type, out,
        0 if image_position is None else image_position.shape[0], width, block, **_triton.row_options(block),
    )  # fmt: skip


def backward(
    dout, rows, slots, kept_rows, kept_dtype, patches, words, need, dkept, dsums, dimage_position, dtext_position
):
    count, width = dout.shape
    if dkept is not None:
        dkept.zero_()  # rows that are not named
    tiles = _triton.cdiv(width, _triton.COLUMNS)
    number, per_chunk = _triton.chunks(count, tiles)
    partials = None if dsums is None else dout.new_empty(number, 2, 2, width, dtype=torch.float32)
    if dkept is not None or dsums is not None:
        _backward_kernel[(number, tiles)](
            dout, rows, slots, dkept, partials, count, patches, per_chunk, width, _triton.ROWS, _triton.COLUMNS,
            **_triton.TILE_OPTIONS,
        )  # fmt: skip
    if dsums is not None:
        _triton.sum_partials(partials, dsums)
    if dimage_position is not None or dtext_position is not None:
        order, starts = group(slots, patches + words)
        for first, dposition in ((0, dimage_position), (patches, dtext_position)):
            if dposition is not None:
                _triton.sum_groups(dout, order, starts[first:], dposition)


@_triton.jit(do_not_specialize=["patches"])
def _forward_kernel(
    kept_ptr, rows_ptr, slots_ptr, image_mask_ptr, text_mask_ptr, image_position_ptr, text_position_ptr,
    image_type_ptr, text_type_ptr, out_ptr, patches, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < WIDTH
    row, slot = tl.load(rows_ptr + t).to(tl.int64), tl.load(slots_ptr + t).to(tl.int64)
    image, text = inside & (slot >= 0) & (slot < patches), inside & (slot >= patches)
    kept = load_or_zero(kept_ptr, row * WIDTH + d, inside & (row >= 0))
    image_mask = load_or_zero(image_mask_ptr, d, image & (row < 0))
    text_mask = load_or_zero(text_mask_ptr, d, text & (row < 0))
    image_place = load_or_zero(image_position_ptr, slot * WIDTH + d, image) + load_or_zero(image_type_ptr, d, image)
    text_place = load_or_zero(text_position_ptr, (slot - patches) * WIDTH + d, text)
    text_place += load_or_zero(text_type_ptr, d, text)
    source = tl.where(row >= 0, kept, tl.where(image, image_mask, text_mask))
    tl.store(out_ptr + t * WIDTH + d, source + tl.where(image, image_place, text_place), mask=inside)


@_triton.jit(do_not_specialize=["count", "patches", "per_chunk"])
def _backward_kernel(
    dout_ptr, rows_ptr, slots_ptr, dkept_ptr, partials_ptr, count, patches, per_chunk, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((chunk + 1) * per_chunk, count)
    image_masked = tl.zeros([ROWS, COLUMNS], tl.float32)
    image_kept, text_masked, text_kept = image_masked, image_masked, image_masked
    for start in range(chunk * per_chunk, end, ROWS):
        t = start + tl.arange(0, ROWS)
        row = tl.load(rows_ptr + t, mask=t < end, other=-1).to(tl.int64)
        slot = tl.load(slots_ptr + t, mask=t < end, other=-1)
        inside = (t < end)[:, None] & (d < WIDTH)[None, :]
        dout = tl.load(dout_ptr + t.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=inside, other=0).to(tl.float32)
        if dkept_ptr is not None:
            tl.store(dkept_ptr + row[:, None] * WIDTH + d[None, :], dout, mask=inside & (row >= 0)[:, None])
        if partials_ptr is not None:
            image, text = (slot >= 0) & (slot < patches), slot >= patches
            image_masked += tl.where((image & (row < 0))[:, None], dout, 0.0)
            image_kept += tl.where((image & (row >= 0))[:, None], dout, 0.0)
            text_masked += tl.where((text & (row < 0))[:, None], dout, 0.0)
            text_kept += tl.where((text & (row >= 0))[:, None], dout, 0.0)
    if partials_ptr is not None:
        out = partials_ptr + chunk.to(tl.int64) * 4 * WIDTH + d
        tl.store(out, tl.sum(image_masked, 0), mask=d < WIDTH)
        tl.store(out + WIDTH, tl.sum(image_kept, 0), mask=d < WIDTH)
        tl.store(out + 2 * WIDTH, tl.sum(text_masked, 0), mask=d < WIDTH)
        tl.store(out + 3 * WIDTH, tl.sum(text_kept, 0), mask=d < WIDTH)


def resources():
    width, block = 512, 512  # the decoder of every model of cases.py
    params = ("image_mask_ptr", "text_mask_ptr", "image_position_ptr", "text_position_ptr", "image_type_ptr",
              "text_type_ptr")  # fmt: skip
    indices = {"rows_ptr": "*i32", "slots_ptr": "*i32", "patches": "i32"}
    for kept, out in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        name, kept, out = f"{width} {kept} {out}".replace("torch.", ""), _triton.element(kept), _triton.element(out)
        yield Resource(
            f"restore_tokens forward {name}",
            _forward_kernel,
            indices | dict.fromkeys(params, out) | {"kept_ptr": kept, "out_ptr": out},
            {"WIDTH": width, "BLOCK": block},
            _triton.row_options(block),
        )
        yield Resource(
            f"restore_tokens backward {name}",
            _backward_kernel,
            indices | {"dout_ptr": out, "dkept_ptr": kept, "partials_ptr": "*fp32", "count": "i32", "per_chunk": "i32"},
            {"WIDTH": width, "ROWS": _triton.ROWS, "COLUMNS": _triton.COLUMNS},
            _triton.TILE_OPTIONS,
        )
    yield from _triton.sum_resources(width, torch.bfloat16)
