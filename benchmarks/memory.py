"""Peak memory beyond what must be there: the host's in a process of its own, a GPU's by the allocator's account."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import measure

ROOT = Path(__file__).parents[1]


def peak_beyond(function: Callable, *args) -> int:
    """Bytes of resident memory that `run` adds at its peak, less `owned`.

    Args:
        function: function(*args) -> (run, owned), of a module of `benchmarks`: what is called three times, and bytes of
            what its caller keeps anyway and that did not exist before (gradients).

    Raises:
        RuntimeError: the process failed, or this is not Linux (whose /proc gives the peak).
    """
    module = function.__module__
    if module == "__main__":
        module = sys.modules[module].__spec__.name  # by which the other process finds it
    command = [sys.executable, __file__, f"{module}:{function.__name__}", json.dumps(args)]
    # glibc would keep much of what is freed, in holes: what is measured then is its heap, not what the step holds.
    path = os.pathsep.join([*sys.path, str(ROOT)])  # what this process can import, and `benchmarks`
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "PYTHONPATH": path}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
    return int(result.stdout.split()[-1])


def peak_on_gpu(run: Callable[[], object], owned: int) -> int:
    """Bytes of GPU memory that `run` adds at its peak, less `owned`, as torch's allocator counts them."""
    run()  # what is allocated once is there
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - owned


def peak(run: Callable[[], object], owned: int, function: Callable, *args) -> int:
    """Bytes that a step adds at its peak, less what is owned, on the device that is measured: on a GPU of `run`, else
    of `function` (see peak_beyond), which says itself what is owned."""
    return peak_on_gpu(run, owned) if measure.SETTINGS.gpu else peak_beyond(function, *args)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def main(function: str, args: str) -> None:
    module, _, name = function.partition(":")
    run, owned = getattr(importlib.import_module(module), name)(*json.loads(args))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    for _ in range(3):
        run()
    print(resident("VmHWM") - before - owned)


if __name__ == "__main__":
    main(*sys.argv[1:])
