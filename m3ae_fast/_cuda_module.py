"""The compiled CUDA module, or its emulation on CPU tensors (M3AE_FAST_EMULATE=1), and where its kernels run."""

import torch
from torch import Tensor

from m3ae_fast._backends import EMULATED

try:
    if EMULATED:
        import _cuda_emulated as _cuda  # CMake's build folder is on the path: CONTRIBUTING.md
    else:
        import m3ae_fast._cuda as _cuda
except ImportError as error:
    raise ImportError(
        f"the compiled module {'_cuda_emulated' if EMULATED else 'm3ae_fast._cuda'} cannot be imported ({error}); "
        "`pip install .` builds the CUDA kernels where it finds nvcc and a GPU, or with CMAKE_ARGS=-DM3AE_CUDA=ON"
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
    return max(min(-(-count // 64), 256 * 512 // max(row_bytes, 512)), 1)


def tile_counters(number: int, width: int) -> int:
    """What `counters` is asked for where each tile of columns, 32 at least, has `number` partial sums."""
    return -(-width // 32) * _cuda.sum_counters(number)


def counters(like: Tensor, count: int) -> tuple[int, Tensor | None]:
    """Counters by which the blocks of one launch find out who is last: zeros, left zero. (address, owner or None):
    the owner has to live until the launch. None for a count of 0.

    They are the module's own memory, a row for each stream, and for each stream of a CUDA graph while it is captured.
    That is safe because the launches of a stream follow one another, those of a graph's stream too, and a graph never
    runs beside itself; so nothing is ever filled with zeros, in a graph either. A tensor kept for good would not do:
    torch.compile(mode="reduce-overhead") warms up in its graphs' memory pool, and takes back what it does not know of.
    Where rows run out, after 256 streams and graphs, or are too short, a launch gets zeros of its own.
    """
    if count == 0:
        return 0, None
    at = _cuda.counters(*place(like), count)
    if at:
        return at, None
    owner = like.new_zeros(count, dtype=torch.int32)
    return owner.data_ptr(), owner
