"""Every launch of every Triton backend compiles as the runtime would compile it: no GPU needed, nothing is run.

The interpreter accepts what the compiler refuses, and knows nothing of the types that a launch makes of its arguments.
"""

import importlib.util

import pytest

LAUNCHES = """
import torch
torch.version.cuda = torch.version.cuda or "none: launches are compiled here, not run"
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Stub:  # in the place of CUDA's driver
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

compiled = set()
run = jit.JITFunction.run
def compile_alone(self, *args, grid, warmup, **options):
    compiled.add(run(self, *args, grid=grid, warmup=True, **options).hash)
driver.set_active(Stub())
torch.cuda.get_device_capability = lambda device=None: (9, 0)
jit.JITFunction.run = compile_alone

import m3ae_fast
from m3ae_fast import _backends, testing
devices, dtypes = _backends.RUNS_ON["triton"]
_backends.RUNS_ON["triton"] = (("cpu",), dtypes)
for op in {ops}:
    for case in testing.cases(op).SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            testing.cases(op).make(case, dtype).run(getattr(m3ae_fast, op), impl="triton")
print(len(compiled))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_launch_compiles_for_a_gpu(python):
    from m3ae_fast import _backends

    ops = [op for op, backends in _backends.LOADED.items() if "triton" in (*backends.modules, *backends.reasons)]
    done = python(LAUNCHES.replace("{ops}", repr(ops)))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2 * len(ops)
