"""assemble_tokens in Triton: a program a row forward; backward, chunks of rows in tiles, and groups by table row."""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._groups import group
from m3ae_fast._triton import Resource, element, load_or_zero

BLOCK = 2048  # values of a row in one program, at most


def forward(
    image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding, image_position,
    text_position, image_type, text_type, dtype, out,
):  # fmt: skip
    total, width = out.shape
    block = min(_triton.next_power_of_2(width), BLOCK)
    _forward_kernel[(total, _triton.cdiv(width, block))](
        image_tokens, text_tokens, image_ids, text_ids, cu_image, cu_text, cls_token, text_embedding, image_position,
        text_position, image_type, text_type, out, _samples(cu_image, cu_text), image_tokens.shape[0], width, block,
        **_triton.row_options(block),
    )  # fmt: skip


def _samples(cu_image, cu_text):
    return (cu_text if cu_image is None else cu_image).shape[0] - 1


def backward(
    dout, text_tokens, image_ids, text_ids, cu_image, cu_text, has_cls, image_rows, text_rows, vocabulary, patches,
    words, image_dtype, text_dtype, need, dimage, dtext, dparts, dembedding, dimage_position, dtext_position,
):  # fmt: skip
    count, width = dout.shape
    # text_tokens are the looked-up ids, or None: then image_rows + text_rows float rows
    tokens = image_rows + (text_rows if text_tokens is None else text_tokens.shape[0])
    source, target = dout.new_empty(count, dtype=torch.int32), dout.new_empty(tokens, dtype=torch.int32)
    _places_kernel[(count,)](
        source, target, cu_image, cu_text, _samples(cu_image, cu_text), image_rows, has_cls, **_triton.row_options(1)
    )
    if any(need[:3]):  # image rows, text rows, sums
        tiles = _triton.cdiv(width, _triton.COLUMNS)
        number, per_chunk = _triton.chunks(count, tiles)
        partials = None if dparts is None else dout.new_empty(number, 3, width, dtype=torch.float32)
        _backward_kernel[(number, tiles)](
            dout, source, target, dimage, dtext, partials, count, per_chunk, image_rows, width, _triton.ROWS,
            _triton.COLUMNS, **_triton.TILE_OPTIONS,
        )  # fmt: skip
    if dparts is not None:
        _triton.sum_partials(partials, dparts)
    image_target, text_target = target[:image_rows], target[image_rows:]
    tables = (
        (text_tokens, text_target, dembedding),
        (image_ids, image_target, dimage_position),
        (text_ids, text_target, dtext_position),
    )
    for ids, rows, dtable in tables:
        if dtable is not None:
            order, starts = group(torch.where(rows < 0, -1, ids), dtable.shape[0])
            _triton.sum_groups(dout, rows[order], starts, dtable)


@triton.jit
def _place(t, cu_image_ptr, cu_text_ptr, batch, image_rows, HAS_CLS: tl.constexpr, BLOCK: tl.constexpr = 128):
    """(source, inside): output row t is row `source` of [image_tokens; text_tokens], or -1 for a class token.

    Past the last sample, where inside is False, those rows follow that belong to no sample: they have a source too.
    """
    sample = t * 0
    for start in range(0, batch, BLOCK):
        at = start + tl.arange(0, BLOCK)
        end = (at + 1) * HAS_CLS
        if cu_image_ptr is not None:
            end += tl.load(cu_image_ptr + 1 + at, mask=at < batch, other=0)
        if cu_text_ptr is not None:
            end += tl.load(cu_text_ptr + 1 + at, mask=at < batch, other=0)
        sample += tl.sum(((at < batch) & (end <= t)).to(tl.int32), 0)
    inside = sample < batch
    offset = t - sample * HAS_CLS - tl.where(inside, HAS_CLS, 0)
    first_image, first_text, images = t * 0, t * 0, image_rows
    if cu_image_ptr is not None:
        first_image = tl.load(cu_image_ptr + sample)
        images = tl.load(cu_image_ptr + sample + 1, mask=inside, other=image_rows) - first_image
    if cu_text_ptr is not None:
        first_text = tl.load(cu_text_ptr + sample)
    offset -= first_image + first_text
    text = image_rows + first_text + offset - images
    source = tl.where(offset < images, first_image + offset, text)
    return tl.where(offset < 0, -1, source), inside


@_triton.jit(do_not_specialize=["batch", "image_rows"])
def _forward_kernel(
    image_tokens_ptr, text_tokens_ptr, image_ids_ptr, text_ids_ptr, cu_image_ptr, cu_text_ptr, cls_ptr, embedding_ptr,
    image_position_ptr, text_position_ptr, image_type_ptr, text_type_ptr, out_ptr, batch, image_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = d < WIDTH
    row, inside = _place(t, cu_image_ptr, cu_text_ptr, batch, image_rows, cls_ptr is not None)
    is_image, is_text = inside & (row >= 0) & (row < image_rows), inside & (row >= image_rows)
    image, text = in_row & is_image, in_row & is_text
    k = (row - tl.where(is_text, image_rows, 0)).to(tl.int64)
    word = k
    if embedding_ptr is not None:
        word = tl.load(text_tokens_ptr + k, mask=is_text, other=0).to(tl.int64)
        from_text = load_or_zero(embedding_ptr, word * WIDTH + d, text)
    else:
        from_text = load_or_zero(text_tokens_ptr, word * WIDTH + d, text)
    from_image = load_or_zero(image_tokens_ptr, k * WIDTH + d, image)
    cls = load_or_zero(cls_ptr, d, in_row & inside & (row < 0))
    image_slot, text_slot = k, k
    if image_ids_ptr is not None:
        image_slot = tl.load(image_ids_ptr + k, mask=is_image, other=0).to(tl.int64)
    if text_ids_ptr is not None:
        text_slot = tl.load(text_ids_ptr + k, mask=is_text, other=0).to(tl.int64)
    image_place = load_or_zero(image_position_ptr, image_slot * WIDTH + d, image)
    image_place += load_or_zero(image_type_ptr, d, image)
    text_place = load_or_zero(text_position_ptr, text_slot * WIDTH + d, text) + load_or_zero(text_type_ptr, d, text)
    value = tl.where(image, from_image, tl.where(text, from_text, cls)) + tl.where(image, image_place, text_place)
    tl.store(out_ptr + t.to(tl.int64) * WIDTH + d, value, mask=in_row)


@_triton.jit(do_not_specialize=["batch", "image_rows"])
def _places_kernel(source_ptr, target_ptr, cu_image_ptr, cu_text_ptr, batch, image_rows, HAS_CLS: tl.constexpr):
    """source[t]: the token row of output row t, -1 for a class token. target: the way back, -1 where in no sample."""
    t = tl.program_id(0)
    row, inside = _place(t, cu_image_ptr, cu_text_ptr, batch, image_rows, HAS_CLS)
    tl.store(source_ptr + t, row)
    tl.store(target_ptr + row, tl.where(inside, t, -1), mask=row >= 0)


@_triton.jit(do_not_specialize=["count", "per_chunk", "image_rows"])
def _backward_kernel(
    dout_ptr, source_ptr, target_ptr, dimage_ptr, dtext_ptr, partials_ptr, count, per_chunk, image_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((chunk + 1) * per_chunk, count)
    cls_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    image_sum, text_sum = cls_sum, cls_sum
    for start in range(chunk * per_chunk, end, ROWS):
        t = start + tl.arange(0, ROWS)
        row = tl.load(source_ptr + t, mask=t < end, other=-1)
        named = tl.load(target_ptr + row, mask=row >= 0, other=0) >= 0  # others: zeros
        inside = (t < end)[:, None] & (d < WIDTH)[None, :]
        image, text = ((row >= 0) & (row < image_rows))[:, None], (row >= image_rows)[:, None]
        at = t.to(tl.int64)[:, None] * WIDTH + d[None, :]
        dout = tl.load(dout_ptr + at, mask=inside & named[:, None], other=0).to(tl.float32)
        if dimage_ptr is not None:
            tl.store(dimage_ptr + row.to(tl.int64)[:, None] * WIDTH + d[None, :], dout, mask=inside & image)
        if dtext_ptr is not None:
            k = (row - image_rows).to(tl.int64)
            tl.store(dtext_ptr + k[:, None] * WIDTH + d[None, :], dout, mask=inside & text)
        if partials_ptr is not None:
            cls_sum += tl.where((row < 0)[:, None], dout, 0.0)
            image_sum += tl.where(image, dout, 0.0)
            text_sum += tl.where(text, dout, 0.0)
    if partials_ptr is not None:
        out = partials_ptr + chunk.to(tl.int64) * 3 * WIDTH + d
        tl.store(out, tl.sum(cls_sum, 0), mask=d < WIDTH)
        tl.store(out + WIDTH, tl.sum(image_sum, 0), mask=d < WIDTH)
        tl.store(out + 2 * WIDTH, tl.sum(text_sum, 0), mask=d < WIDTH)


def resources():
    offsets = {"cu_image_ptr": "*i32", "cu_text_ptr": "*i32", "batch": "i32", "image_rows": "i32"}
    ids = dict.fromkeys(("text_tokens_ptr", "image_ids_ptr", "text_ids_ptr"), "*i32")
    params = ("cls_ptr", "embedding_ptr", "image_position_ptr", "text_position_ptr", "image_type_ptr", "text_type_ptr")
    names = {"source_ptr": "*i32", "target_ptr": "*i32"}
    yield Resource(
        "assemble_tokens places", _places_kernel, offsets | names, {"HAS_CLS": True}, _triton.row_options(1)
    )  # fmt: skip
    for case, width in (("m3ae_small", 384), ("m3ae_huge", 1280)):
        block = min(_triton.next_power_of_2(width), BLOCK)
        for rows, out in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
            name = f"{case} {rows} {out}".replace("torch.", "")
            rows, out = element(rows), element(out)
            yield Resource(
                f"assemble_tokens forward {name}",
                _forward_kernel,
                offsets | ids | dict.fromkeys(params, out) | {"image_tokens_ptr": rows, "out_ptr": out},
                {"WIDTH": width, "BLOCK": block},
                _triton.row_options(block),
            )
            yield Resource(
                f"assemble_tokens backward {name}",
                _backward_kernel,
                names | {"dout_ptr": out, "dimage_ptr": rows, "partials_ptr": "*fp32"}
                | dict.fromkeys(("count", "per_chunk", "image_rows"), "i32"),
                {"dtext_ptr": None, "WIDTH": width, "ROWS": _triton.ROWS, "COLUMNS": _triton.COLUMNS},
                _triton.TILE_OPTIONS,
            )  # fmt: skip
        yield from _triton.sum_resources(width, torch.float32)
