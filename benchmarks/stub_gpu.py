"""A GPU without a GPU: Triton compiles and launches as it does on an H100, and nothing runs.

Everything on the host is Triton's own: binder, caches, compiler, the Python part of the launcher. What would call
CUDA's driver does nothing, so what a kernel writes stays as torch.empty made it. `install` also makes m3ae_fast take
its Triton backends for CPU tensors; torch's own operations run on them, on the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

CAPABILITY = (9, 0)
SHARED_BYTES = 227 << 10  # of a block, as a launch may ask for them
ARGUMENTS = 13  # of a launch, before those of the kernel: grid, stream, function, options, scratch, metadata, hooks


class Launch(NamedTuple):
    """What the driver would have been asked for."""

    grid: tuple[int, int, int]
    function: int  # a number for each compiled kernel
    arguments: tuple  # the kernel's, constants among them


class StubDriver:
    """In the place of CUDA's driver."""

    def __init__(self):
        self.utils = self
        self.calls: list[Launch] | None = None  # a list while calls are recorded
        self.functions = itertools.count(1)
        self.device = 0  # the current one

    def get_current_device(self) -> int:
        return self.device

    def exchange_device(self, device: int) -> int:
        """Make it the current one, for the one that was."""
        self.device, before = device, self.device
        return before

    def get_current_stream(self, device: int) -> int:
        """A number for each device, 0 for the first."""
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """(module, function, registers, spills, the most threads of a block)."""
        function = next(self.functions)
        return function, function, 0, 0, 1024

    def launcher_cls(self, src, metadata) -> nvidia.CudaLauncher:
        """Triton's own launcher, whose C part is `launch`."""
        compiled = types.SimpleNamespace(launch=self.launch)
        with mock.patch.multiple(nvidia, compile_module_from_src=lambda **_: compiled, library_dirs=list):
            return nvidia.CudaLauncher(src, metadata)

    def launch(self, *given) -> None:
        """What calls cuLaunchKernelEx elsewhere."""
        if self.calls is not None:
            self.calls.append(Launch(given[:3], given[4], given[ARGUMENTS:]))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """with driver.recording() as calls: every launch inside is appended to `calls`."""
        self.calls = calls = []
        try:
            yield calls
        finally:
            self.calls = None


def install() -> StubDriver:
    """Make this process one with a GPU. m3ae_fast must not be imported yet: it asks for one while it is."""
    if "m3ae_fast" in sys.modules:
        raise RuntimeError("the GPU must be there before m3ae_fast is imported")
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    torch.version.cuda = torch.version.cuda or "none"
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.current_device = driver.get_current_device
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = driver.exchange_device  # of torch.cuda.device

    from m3ae_fast import _autograd, _backends, _checks
    from m3ae_fast.models import masking
    from m3ae_fast.ops import sample_mask

    _backends.RUNS_ON["triton"] = (("cpu", "cuda"), _backends.RUNS_ON["triton"][1])
    _backends.PREFERENCE["cpu"] = _backends.PREFERENCE["cuda"]
    # What is done to CPU tensors alone: looking at indices, and scaling a gradient in place.
    _checks.offsets = _checks.within = lambda *args, **options: None
    _autograd.keep_graph = lambda: True
    # Masks are drawn on the host in training, too, and what draws them must.
    masking.sample_mask = lambda *args, **options: sample_mask(*args, **options, impl="cpp")
    return driver
