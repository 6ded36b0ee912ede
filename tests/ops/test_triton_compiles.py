"""Every launch of every Triton backend compiles as the runtime would compile it: no GPU needed, nothing is run.

The interpreter accepts what the compiler refuses, and knows nothing of the types that a launch makes of its arguments.
It also has room for every tile: a kernel must not need more tensor memory than there is, of which the compiler makes
one that is a trap. Attention's of real sizes must not spill registers; `benchmarks.resources` looks at the other ops'.
"""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive

ROOT = Path(__file__).parents[2]

LAUNCHES = """
import torch
torch.version.cuda = torch.version.cuda or "none: launches are compiled here, not run"
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Stub:  # in the place of CUDA's driver
    def get_current_target(self):
        return GPUTarget("cuda", {capability}, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0

compiled = {}
run = jit.JITFunction.run
def compile_alone(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    compiled[kernel.hash] = kernel, options
driver.set_active(Stub())
torch.cuda.get_device_capability = lambda device=None: divmod({capability}, 10)
jit.JITFunction.run = compile_alone

import m3ae_fast
from m3ae_fast import _backends, testing
devices, dtypes = _backends.RUNS_ON["triton"]
_backends.RUNS_ON["triton"] = (("cpu",), dtypes)
for op in {ops}:
    for case in testing.cases(op).SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            testing.cases(op).make(case, dtype).run(getattr(m3ae_fast, op), impl="triton")
small = set(compiled)
for length, width in ((81, 64), (81, 80), (81, 96), (81, 128), (150, 80), (150, 128)):
    q, k, v = (torch.zeros(length, 1, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    testing.Call((q, k, v, m3ae_fast.SeqLens([length]))).run(m3ae_fast.varlen_attention, impl="triton")
from benchmarks.resources import usage
for hash, (kernel, options) in compiled.items():
    used = usage(kernel.asm["cubin"])
    if "trap;" in kernel.asm["ptx"] or hash not in small and (used["STACK"] or used["LOCAL"]):
        raise SystemExit(f"{kernel.name} {options} spills {used} or is a trap")
print(len(compiled))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_launch_compiles_for_a_gpu(capability, python):
    import m3ae_fast
    from m3ae_fast import _backends

    ops = [op for op, backends in _backends.LOADED.items() if "triton" in (*backends.modules, *backends.reasons)]
    if capability != 90:
        ops = ["varlen_attention"]  # no other's tiles depend on the architecture
    path = f"{Path(m3ae_fast.__file__).parents[1]}:{ROOT}"  # ROOT: benchmarks, which is not installed
    done = python(LAUNCHES.replace("{ops}", repr(ops)).replace("{capability}", str(capability)), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2 * len(ops)
