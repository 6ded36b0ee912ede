"""What the Triton backends share: how they launch, what each declares for the offline check of resources, and kernels
with two callers.

A kernel that is launched is decorated with `jit`, a function that kernels call with `triton.jit`.

A `triton_backend.py` has, beside `forward` and `backward`, a function that names its kernels at the sizes of real
models, exactly as `forward` and `backward` would launch them (take the launch options from the same table):

    def resources():
        yield Resource(
            "layer_norm m3ae_small bf16",            # the op, the case of cases.py, the dtype
            _forward_kernel,                         # the jit function
            {"x_ptr": "*bf16", "eps": "fp32", "count": "i64"},   # arguments that are no constexpr, typed as Triton does
            {"residual_ptr": None, "WIDTH": 384, "BLOCK": 512},  # the others; a pointer that is None is one of them
            {"num_warps": 4, "num_stages": 1},       # launch options
            None,                                    # or "mma", "wgmma": the tensor-core instruction that must be there
            None,                                    # or "sm_90", ...: the only architecture that is launched so
        )

`python -m benchmarks.resources` compiles each of them for sm_80, sm_90, sm_100 and sm_120 on a machine without a GPU
and prints registers, spills, shared memory and instructions. It fails on a spill, on a kernel that is a trap, on "mma"
without a tensor-core instruction, on "wgmma" without `wgmma` (on sm_100 `tcgen05.mma`, on sm_80 and sm_120
`mma.sync`), and where `enable_fp_fusion` is False and a fused multiply-add is there all the same. Pointers count as
aligned to 16 bytes, as torch allocates; an integer that is always a multiple of 16 says so: "i32:16".
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from m3ae_fast._backends import INTERPRETED


class Kernel(JITFunction):
    """A jit function that finds what it has compiled by a key of its own: Triton's way takes twice as long.

    `kernel[grid](*arguments, **constants_and_options)` as with any jit function, but the grid is a tuple. The first
    launch with a key is Triton's own; only that one checks that the global constants that a kernel reads are unchanged.
    """

    def __init__(self, function, **options):
        super().__init__(function, **options)
        self.kinds: dict[tuple, tuple] = {}  # types of the arguments, keywords -> (`_key_of`, its keys -> `_keep`'s)

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **options):
        if self.pre_run_hooks or _watched():
            self.run(*args, grid=grid, warmup=False, **options)
            return
        kind = (*map(type, args), *options)
        key_of, kept = self.kinds.get(kind) or self.kinds.setdefault(kind, (self._key_of(args, options), {}))
        active = driver.active
        device = active.get_current_device()
        key = key_of(device, *args, *options.values())
        found = kept.get(key)
        if found is None:
            self._keep(kept, key, self.run(*args, grid=grid, warmup=False, **options), args, options)
            return
        compiled, constants = found
        x, y, z = (*grid, 1, 1)[:3]
        # None: neither launch metadata nor hooks
        compiled.run(
            x, y, z, active.get_current_stream(device), compiled.function, compiled.packed_metadata, None, None, None,
            *args, *constants,
        )  # fmt: skip

    def _key_of(self, args, options):
        """key(device, *args, *options.values()): what decides what Triton compiles for arguments of these types.

        Generated, as Triton's binder is: a loop over the arguments takes three times as long.
        """
        decisive = [_decisive(parameter, arg) for parameter, arg in zip(self.params, args, strict=False)]
        expressions = ["{0}", *decisive, *["{0}"] * len(options)]
        names = [f"x{i}" for i in range(len(expressions))]
        values = [expression.format(name) for expression, name in zip(expressions, names, strict=True)]
        return eval(f"lambda {', '.join(names)}: ({', '.join(values)},)")

    def _keep(self, kept, key, compiled, args, options):
        """Keep what Triton has just launched, unless something decides that is not in the key."""
        rest = self.params[len(args) :]
        in_tuples = {type(number) for each in args if type(each) is tuple for number in each}
        if compiled is not None and all(p.is_constexpr for p in rest) and in_tuples <= {float}:
            kept[key] = compiled, tuple(options.get(p.name, p.default) for p in rest)


def _decisive(parameter, arg) -> str:
    """What of an argument decides, beside its type, what Triton compiles for an NVIDIA GPU: an expression of {0}."""
    if parameter.is_constexpr:
        return "{0}"
    if isinstance(arg, torch.Tensor):
        return "{0}.dtype, {0}.data_ptr() % 16 == 0"
    if isinstance(arg, tuple):
        return "tuple(map(type, {0}))"
    if isinstance(arg, int):  # shifted, what fits into 32 bits is 0 or -1
        return "{0} >> 31" if parameter.do_not_specialize else "{0} >> 31, {0} == 1 or {0} % 16 == 0 and 16"
    if arg is None or isinstance(arg, float):
        return "None"
    raise TypeError(f"{parameter.name} must be a tensor, a number, a tuple or None, got {type(arg)}")


def _watched() -> bool:
    """Whether launches are hooked, as profilers do, or kernels are compiled in another way: then Triton launches."""
    runtime = knobs.runtime
    return bool(
        getattr(runtime.launch_enter_hook, "calls", True)
        or getattr(runtime.launch_exit_hook, "calls", True)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def jit(**options):
    """Decorates a kernel that is launched, with triton.jit's options."""
    known = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))  # what `Kernel` does is private to Triton
    return functools.partial(Kernel, **options) if known and not INTERPRETED else triton.jit(**options)


class Resource(NamedTuple):
    """One kernel at one real size: see above."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    instruction: str | None = None
    architecture: str | None = None


def element(dtype: torch.dtype) -> str:
    """What Triton's signatures call a pointer to such elements."""
    return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8"}[dtype]


# Triton's own two, which kernels may call, take microseconds.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def row_options(block: int) -> dict[str, int]:
    """Launch options of a program that holds `block` values of a row: 16 a thread."""
    return {"num_warps": min(max(block // 512, 1), 16), "num_stages": 1}


# Sums over rows: chunks of rows, each summed by tiles of ROWS x COLUMNS into a partial sum, then the partial sums.
ROWS, COLUMNS = 16, 128
TILE_OPTIONS = {"num_warps": 4, "num_stages": 2}
PROGRAMS = 2048  # at most, of tiles: enough loads on their way at once for the bandwidth of a large GPU
PARTIALS = dict(ROWS=256, COLUMNS=32, num_warps=8, num_stages=1)  # all partial sums at once: one wait for memory


def chunks(count: int, tiles: int) -> tuple[int, int]:
    """(number of chunks, rows of each) for rows of so many tiles: the same for the same shape, whatever the machine."""
    number = min(cdiv(count, ROWS), cdiv(PROGRAMS, max(tiles, 1)))
    return number, cdiv(count, max(number, 1))


def sum_rows(rows: torch.Tensor, out: torch.Tensor) -> None:
    """out = rows.sum(0) of [count, width] whose columns lie side by side, added up in fp32 in a fixed order."""
    count, width = rows.shape
    partials = rows.new_empty(chunks(count, cdiv(width, COLUMNS))[0], width, dtype=torch.float32)
    partial_sums(rows, partials)
    sum_partials(partials, out)


def partial_sums(rows: torch.Tensor, partials: torch.Tensor) -> None:
    """partials[i] = the sum of the i-th of len(partials) chunks of rows."""
    (count, width), number = rows.shape, partials.shape[0]
    _partial_sums_kernel[(number, cdiv(width, COLUMNS))](
        rows, partials, count, cdiv(count, max(number, 1)), rows.stride(0), width, ROWS, COLUMNS, **TILE_OPTIONS
    )


def sum_partials(partials: torch.Tensor, out: torch.Tensor) -> None:
    """out = partials.sum(0) of fp32 [chunks, ...], of each as many as out has, always in the same order."""
    (number, *_), size = partials.shape, out.numel()
    _sum_partials_kernel[(cdiv(size, PARTIALS["COLUMNS"]),)](
        partials, out, number, partials.stride(0), size, **PARTIALS
    )


@jit(do_not_specialize=["count", "per_chunk"])
def _partial_sums_kernel(
    rows_ptr, partials_ptr, count, per_chunk, stride, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    chunk = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((chunk + 1) * per_chunk, count)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(chunk * per_chunk, end, ROWS):
        t = start + tl.arange(0, ROWS)
        inside = (t < end)[:, None] & (d < width)[None, :]
        at = t.to(tl.int64)[:, None] * stride + d[None, :]
        total += tl.load(rows_ptr + at, mask=inside, other=0).to(tl.float32)
    tl.store(partials_ptr + chunk.to(tl.int64) * width + d, tl.sum(total, 0), mask=d < width)


@jit(do_not_specialize=["count", "size"])
def _sum_partials_kernel(partials_ptr, out_ptr, count, stride, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (d < size)[None, :]
        total += tl.load(partials_ptr + row.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0)
    tl.store(out_ptr + d, tl.sum(total, 0), mask=d < size)


VALUES, VALUES_OPTIONS = 4096, {"num_warps": 8, "num_stages": 1}


def sum_values(values: torch.Tensor, out: torch.Tensor) -> None:
    """out = values.sum() of a contiguous fp64 vector as one fp32 number, always in the same order."""
    _sum_values_kernel[(1,)](values, out, values.shape[0], VALUES, **VALUES_OPTIONS)


@jit(do_not_specialize=["count"])
def _sum_values_kernel(values_ptr, out_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values_ptr + i, mask=i < count, other=0)
    tl.store(out_ptr, tl.sum(total, 0).to(tl.float32))


def sum_values_resources():
    """The kernel above."""
    pointers = {"values_ptr": "*fp64", "out_ptr": "*fp32", "count": "i32"}
    yield Resource("sum_values", _sum_values_kernel, pointers, {"BLOCK": VALUES}, VALUES_OPTIONS)


GROUP_TILE, GROUP_COLUMNS = 2048, 512


def sum_groups(rows: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, out: torch.Tensor) -> None:
    """out[g] = sum of rows[order[i]] for i in starts[g] .. starts[g + 1], in fp32; without any it is zero."""
    groups, width = out.shape
    block = min(next_power_of_2(width), GROUP_COLUMNS)
    _sum_groups_kernel[(groups, cdiv(width, block))](
        rows, order, starts, out, width, GROUP_TILE // block, block, **TILE_OPTIONS
    )


@jit()
def _sum_groups_kernel(
    rows_ptr, order_ptr, starts_ptr, out_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(starts_ptr + group + 1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.load(starts_ptr + group), end, ROWS):
        i = start + tl.arange(0, ROWS)
        row = tl.load(order_ptr + i, mask=i < end, other=0).to(tl.int64)
        inside = (i < end)[:, None] & (d < WIDTH)[None, :]
        total += tl.load(rows_ptr + row[:, None] * WIDTH + d[None, :], mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + group * WIDTH + d, tl.sum(total, 0), mask=d < WIDTH)


def sum_resources(width: int, dtype: torch.dtype):
    """The kernels above for rows of this width and dtype."""
    block = min(next_power_of_2(width), GROUP_COLUMNS)
    pointers = {"rows_ptr": element(dtype), "order_ptr": "*i64", "starts_ptr": "*i32", "out_ptr": element(dtype)}
    constants = {"WIDTH": width, "ROWS": GROUP_TILE // block, "BLOCK": block}
    yield Resource(
        f"sum_groups {width} {str(dtype).removeprefix('torch.')}", _sum_groups_kernel, pointers, constants, TILE_OPTIONS
    )
    pointers = {"partials_ptr": "*fp32", "out_ptr": "*fp32", "count": "i32", "stride": "i32:16", "size": "i32"}
    constants = {"ROWS": PARTIALS["ROWS"], "COLUMNS": PARTIALS["COLUMNS"]}
    yield Resource("sum_partials", _sum_partials_kernel, pointers, constants, {"num_warps": 8, "num_stages": 1})
    pointers = {"rows_ptr": element(dtype), "partials_ptr": "*fp32", "stride": "i32:16", "width": "i32:16"}
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    yield Resource(
        f"partial_sums {str(dtype).removeprefix('torch.')}",
        _partial_sums_kernel,
        pointers | {"count": "i32", "per_chunk": "i32"},
        constants,
        TILE_OPTIONS,
    )


@triton.jit
def load_or_zero(ptr, offsets, mask):
    """fp32 values; zeros where the mask is off, and everywhere for a pointer that is None."""
    if ptr is None:
        return tl.zeros(mask.shape, tl.float32)
    else:
        return tl.load(ptr + offsets, mask=mask, other=0).to(tl.float32)


FAR = tl.constexpr(2.0**-80)


@triton.jit
def inverse_root(x, count, eps):
    """1 / sqrt(sum(x^2) / count + eps) of a row, or of each of some rows; where the squares overflow, of a row so much
    smaller."""
    axis: tl.constexpr = len(x.shape) - 1
    squares = tl.sum(x * x, axis)
    root = tl.rsqrt(squares / count + eps)
    if (tl.max(squares, 0) if axis else squares) == float("inf"):
        small = x * FAR
        root = tl.where(squares == float("inf"), tl.rsqrt(tl.sum(small * small, axis) / count) * FAR, root)
    return root


@triton.jit
def sequence_of(cu_ptr, count, row, BLOCK: tl.constexpr = 128):
    """The sequence that a row, or each of some, belongs to: as many as end at or before it; `count` past the last."""
    each = row[:, None] if len(row.shape) else row
    ended = tl.zeros([BLOCK], tl.int32) + (each * 0).to(tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        ended += (tl.load(cu_ptr + 1 + at, mask=at < count, other=2147483647) <= each).to(tl.int32)
    return tl.sum(ended, len(row.shape))


if INTERPRETED:
    from triton.runtime import interpreter

    def _bounds_from_tensors(patch_lang_tensor):
        # Triton 3.6's interpreter makes a loop's bound by int(array of one element), which NumPy 2.4 refuses.
        def patched(tensor, scope):
            patch_lang_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        return patched

    def _bfloat16_by_rounding(cast_impl):
        # It cuts the low half of a float32 off to make a bfloat16, where every GPU rounds to nearest even.
        def patched(self, source, dtype):
            if source.dtype.scalar.is_floating() and source.dtype.scalar != dtype.scalar == tl.bfloat16:
                rounded = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
                return interpreter.TensorHandle(rounded, tl.bfloat16)
            return cast_impl(self, source, dtype)

        return patched

    def _sums_in_order(self, a, b, d, input_precision, max_num_imprecise_acc):
        # It multiplies by BLAS, where the order of a sum depends on the place of its element, and on which factor is
        # left. On a GPU it does not.
        products = a.data.T[:, :, None] * b.data[:, None, :]
        return interpreter.TensorHandle(products.sum(0) + d.data, d.dtype.scalar)

    def _patched_once(call):
        # For every call inside a kernel it patches triton.language again, as the kernel's launch has: milliseconds.
        seen = set()

        def patched(self, *args, **kwargs):
            module = id(self.fn.__globals__)
            if module in seen:
                return self.rewrite()(*args, **kwargs)
            seen.add(module)
            return call(self, *args, **kwargs)

        return patched

    interpreter._patch_lang_tensor = _bounds_from_tensors(interpreter._patch_lang_tensor)
    interpreter.InterpreterBuilder.cast_impl = _bfloat16_by_rounding(interpreter.InterpreterBuilder.cast_impl)
    interpreter.InterpreterBuilder.create_dot = _sums_in_order
    interpreter.InterpretedFunction.__call__ = _patched_once(interpreter.InterpretedFunction.__call__)
