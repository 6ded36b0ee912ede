"""What every op owes, on every backend x instruction set x case x dtype. An op is here because it is loaded.

Where torch sees a GPU, the backends that run there are tested on it too, at real sizes as well: `-k cuda`.
"""

import contextlib
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import m3ae_fast
from m3ae_fast import _backends, testing
from tests.ops.record import Record

OPS = sorted(_backends.LOADED)
PAIRS = [(op, impl, device) for device in testing.devices() for op in OPS for impl in testing.impls(op, device)]
MIXES = 6 if _backends.TESTED else 50  # of lengths: an interpreter takes a second for each
CASES = [(*pair, case) for pair in PAIRS for case in testing.cases(pair[0]).SMALL]
FIRST = [(*pair, testing.cases(pair[0]).SMALL[0]) for pair in PAIRS]
REAL = [(*pair, case) for pair in PAIRS if pair[2] == "cuda" for case in testing.cases(pair[0]).REAL]
WITH_FP64 = [each for each in FIRST if torch.float64 in testing.dtypes(each[1], each[0])]
THREADED = [each for each in CASES if each[1] == "cpp"]

pytestmark = pytest.mark.usefixtures("poison")


def make(op, impl, case, seed=0):
    """A call in float32, or in the first dtype of a backend that leaves float32 to others."""
    return testing.cases(op).make(case, testing.dtypes(impl, op)[0], seed)


def function(op):
    return getattr(m3ae_fast, op)


def bits(results):
    leaves = pytree.tree_leaves(results)  # a scalar has no dimension to view as bytes: it gets one
    return [torch.atleast_1d(x).contiguous().view(torch.uint8) if x.is_floating_point() else x for x in leaves]


def assert_same_bits(a, b):
    assert all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


@pytest.mark.parametrize(
    ("op", "impl", "device", "case", "dtype"),
    [(*each, dtype) for each in CASES + REAL for dtype in testing.dtypes(each[1], each[0])],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_error_rule(op, impl, device, case, dtype, isa):
    call = testing.cases(op).make(case, dtype).on(device)
    ours = call.run(function(op), impl=impl)
    # There is no truth beyond fp64 to measure fp64 eager PyTorch against: its error is that of fp32, scaled.
    eager = call.to(torch.float32) if dtype == torch.float64 else call
    references = (each.run(function(op), impl="reference") for each in (eager, call.to(torch.float64)))
    testing.assert_error_rules(ours, *references)


@pytest.mark.parametrize(("op", "impl", "device", "case"), WITH_FP64)
def test_gradcheck(op, impl, device, case, isa):
    call = testing.cases(op).make(case, torch.float64).on(device)
    leaves = call.leaves()
    if not leaves:
        pytest.skip(f"{op} has no gradient")

    def run(*values):
        replacement = dict(zip(map(id, leaves), values, strict=True))
        args, kwargs = pytree.tree_map(lambda x: replacement.get(id(x), x), (call.args, call.kwargs))
        out = function(op)(*args, **kwargs, impl=impl)
        return tuple(x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad)

    torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize(("op", "impl", "device", "case"), FIRST if _backends.TESTED else CASES)
def test_opcheck(op, impl, device, case):
    call = make(op, impl, case).on(device)
    with Record() as record:
        call.run(function(op), impl=impl)
    assert record.calls, f"{op} called no registered operator"
    for func, args, kwargs in record.calls:
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.detach(), (args, kwargs))
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize(("op", "impl", "device", "case"), THREADED)
@pytest.mark.usefixtures("own_products")
def test_thread_counts_give_the_same_bits(op, impl, device, case, threads):
    call = make(op, impl, case).on(device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(call.run(function(op), impl=impl))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize(("op", "impl", "device", "case"), FIRST if _backends.TESTED else CASES + REAL)
def test_two_runs_give_the_same_bits(op, impl, device, case):
    call = make(op, impl, case).on(device)
    assert_same_bits(call.run(function(op), impl=impl), call.run(function(op), impl=impl))


@pytest.mark.parametrize(("op", "impl", "device", "case"), [each for each in CASES if _backends.EMULATED])
def test_the_order_of_threads_changes_nothing(op, impl, device, case):
    """Between two barriers the emulator runs them one after the other: a missing barrier shows in one of the orders."""
    import _cuda_emulated

    call = make(op, impl, case).on(device)
    ascending = call.run(function(op), impl=impl)
    _cuda_emulated.reverse(True)
    try:
        assert_same_bits(ascending, call.run(function(op), impl=impl))
    finally:
        _cuda_emulated.reverse(False)


@pytest.mark.parametrize(("op", "impl", "device", "case"), CASES)
def test_strided_inputs(op, impl, device, case):
    """Every second element of a tensor full of NaN gives the same bits as the tensor itself."""

    def strided(x):
        return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]

    call = make(op, impl, case).on(device)
    assert_same_bits(call.run(function(op), impl=impl), call.map(strided).run(function(op), impl=impl))


WITHOUT_FP64 = [
    each
    for each in CASES
    if (each in FIRST or each[3] == "residual") and torch.float64 not in testing.dtypes(each[1], each[0])
]


@pytest.mark.parametrize(("op", "impl", "device", "case"), WITHOUT_FP64)
def test_one_fp64_argument_is_refused_or_taken_right(op, impl, device, case):
    """A backend that takes no fp64 must not read it as something else where it comes beside another dtype."""
    call = testing.cases(op).make(case, testing.dtypes(impl, op)[0]).on(device)
    for i in range(sum(x.is_floating_point() for x in call.tensors())):
        number = itertools.count()
        mixed = call.map(lambda x, i=i, number=number: x.double() if next(number) == i else x)
        try:
            outputs, _ = mixed.run(function(op), impl=impl)
        except ValueError as error:
            assert "float64" in str(error)
            continue
        eager, truth = (each.run(function(op), impl="reference")[0] for each in (mixed, mixed.to(torch.float64)))
        for results in zip(outputs, eager, truth, strict=True):
            testing.assert_error_rule(f"argument {i} fp64", *results, factor=2)


@pytest.mark.parametrize(("op", "impl", "device", "case"), CASES)
def test_tensors_that_are_not_aligned(op, impl, device, case):
    """Views that begin an element after an allocation does: what moves sixteen bytes at a time has to notice."""
    call = testing.cases(op).make(case, testing.dtypes(impl, op)[0]).on(device)
    ours = call.map(lambda x: testing.moved(x, 1)).run(function(op), impl=impl)
    references = (each.run(function(op), impl="reference") for each in (call, call.to(torch.float64)))
    testing.assert_error_rules(ours, *references)


@pytest.mark.parametrize(("op", "impl", "device", "case"), CASES)
def test_strided_and_expanded_grad_outputs(op, impl, device, case):
    """autograd hands over gradients of any strides, zero ones among them; gradcheck never does."""
    call = make(op, impl, case).on(device)
    if not call.leaves():
        pytest.skip(f"{op} has no gradient")

    def gradients(make):
        out = function(op)(*call.args, **call.kwargs, impl=impl)
        attached = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]
        return torch.autograd.grad(attached, call.leaves(), [make(x) for x in attached])

    ones = gradients(torch.ones_like)
    assert_same_bits(ones, gradients(lambda x: torch.ones((), dtype=x.dtype).expand(x.shape)))
    plain = gradients(testing.cotangent)
    with_holes = gradients(lambda x: torch.stack([testing.cotangent(x)] * 2, dim=-1)[..., 1])
    assert_same_bits(plain, with_holes)


@pytest.mark.parametrize(("op", "impl", "device", "case"), FIRST)
def test_compiles_whole_and_at_most_twice(op, impl, device, case):
    """fullgraph, dynamic, forward and backward: at most two compilations over all length mixes, the same bits."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function(op), backend=counter, fullgraph=True, dynamic=True)
    with deterministic_off():
        for seed in range(MIXES):
            call = make(op, impl, case, seed).on(device)
            assert_same_bits(call.run(compiled, impl=impl), call.run(function(op), impl=impl))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("op", "impl", "device", "case"), FIRST)
def test_compiles_without_gradients(op, impl, device, case):
    torch._dynamo.reset()
    compiled = torch.compile(function(op), backend="aot_eager", fullgraph=True, dynamic=True)
    call = make(op, impl, case).on(device)
    with deterministic_off(), torch.no_grad():
        assert_same_bits(
            compiled(*call.args, **call.kwargs, impl=impl), function(op)(*call.args, **call.kwargs, impl=impl)
        )


@contextlib.contextmanager
def deterministic_off():
    """NaN-filled torch.empty would be traced into the graph as a fill: not what users compile."""
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


@pytest.mark.parametrize("op", OPS)
def test_an_explicit_impl_is_obeyed_or_refused(op):
    call = testing.cases(op).make(testing.cases(op).SMALL[0])
    with pytest.raises(ValueError, match="impl must be one of"):
        function(op)(*call.args, **call.kwargs, impl="fastest")
    with pytest.raises(ValueError, match=f"impl='cuda' cannot run {op}"):
        function(op)(*call.args, **call.kwargs, impl="cuda")


LOSSES = [each for each in FIRST if getattr(testing.cases(each[0]), "LOSS", False)]


@pytest.mark.parametrize(("op", "impl", "device", "case"), LOSSES)
def test_losses_may_be_scaled_in_place(op, impl, device, case):
    call = make(op, impl, case).on(device)

    def loss():
        return pytree.tree_leaves(function(op)(*call.args, **call.kwargs, impl=impl))[0]

    expected = torch.autograd.grad((loss() / 2).sum(), call.leaves())
    halved = loss()
    halved /= 2
    assert all(map(torch.equal, torch.autograd.grad(halved.sum(), call.leaves()), expected))


@pytest.mark.parametrize(("op", "impl", "device", "case"), FIRST)
def test_a_second_derivative_is_refused(op, impl, device, case):
    """Gradients are made by kernels, which autograd cannot see into: an error, never a wrong number."""
    call = make(op, impl, case).on(device)
    if not call.leaves() or impl == "reference":
        pytest.skip(f"{op} has no gradient of its own here")
    out = function(op)(*call.args, **call.kwargs, impl=impl)
    attached = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]
    total = sum((x * x).sum() for x in attached)
    gradients = torch.autograd.grad(total, call.leaves(), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative: .* impl='reference'"):
        sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize(("op", "impl", "device", "case"), FIRST)
def test_no_second_derivative_is_lost(op, impl, device, case):
    """Where the gradient that comes in is a constant, too: what torch's once_differentiable lets pass in silence."""
    call = make(op, impl, case).on(device)
    if not call.leaves() or impl == "reference":
        pytest.skip(f"{op} has no gradient of its own here")

    def gradients(impl):
        out = function(op)(*call.args, **call.kwargs, impl=impl)
        attached = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]
        return torch.autograd.grad(attached, call.leaves(), list(map(testing.cotangent, attached)), create_graph=True)

    theirs = sum(g.square().sum() for g in gradients("reference"))
    seconds = torch.autograd.grad(theirs, call.leaves(), materialize_grads=True) if theirs.requires_grad else ()
    if any(second.any() for second in seconds):
        with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
            sum(g.square().sum() for g in gradients(impl)).backward()


BEYOND = 2**32 + 1  # as int32 it would read as 1


@pytest.mark.parametrize("impl", [None, "reference"])
def test_ids_beyond_int32_do_not_wrap(impl):
    seqlens, images = m3ae_fast.SeqLens([2]), torch.zeros(1, 3, 8, 8)
    bad, rows = torch.tensor([BEYOND, 1]), torch.ones(2, 4)
    with pytest.raises(ValueError, match="target must"):
        m3ae_fast.linear_cross_entropy(rows, torch.ones(3, 4), bad, impl=impl)
    with pytest.raises(ValueError, match="ids must"):
        m3ae_fast.gather_patches(images, bad, seqlens, patch_size=4, impl=impl)
    with pytest.raises(ValueError, match="rows must"):
        m3ae_fast.restore_tokens(rows, bad, torch.tensor([-1, -1]), impl=impl)


@pytest.mark.parametrize("cu", [[2, 4], [0, 3, 1, 4], [0, 2, 50]])
def test_offsets_of_a_loss_must_fit(cu):
    x, target = torch.ones(4, 4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to at most 4 rows"):
        m3ae_fast.linear_cross_entropy(
            x, torch.ones(3, 4), target, reduction="sample_mean", cu_seqlens=torch.tensor(cu)
        )
