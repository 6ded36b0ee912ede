"""The compiled CUDA module, or its emulation on CPU tensors (M3AE_FAST_EMULATE=1), and where its kernels run."""

import torch
from torch import Tensor

from m3ae_fast._backends import EMULATED

try:
    if EMULATED:
        import _cuda_emulated as _cuda  # CMake's build folder is on the path: CONTRIBUTING.md
    else:
        import m3ae_fast._cuda as _cuda  # noqa: F401  for the backends
except ImportError as error:
    raise ImportError(
        f"the compiled module {'_cuda_emulated' if EMULATED else 'm3ae_fast._cuda'} cannot be imported ({error}); "
        "`pip install .` builds the CUDA kernels where it finds nvcc"
    ) from error


def place(tensor: Tensor) -> tuple[int, int]:
    """What every kernel takes last: the tensor's device and torch's current stream there."""
    if EMULATED:
        return 0, 0
    device = tensor.device.index
    return device, torch._C._cuda_getCurrentRawStream(device)


def chunks(count: int, row_bytes: int) -> int:
    """Partial sums of a sum over rows whose blocks take 512 bytes each of a row: about 256 blocks in all, two a
    multiprocessor of an H200, and 64 rows of each at least. The same for a shape and dtype, whatever the machine."""
    return min(-(-count // 64), max(256 * 512 // max(row_bytes, 1), 1))
