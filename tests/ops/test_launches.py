"""m3ae_fast/_triton.py launches the kernels that Triton would launch, with the same arguments.

No GPU is needed: nothing is run (benchmarks/stub_gpu.py).
"""

import importlib.util
import os
from pathlib import Path

import pytest

import m3ae_fast
from m3ae_fast import _backends

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(_backends.INTERPRETED, reason="Triton's interpreter launches nothing"),
]

STUB = """
from unittest import mock

from benchmarks import stub_gpu
driver = stub_gpu.install()

import torch
from triton import knobs
from triton.runtime.jit import JITFunction, KernelInterface

import m3ae_fast
from m3ae_fast import _triton, testing

launches, by_triton = [], []
driver.launch = lambda *given: launches.append(given)
run, short = JITFunction.run, _triton.Kernel.__getitem__

def counted(self, *args, **options):
    by_triton.append(self)
    return run(self, *args, **options)

JITFunction.run = counted

def described(x):
    return (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) if isinstance(x, torch.Tensor) else (type(x), x)

def launched(function, getitem=short):
    '''What reaches the driver: grid, stream, function, options; the arguments.'''
    launches.clear()
    by_triton.clear()
    _triton.Kernel.__getitem__ = getitem
    function()
    return [(given[:10], [described(x) for x in given[13:]]) for given in launches]
"""

OPS = """
for op in {ops}:
    total = 0
    for case in testing.cases(op).SMALL:
        for dtype in (torch.float32, torch.bfloat16):
            call = testing.cases(op).make(case, dtype)
            def run_op():
                call.run(getattr(m3ae_fast, op), impl="triton")
            first = launched(run_op)
            again = launched(run_op)
            assert not by_triton, (op, case, dtype)
            assert first == again == launched(run_op, KernelInterface.__getitem__), (op, case, dtype)
            assert len(by_triton) == len(first)
            total += len(first)
    assert total > 0, op
"""

SPECIALIZED = """
from m3ae_fast.ops.linear import triton_backend

x = torch.zeros(64)
BASE = dict(dy=x, z=x, dz=x, partials=x, count=5, width=17, per_chunk=3)
device, options = 0, {"num_warps": 4}
driver.get_current_device = lambda: device

def launch(constants=(False, 16, 128), **changed):
    triton_backend._backward_kernel[(2, 1)](*(BASE | changed).values(), *constants, **options)

def function(getitem=short, **changed):
    return launched(lambda: launch(**changed), getitem)[0][0][4]

CHANGES = [  # each before the next: what one kept may not serve the other
    {}, dict(dy=x[1:]), dict(partials=x[1:]), dict(dy=x[1:], partials=x[1:]), dict(dy=x[4:]),
    dict(dy=x.bfloat16()), dict(dy=x.bfloat16()[1:]), dict(partials=None), dict(z=x[1:], partials=None), dict(z=x[1:]),
    dict(z=x[1:], dz=x[1:]),
    dict(width=1), dict(width=16), dict(width=48), dict(width=2**31), dict(width=2**31 + 1), dict(width=2**31 - 1),
    dict(count=1), dict(count=16), dict(count=2**31), dict(count=-1), dict(count=-2**31), dict(count=-2**31 - 1),
    dict(constants=(False, 16, 64)), dict(constants=(True, 16, 128)),
]
functions = []
for device in (0, 1):
    for options in ({"num_warps": 4}, {"num_warps": 8}):
        ours = [function(**each) for each in CHANGES]
        assert ours == [function(KernelInterface.__getitem__, **each) for each in CHANGES]
        for each, expected in zip(CHANGES, ours):
            assert function(**each) == expected and not by_triton
        functions += ours
device, options = 0, {"num_warps": 4}
different = [{}, dict(dy=x[1:]), dict(partials=None), dict(dy=x.bfloat16())]
different += [dict(width=width) for width in (1, 16, 2**31)]
assert len({function(**each) for each in different}) == len(different)
same = [{}, dict(dy=x[4:]), dict(count=1), dict(count=16), dict(width=2**31 - 1)]
assert len({function(**each) for each in same}) == 1
assert len(set(functions)) % 4 == 0 and not set(functions[: len(CHANGES)]) & set(functions[len(CHANGES) :])

launched(launch)
assert not by_triton and launches[0][:4] == (2, 1, 1, 0)
driver.get_current_stream = lambda device: 7
launched(launch)
assert not by_triton and launches[0][3] == 7
"""

ELSEWHERE = """
from torch.utils._python_dispatch import TorchDispatchMode

class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})

def streams(op, device):
    torch.Tensor.get_device = lambda self: device
    call = testing.cases(op).make(testing.cases(op).SMALL[0])
    called = launched(lambda: call.run(getattr(m3ae_fast, op), impl="triton"))
    assert called and driver.device == 0, op
    return {given[3] for given, _ in called}

for op in {ops}:
    assert streams(op, -1) == streams(op, 0) == {0}, op
    assert streams(op, 1) == {1}, op
    with Dispatched():
        assert streams(op, 1) == {1}, op
"""

WATCHED = """
kernel, x = _triton._sum_values_kernel, torch.zeros(64, dtype=torch.float64)

def launch():
    kernel[(1,)](x, x, 64, 4096, num_warps=8)

def plainly():
    '''Whether Triton launches.'''
    launched(launch)
    return len(launches) == len(by_triton) == 1

assert plainly() and not plainly()  # the first compiles
usual = launches[0][4]
seen = []
for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
    hooks.add(seen.append)
    assert plainly() and launches[0][11:13] == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    assert launches[0][10].get()["name"] == "_sum_values_kernel"
    hooks.remove(seen.append)
    assert not plainly()
with knobs.runtime.scope():
    knobs.runtime.launch_enter_hook = seen.append
    assert plainly() and launches[0][11] == seen.append
with knobs.runtime.scope():
    knobs.runtime.debug = True
    assert plainly() and launches[0][4] != usual
assert not plainly() and launches[0][4] == usual
with knobs.runtime.scope():
    knobs.runtime.add_stages_inspection_hook = seen.append
    assert plainly()
kernel.add_pre_run_hook(lambda *args, **options: seen.append(args))
assert plainly() and seen == [(x, x, 64, 4096)]
kernel.pre_run_hooks.clear()
assert not plainly()
assert type(_triton.jit()(kernel.fn)) is _triton.Kernel
with mock.patch("triton.__version__", "3.99.0"):  # nobody knows what decides there
    assert type(_triton.jit()(kernel.fn)) is JITFunction
refused = None
try:
    kernel[(1,)](x, x, "64", 4096)
except TypeError as error:
    refused = str(error)
assert refused == "count must be a tensor, a number, a tuple or None, got <class 'str'>"
"""


@pytest.fixture
def succeeds(python):
    """succeeds(code): it does, in a process of its own with a GPU's stub."""

    def run(code):
        roots = (Path(m3ae_fast.__file__).parents[1], Path(__file__).parents[2])
        done = python(STUB + code, PYTHONPATH=os.pathsep.join(map(str, roots)))
        assert done.returncode == 0, done.stderr

    return run


def test_every_op_launches_what_triton_would(succeeds):
    ops = [op for op, backends in _backends.LOADED.items() if "triton" in (*backends.modules, *backends.reasons)]
    succeeds(OPS.replace("{ops}", repr(ops)))


def test_a_kernel_serves_no_arguments_but_those_it_is_compiled_for(succeeds):
    succeeds(SPECIALIZED)


def test_kernels_run_on_the_device_of_their_tensors(succeeds):
    ops = [op for op, backends in _backends.LOADED.items() if "triton" in (*backends.modules, *backends.reasons)]
    succeeds(ELSEWHERE.replace("{ops}", repr(ops)))


def test_triton_launches_where_launches_are_watched(succeeds):
    succeeds(WATCHED)
