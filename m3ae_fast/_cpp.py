"""The compiled CPU module, loaded after torch and set to the instruction set asked for (M3AE_FAST_ISA)."""

import os

import torch  # noqa: F401  first: see m3ae_fast/__init__.py

try:
    from m3ae_fast import _C
except ImportError as error:
    raise ImportError(
        f"the compiled module m3ae_fast._C cannot be imported ({error}); `pip install .` builds it. In a source "
        "tree that was not installed editable, run Python from another folder so that the installed package is found"
    ) from error

_C.set_isa(os.environ.get("M3AE_FAST_ISA", ""))
