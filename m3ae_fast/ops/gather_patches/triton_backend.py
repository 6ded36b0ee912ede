"""gather_patches in Triton: a program some patches. Backward, a program a patch of the whole image, named or not."""

import torch
import triton
import triton.language as tl

from m3ae_fast import _triton
from m3ae_fast._groups import group
from m3ae_fast._triton import Resource, element, sequence_of

BLOCK, TILE = 1024, 4096  # values of a patch, and of all patches, in one program, at most
# pixel * scale + shift is rounded twice, as the reference does; the patches lie too far apart for any pipelining
EXACT = {"enable_fp_fusion": False}


def forward(images, ids, cu, patch_size, scale, shift, dtype, out):
    count, channels = images.shape[:2]
    values = patch_size * patch_size * channels
    block = min(_triton.next_power_of_2(values), BLOCK)
    rows = TILE // block
    _forward_kernel[(_triton.cdiv(ids.shape[0], rows), _triton.cdiv(values, block))](
        images, ids, cu, out, ids.shape[0], count, *images.stride(), tuple(scale), tuple(shift),
        images.shape[3] // patch_size, patch_size, channels, runs(images), rows, block,
        **_triton.row_options(TILE), **EXACT,
    )  # fmt: skip


def backward(dout, ids, cu, shape, patch_size, scale, dtype, dimages):
    count, channels, height, width = shape
    rows, columns = height // patch_size, width // patch_size
    place = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    image = torch.bucketize(place, cu[1:], right=True)
    patches = count * rows * columns
    order, starts = group(torch.where(image < count, image * (rows * columns) + ids, patches), patches)
    values = patch_size * patch_size * channels
    block = min(_triton.next_power_of_2(values), BLOCK)
    _backward_kernel[(patches, _triton.cdiv(values, block))](
        dout, order, starts, dimages, tuple(scale), rows, columns, patch_size, channels, block,
        **_triton.row_options(block),
    )  # fmt: skip


def runs(images):
    """Whether the pixels of a patch's row lie side by side, channels innermost: then they are loaded as vectors."""
    return images.stride(1) == 1 and images.stride(3) == images.shape[1]


@triton.jit
def per_channel(channel, values, CHANNELS: tl.constexpr):
    """values[channel] of a tuple with a number a channel."""
    out = tl.zeros(channel.shape, tl.float32)
    for c in tl.static_range(CHANNELS):
        out = tl.where(channel == c, values[c], out)
    return out


@triton.jit
def load_patch(
    images_ptr, image, patch, d, inside, stride_n, stride_c, stride_h, stride_w, scale, shift, COLUMNS: tl.constexpr,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """fp32 values at offsets d of each patch, in (row, column, channel) order, times scale plus shift; 0 if outside."""
    patch, channel = patch.to(tl.int64), d % CHANNELS
    first = image.to(tl.int64) * stride_n + (patch // COLUMNS * stride_h + patch % COLUMNS * stride_w) * PATCH
    if RUNS:
        offset = (d // (PATCH * CHANNELS)).to(tl.int64) * stride_h + d % (PATCH * CHANNELS)
    else:
        y, x = d // CHANNELS // PATCH, d // CHANNELS % PATCH
        offset = channel.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    pixel = tl.load(images_ptr + first[:, None] + offset[None, :], mask=inside, other=0).to(tl.float32)
    scale, shift = per_channel(channel, scale, CHANNELS), per_channel(channel, shift, CHANNELS)
    return tl.where(inside, pixel * scale[None, :] + shift[None, :], 0.0)


@_triton.jit(do_not_specialize=["total", "count"])
def _forward_kernel(
    images_ptr, ids_ptr, cu_ptr, out_ptr, total, count, stride_n, stride_c, stride_h, stride_w, scale, shift,
    COLUMNS: tl.constexpr, PATCH: tl.constexpr, CHANNELS: tl.constexpr, RUNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = PATCH * PATCH * CHANNELS
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (t < total)[:, None] & (d < WIDTH)[None, :]
    image = sequence_of(cu_ptr, count, t)
    patch = tl.load(ids_ptr + t, mask=t < total, other=0)
    values = load_patch(
        images_ptr, image, patch, d, inside & (image < count)[:, None], stride_n, stride_c, stride_h, stride_w, scale,
        shift, COLUMNS, PATCH, CHANNELS, RUNS,
    )  # fmt: skip
    tl.store(out_ptr + t.to(tl.int64)[:, None] * WIDTH + d[None, :], values, mask=inside)


@_triton.jit()
def _backward_kernel(
    dout_ptr, order_ptr, starts_ptr, dimages_ptr, scale, PATCHES_DOWN: tl.constexpr, COLUMNS: tl.constexpr,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = PATCH * PATCH * CHANNELS
    group = tl.program_id(0)
    image, patch = (group // (PATCHES_DOWN * COLUMNS)).to(tl.int64), group % (PATCHES_DOWN * COLUMNS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # in the image's order: channel, row, column
    channel, inner_y, inner_x = d // (PATCH * PATCH), d // PATCH % PATCH, d % PATCH
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)):
        row = dout_ptr + tl.load(order_ptr + i) * WIDTH
        total += tl.load(row + (inner_y * PATCH + inner_x) * CHANNELS + channel, mask=d < WIDTH, other=0).to(tl.float32)
    line = (image * CHANNELS + channel) * (PATCHES_DOWN * PATCH) + patch // COLUMNS * PATCH + inner_y
    at = line * (COLUMNS * PATCH) + patch % COLUMNS * PATCH + inner_x
    tl.store(dimages_ptr + at, total * per_channel(channel, scale, CHANNELS), mask=d < WIDTH)


def source_signature(images):
    """The types of what load_patch reads, for three channels, and its constants for 256 x 256 pixels, 16 a patch."""
    signature = {"images_ptr": images, "count": "i32", "scale": ("fp32",) * 3, "shift": ("fp32",) * 3}
    signature |= dict.fromkeys(("stride_n", "stride_c", "stride_h"), "i32:16") | {"stride_w": "i32"}
    return signature, {"COLUMNS": 16, "PATCH": 16, "CHANNELS": 3, "BLOCK": 1024}


def resources():
    for out in (torch.bfloat16, torch.float32):
        name, out = str(out).removeprefix("torch."), element(out)
        signature, constants = source_signature("*u8")
        signature |= {"ids_ptr": "*i32", "cu_ptr": "*i32", "out_ptr": out, "total": "i32"}
        options = _triton.row_options(TILE) | EXACT
        for layout, known in (("planes", {"stride_w": 1}), ("pixels", {"stride_c": 1})):
            types = {key: value for key, value in signature.items() if key not in known}
            known = known | constants | {"RUNS": layout == "pixels", "ROWS": TILE // BLOCK}
            yield Resource(f"gather_patches uint8 {layout} {name}", _forward_kernel, types, known, options)
        pointers = {"dout_ptr": out, "order_ptr": "*i64", "starts_ptr": "*i32", "dimages_ptr": out}
        yield Resource(
            f"gather_patches backward {name}",
            _backward_kernel,
            pointers | {"scale": ("fp32",) * 3},
            constants | {"PATCHES_DOWN": 16},
            _triton.row_options(BLOCK),
        )
