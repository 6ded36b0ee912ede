"""Every op against its reference: random calls, then calls of which one argument is hostile. On each instruction set.

The draws are the same in every run; M3AE_FAST_FUZZ=10000 asks for more of them than 40 a test.
"""

import collections
import contextlib
import inspect
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import m3ae_fast
from m3ae_fast import SeqLens, testing
from tests.ops import random_calls
from tests.ops.test_extremes import FACTORS, Results, rounding

pytestmark = pytest.mark.exhaustive

EXAMPLES = int(os.environ.get("M3AE_FAST_FUZZ", "40"))
seeded = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # calls are small: to make one that fails smaller takes minutes
)
OTHERS = 3  # more calls, of which eager PyTorch's error counts too


def backends_of(op):
    return op.__name__.removesuffix("_qkvpacked")


OPS = [op for op in random_calls.OPS if "cpp" in testing.impls(backends_of(op))]
NAMES = [op.__name__ for op in OPS]


def shown(arguments):
    def each(x):
        if isinstance(x, torch.Tensor):
            kind = str(x.dtype).removeprefix("torch.") + (f" {x.device}" if x.device.type != "cpu" else "")
            if x.layout != torch.strided:
                return f"sparse {kind}{list(x.shape)}"
            values = "" if x.is_floating_point() or x.numel() > 12 or x.device.type != "cpu" else f" {x.tolist()}"
            return f"{kind}{list(x.shape)} of strides {list(x.stride())}{values}" + " leaf" * x.requires_grad
        return repr(x)

    return ", ".join(f"{name}={each(value)}" for name, value in arguments.items())


@contextlib.contextmanager
def instruction_set(name):
    from m3ae_fast._cpp import _C

    before = _C.active_isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


def references(call):
    """How eager PyTorch computes a call, and the call in fp64. There is no truth beyond fp64: eager is fp32 then."""
    options = call.kwargs | ({"dtype": torch.float64} if isinstance(call.kwargs.get("dtype"), torch.dtype) else {})
    eager = call.map(lambda x: x.float() if x.dtype == torch.float64 else x)
    return eager, testing.Call(call.args, options).to(torch.float64)


def others(call):
    """Calls with other values of about the same size: eager PyTorch is not lucky in all of them."""
    generator = torch.Generator().manual_seed(0)

    def varied(x):
        return (x.double() * (0.5 + torch.rand(x.shape, generator=generator, dtype=torch.float64))).to(x.dtype)

    return [call.map(varied) for _ in range(OTHERS)]


def run(call, function, impl):
    """(outputs, gradients), zeros for what the result does not hang on."""
    outputs = [x for x in pytree.tree_leaves(function(*call.args, **call.kwargs, impl=impl)) if x is not None]
    attached = [x for x in outputs if x.requires_grad]
    cotangents = [testing.cotangent(x) for x in attached]
    gradients = torch.autograd.grad(attached, call.leaves(), cotangents, materialize_grads=True) if attached else ()
    return [x.detach() for x in outputs], list(gradients)


def eager_and_true(function, call):
    """Of this call and of others like it."""
    runs = ([run(x, function, "reference") for x in references(each)] for each in (call, *others(call)))
    return zip(*runs, strict=True)


def together(runs):
    """Each output and gradient, of all runs; the others' in the first one's dtype."""
    parts = [zip(*part, strict=True) for part in zip(*runs, strict=True)]
    return [[torch.cat([x.flatten().to(each[0].dtype) for x in each]) for each in part] for part in parts]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("op", OPS, ids=NAMES)
@seeded
@given(data=st.data())
def test_valid_calls(op, data):
    function = getattr(m3ae_fast, op.__name__)
    arguments = op(random_calls.Parts(data.draw, testing.dtypes("cpp", backends_of(op))))
    note(shown(arguments))
    call = testing.Call((), arguments)
    eager, truth = eager_and_true(function, call)
    for isa in testing.isas():
        note(isa)
        with instruction_set(isa):
            ours = run(call, function, "cpp")
        assert [[x.shape for x in part] for part in ours] == [[x.shape for x in part] for part in eager[0]]
        results = map(together, ((ours, *truth[1:]), eager, truth))
        for kind, factor, *triple in zip(("output", "gradient"), FACTORS, *results, strict=True):
            for i, each in enumerate(zip(*triple, strict=True)):
                testing.assert_error_rule(f"{kind} {i}", *each, factor)


# torch's own words, of tensors that do not fit into memory and of a layout that most of its functions do not take
TORCH_SAYS = ("can't allocate memory", "unsupported memory format", "for sparse tensors", "doesn't have storage")
OBJECT = object()
SCALARS = (
    None, True, 0, -1, 3, 2**31, 2**32 + 1, 2**63, 2**100, 0.5, float("nan"), float("inf"), -1e308, 1j, "mean", b"",
    OBJECT, torch.float16, torch.int32, torch.device("meta"), (), [], [-1], [2**40], ["x"], {}, SeqLens([1]),
)  # fmt: skip
OF_TENSORS = {
    "None": lambda x: None,
    "a list": lambda x: x.tolist(),
    "as an array": lambda x: x.detach().to(torch.float64).numpy(),
    "a dimension more": lambda x: x.unsqueeze(0),
    "a dimension less": lambda x: x.flatten() if x.dim() > 1 else x.sum(),
    "none of the last dimension": lambda x: x[..., :0],
    "the last dimension less one": lambda x: x[..., :-1],
    "the last dimension twice": lambda x: torch.cat([x, x], -1),
    "the first dimension less one": lambda x: x[1:],
    "the first dimension twice": lambda x: torch.cat([x, x]),
    "turned": lambda x: x.transpose(0, -1),
    "backwards": lambda x: x.flip(0),
    "huge": lambda x: x.new_zeros(1).expand(*[1] * (x.dim() - 1), 2**32 + 1),
    "huge first": lambda x: x.new_zeros(1).expand(2**32 + 1, *x.shape[1:]),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.detach().to_sparse(),
    "int16": lambda x: x.to(torch.int16),
    "bool": lambda x: x.bool(),
    "int64": lambda x: x.long(),
    "float32": lambda x: x.float(),
    "float16": lambda x: x.half(),
    "float64": lambda x: x.double(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    **{f"all {value}": lambda x, v=value: torch.full_like(x, v) for value in (0, -1, 1000)},
    **{f"the last one {value}": lambda x, v=value: last(x, v) for value in (-1, -(2**31), 2**31 - 1, 2**32 + 1)},
    "NaN": lambda x: last(x.float(), float("nan")),
    "infinite": lambda x: last(x.float(), float("inf")),
}


def last(x, value):
    x = x.detach().clone()
    if x.numel():
        x.view(-1)[-1] = value
    return x


@st.composite
def hostile(draw, op):
    """(What was done, a call of which one argument, given or not, was replaced)"""
    arguments = op(random_calls.Parts(draw, testing.dtypes("cpp", backends_of(op))))
    parameters = set(inspect.signature(getattr(m3ae_fast, op.__name__)).parameters) - {"impl", "device"}
    name = draw(st.sampled_from(sorted(parameters)))
    value = arguments.get(name)
    if isinstance(value, SeqLens):
        value = value.cu
    if isinstance(value, torch.Tensor) and draw(st.sampled_from((True, True, True, False))):
        how = draw(st.sampled_from(sorted(OF_TENSORS)))
        try:
            value = OF_TENSORS[how](value)
        except (RuntimeError, OverflowError, TypeError, IndexError):
            how, value = "an object", OBJECT  # no such tensor can be made
    else:
        value = draw(st.sampled_from(SCALARS))
        how = repr(value)
    if how in ("NaN", "infinite"):
        arguments.pop("return_accuracy", None)  # eager PyTorch takes a logit of NaN for the largest, kernels do not
    return f"{name}: {how}", arguments | {name: value}


def outcome(function, call):
    """Refused in words, or taken as the reference takes it."""
    try:
        ours = run(call, function, "cpp")
    except (ValueError, TypeError) as error:
        assert str(error), "refused without a word"
        return "refused"
    except MemoryError:
        return "refused"
    except RuntimeError as error:
        if any(words in str(error) for words in TORCH_SAYS):
            return "refused"
        raise
    try:
        eager, truth = eager_and_true(function, call)
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            return "taken, and too large for the reference"
        raise
    assert [[x.shape for x in part] for part in ours] == [[x.shape for x in part] for part in eager[0]]
    dtype = max((x.dtype for x in call.tensors() if x.is_floating_point()), key=rounding, default=torch.float32)
    results = []
    for factor, *triple in zip(FACTORS, *map(together, ((ours, *truth[1:]), eager, truth)), strict=True):
        for each in zip(*triple, strict=True):
            if each[0].is_floating_point():
                results.append(Results(factor, None, dtype, *each))  # None: sizes are not such that sums overflow
            else:
                assert torch.equal(*each[:2])
    sound = all(each.sound for each in results)
    faults = [each.fault(sound) for each in results]
    assert not any(faults), faults
    return "taken"


def hostile_calls(name):
    """In a process of its own, with little memory and 30 seconds a call. The last call printed is the one at fault."""
    import resource  # Unix's alone

    op, outcomes = dict(zip(NAMES, OPS, strict=True))[name], collections.Counter()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, -1))

    @seeded
    @given(hostile(op), st.sampled_from(testing.isas()))
    def fuzz(call, isa):
        what, arguments = call
        print(f"{isa}: {name}({shown(arguments)}): {what}", flush=True)
        signal.alarm(30)
        with instruction_set(isa):
            outcomes[outcome(getattr(m3ae_fast, name), testing.Call((), arguments))] += 1

    fuzz()
    print(dict(outcomes))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited as Linux does it")
@pytest.mark.parametrize("name", NAMES)
def test_hostile_calls(name, python, request):
    root = str(request.path.parents[2])
    code = f"import sys; sys.path.append({root!r})\nfrom tests.ops import test_fuzz\ntest_fuzz.hostile_calls({name!r})"
    done = python(code)
    assert done.returncode == 0, f"{done.returncode} after {done.stdout.splitlines()[-1:]}\n{done.stderr[-3000:]}"
