"""What the Triton backends share: what each declares for the offline check of resources, and kernels with two callers.

A `triton_backend.py` has, beside `forward` and `backward`, a function that names its kernels at the sizes of real
models, exactly as `forward` and `backward` would launch them (take the launch options from the same table):

    def resources():
        yield Resource(
            "layer_norm m3ae_small bf16",            # the op, the case of cases.py, the dtype
            _forward_kernel,                         # the jit function
            {"x_ptr": "*bf16", "eps": "fp32", "count": "i64"},   # every argument that is no constexpr, as Triton types it
            {"residual_ptr": None, "WIDTH": 384, "BLOCK": 512},  # every other one; a pointer that is None is one of them
            {"num_warps": 4, "num_stages": 1},       # launch options
            None,                                    # or "mma", "wgmma": the tensor-core instruction that must be there
        )

`python -m benchmarks.resources` compiles each of them for sm_80 and sm_90 on a machine without a GPU and prints
registers, spills, shared memory and instructions. It fails on a spill, on "mma" without `mma.sync` (or, on sm_90,
`wgmma`), on "wgmma" without `wgmma` on sm_90 (or `mma.sync` on sm_80), and where `enable_fp_fusion` is False and a
fused multiply-add is there all the same. Pointers count as aligned to 16 bytes, as torch allocates; an integer that is
always a multiple of 16 says so: "i32:16".
"""

from __future__ import annotations

from typing import Any, NamedTuple

from m3ae_fast._backends import INTERPRETED


class Resource(NamedTuple):
    """One kernel at one real size: see above."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    instruction: str | None = None


if INTERPRETED:
    import torch
    from triton import language as tl
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

    interpreter._patch_lang_tensor = _bounds_from_tensors(interpreter._patch_lang_tensor)
    interpreter.InterpreterBuilder.cast_impl = _bfloat16_by_rounding(interpreter.InterpreterBuilder.cast_impl)
