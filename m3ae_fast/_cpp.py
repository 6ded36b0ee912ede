"""The compiled CPU module, loaded after torch and set to what is asked for (M3AE_FAST_ISA, M3AE_FAST_PRODUCTS)."""

import os

import torch  # first: see m3ae_fast/__init__.py

try:
    from m3ae_fast import _C
except ImportError as error:
    raise ImportError(
        f"the compiled module m3ae_fast._C cannot be imported ({error}); `pip install .` builds it. In a source "
        "tree that was not installed editable, run Python from another folder so that the installed package is found"
    ) from error

_C.set_isa(os.environ.get("M3AE_FAST_ISA", ""))
_C.set_products(os.environ.get("M3AE_FAST_PRODUCTS", ""))

# Private to torch, so it may be missing: what the settings below call, at a tenth of their time.
try:
    _fp32_precision = torch._C._get_fp32_precision_getter
except AttributeError:
    _fp32_precision = lambda backend, _: getattr(torch.backends, backend).matmul.fp32_precision  # noqa: E731

# _C reads a dtype from a tensor.
OF_DTYPE = {d: torch.empty(0, dtype=d, device="cpu") for d in (torch.float32, torch.bfloat16, torch.float64)}


def precision():
    """What is asked of products of fp32 tensors, by whichever of torch's settings: "bf16", where rounding to it will do
    ("medium"), "tf32", where 16 bits will ("high"), else "ieee" or "none"."""
    return _fp32_precision("mkldnn", "matmul")


def multiplies_bf16():
    """Whether an instruction set of this CPU multiplies bf16 numbers: elsewhere they become fp32 first."""
    return not {"avx512_bf16", "amx"}.isdisjoint(_C.available_isas())


def products(dtype):
    """Who multiplies matrices of this dtype now, and what: `Products` of csrc/cpu/isa.h, 0 for torch."""
    return _C.products_of(OF_DTYPE[dtype], precision())
