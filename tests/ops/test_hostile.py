"""Wrong arguments where no check has looked before: an exception, never a crash, nor a number made of foreign memory.

What is tried here runs in a process of its own: a fault would take all tests with it.
"""

import itertools
import resource
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import m3ae_fast
from m3ae_fast import SeqLens, _backends, testing
from tests.ops.record import Record

OPS = sorted(op for op in _backends.LOADED if "cpp" in testing.impls(op))
HOSTILE = (-(2**31), -7, 10**6, 2**31 - 1)
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError, AttributeError, KeyError, MemoryError)


def integers(call):
    """The index tensors of a call, those of its SeqLens among them, as NumPy sees them."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    tensors = [x.cu if isinstance(x, SeqLens) else x for x in leaves if isinstance(x, (SeqLens, torch.Tensor))]
    return [x.numpy() for x in tensors if x.dtype in (torch.int32, torch.int64) and x.numel()]


def changed_before_backward(op):
    """Each index tensor is written to between forward and backward: autograd does not see it."""
    tried = 0
    for case in testing.cases(op).SMALL:
        call = testing.cases(op).make(case)
        arrays = integers(call)
        for array, value, some in itertools.product(arrays, HOSTILE, (slice(None), slice(-1, None))):
            if not call.leaves():
                continue
            outputs = pytree.tree_leaves(getattr(m3ae_fast, op)(*call.args, **call.kwargs, impl="cpp"))
            attached = [x for x in outputs if x.requires_grad]
            cotangents = [torch.ones_like(x) for x in attached]
            expected = torch.autograd.grad(attached, call.leaves(), cotangents, retain_graph=True)
            kept, tried = array.copy(), tried + 1
            array[some] = value
            try:
                gradients = torch.autograd.grad(attached, call.leaves(), cotangents)
            except ValueError:
                continue  # as it should be
            finally:
                array[:] = kept
            assert all(map(torch.equal, gradients, expected)), f"{op} {case}: {value} taken, {array.shape}"
    return tried


def limit_memory(more):
    """From here on an allocation that takes the process beyond so many bytes more fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, -1))


def misfits(x):
    """(Values that fit an argument's place, but not its neighbors; whether they must be refused.)"""
    if isinstance(x, torch.Tensor):
        yield x.unsqueeze(0), True
        yield x.flatten()[:0], x.dim() > 1
        if x.dim():
            yield x[..., :0], False
            yield x[..., :-1].contiguous(), False
            yield x[: x.shape[0] // 2], False
            yield torch.cat([x, x[-1:]]), False
            yield x.new_empty(1).expand(*[1] * (x.dim() - 1), 2**33), True
        yield x.to(torch.int16), True
        if x.dtype in (torch.int32, torch.int64):
            for value in HOSTILE:
                yield torch.full_like(x, value), False
        yield None, False
    elif isinstance(x, (bool, str, torch.dtype)) or x is None:
        return
    elif isinstance(x, int):
        for value in (0, -1, 2**31, 2**62, -(2**62)):
            yield value, False
    elif isinstance(x, list):
        yield [], len(x) > 0
        yield [*x, *x[:1]], len(x) > 0


def shapes_that_disagree(op):
    """Every registered operator of an op, an argument at a time."""
    if sys.platform.startswith("linux"):
        limit_memory(2**30)  # tables of 2^31 rows are refused, whatever the machine would give
    tried = 0
    for case in testing.cases(op).SMALL:
        with Record() as record:
            testing.cases(op).make(case).run(getattr(m3ae_fast, op), impl="cpp")
        for func, args, _ in record.calls:
            args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            empty = any(isinstance(x, torch.Tensor) and not x.numel() for x in args)
            for i in range(1, len(args)):
                for value, wrong in misfits(args[i]):
                    tried += 1
                    try:
                        func(*args[:i], value, *args[i + 1 :])
                    except REFUSALS:
                        continue
                    name = func._schema.arguments[i].name
                    shown = tuple(value.shape) if isinstance(value, torch.Tensor) else value
                    assert empty or not wrong, f"{func}: {name} {shown} taken in {case}"
    return tried


INDEXED = [op for op in OPS if any(map(integers, (testing.cases(op).make(c) for c in testing.cases(op).SMALL)))]


@pytest.mark.parametrize(
    ("op", "attempt"),
    [(op, "changed_before_backward") for op in INDEXED if op != "sample_mask"]  # which has no backward
    + [(op, "shapes_that_disagree") for op in OPS],
)
def test_hostile(op, attempt, python, request):
    root = str(request.path.parents[2])
    done = python(
        f"import sys; sys.path.append({root!r})\n"
        f"from tests.ops import test_hostile\nprint(test_hostile.{attempt}({op!r}))"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 0, "nothing was tried"


OUT_OF_MEMORY = """
import resource
import torch
import m3ae_fast
from m3ae_fast._cpp import _C

torch.set_num_threads(2)
_C.sample_mask(**{small})
cu, keep, ids = (torch.tensor(x) for x in ([0, 2**26, 2**27], [0, 0, 0], [0, 1]))
large = dict(cu=cu.int(), cu_keep=keep.int(), sample_ids=ids, seed=0, step=0, stream=0, shared=False)
large |= dict(ids_keep=torch.empty(0, dtype=torch.int32), ids_mask=torch.empty(2**27, dtype=torch.int32))
side = 2**11
images, pred = torch.zeros(2, 1, side, side), torch.zeros(2, side * side)
patches = dict(ids_mask=torch.zeros(2, dtype=torch.int32), cu_mask=torch.tensor([0, 1, 2]), patch_size=side)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, -1))
for call in (lambda: _C.sample_mask(**large), lambda: m3ae_fast.masked_mse(pred, images, **patches, impl="cpp")):
    try:
        call()
    except MemoryError:
        print("out of memory")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(m3ae_fast.masked_mse(pred, images, **patches, impl="cpp").item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited as Linux does it")
@pytest.mark.skipif(
    "cpp" not in testing.impls("masked_mse"), reason="the compiled module is missing, or not tested here"
)
def test_memory_that_runs_out_in_a_kernel_s_threads_is_an_error(python):
    """In the threads of a kernel an exception would end the process."""
    small = (
        "dict(cu=torch.tensor([0, 64, 128]).int(), cu_keep=torch.zeros(3).int(), sample_ids=torch.arange(2), seed=0, "
    )
    small += "step=0, stream=0, shared=False, ids_keep=torch.empty(0).int(), ids_mask=torch.empty(128).int())"
    done = python(OUT_OF_MEMORY.replace("{small}", small), OMP_NUM_THREADS="2")
    assert done.stdout.split("\n")[:3] == ["out of memory", "out of memory", "0.0"], done.stderr[-2000:]
