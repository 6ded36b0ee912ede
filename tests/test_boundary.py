"""Where Python meets the kernels: what a binding refuses, and which calls do without torch's dispatcher."""

import ast
import runpy
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import m3ae_fast
from m3ae_fast import _backends, testing
from m3ae_fast.ops.layer_norm import op

_C = pytest.importorskip("m3ae_fast._cpp")._C


def arguments(**changes):
    given = {"x": torch.ones(4, 8), "residual": None, "weight": torch.ones(8), "bias": None, "eps": 1e-6}
    return given | {"y": torch.empty(4, 8), "s": None, "stats": torch.empty(2, 4)} | changes


REFUSED = {
    "sizes": (dict(y=torch.empty(4, 7)), r"y must have shape \(4, 8\), got \(4, 7\)"),
    "rank": (dict(weight=torch.ones(1, 8)), r"weight must have shape \(8,\), got \(1, 8\)"),
    "dtype": (dict(stats=torch.empty(2, 4).double()), "stats must be of dtype float32, got float64"),
    "integers": (dict(weight=torch.ones(8).int()), "weight must be of dtype float32, got int32"),
    "integer rows": (dict(x=torch.ones(4, 8).int()), "x must be of dtype float32, got int32"),
    "strides": (dict(y=torch.empty(8, 4).t()), r"y must be contiguous, got strides \(1, 4\)"),
    "None": (dict(y=None), "y must be a tensor, got None"),
    "no memory": (dict(y=torch._efficientzerotensor(4, 8)), "y must have memory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_binding_names_the_argument_it_refuses(what):
    changes, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        _C.layer_norm(**arguments(**changes))


def test_a_binding_takes_tensors_by_name():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.layer_norm(**arguments(x=3.0))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.layer_norm(*arguments().values())


class Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.name())
        return func(*args, **(kwargs or {}))


def test_only_calls_that_somebody_watches_pass_the_dispatcher():
    x, weight = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    with mock.patch.object(op._layer_norm, "registered", wraps=op._layer_norm.registered) as registered:
        expected = m3ae_fast.layer_norm(x, weight, None)
        assert not registered.called
        with Mode():
            assert torch.equal(m3ae_fast.layer_norm(x, weight, None), expected)
        assert registered.call_count == 1
        with torch.profiler.profile() as profile:
            m3ae_fast.layer_norm(x, weight, None)
        assert registered.call_count == 2
    assert "m3ae_fast::layer_norm" in {event.key for event in profile.key_averages()}


def test_who_watches_the_backward_pass_alone_sees_it():
    """What the forward pass found is not what the backward pass may do."""
    x, weight = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    watched, alone = (m3ae_fast.layer_norm(x, weight, None) for _ in range(2))
    with Mode() as mode:
        (gradient,) = torch.autograd.grad(watched.sum(), weight)
    assert "m3ae_fast::layer_norm_backward" in mode.called
    with Mode():
        watched = m3ae_fast.layer_norm(x, weight, None)
    with mock.patch.object(
        op._layer_norm_backward, "registered", wraps=op._layer_norm_backward.registered
    ) as registered:
        for y in (watched, alone):
            assert torch.equal(torch.autograd.grad(y.sum(), weight)[0], gradient)
    assert not registered.called


@pytest.mark.parametrize("op", [op for op in sorted(_backends.LOADED) if getattr(testing.cases(op), "LOSS", False)])
def test_a_loss_is_one_call(op):
    """Weights of rows, sums and checks are the kernel's work: each torch call beside it costs microseconds."""
    call = testing.cases(op).make(testing.cases(op).SMALL[0])
    with torch.no_grad(), Mode() as mode:
        getattr(m3ae_fast, op)(*call.args, **call.kwargs, impl="cpp")
    assert mode.called - {"aten::new_empty", "aten::detach"} == {f"m3ae_fast::{op}"}


def test_a_view_that_is_yet_to_be_negated():
    x = torch.randn(4, 8)
    assert torch.equal(m3ae_fast.layer_norm(torch._neg_view(x), None, None), m3ae_fast.layer_norm(-x, None, None))


def test_what_a_transformation_left_behind():
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(torch.randn(4, 8))
    m3ae_fast.layer_norm(left[0], None, None)


def test_the_stub_of_the_compiled_module_is_up_to_date():
    path = Path(__file__).parents[1] / ".ci/stubs.py"
    made = runpy.run_path(str(path))["stub"](_C)
    written = (Path(__file__).parents[1] / "m3ae_fast/_C.pyi").read_text(encoding="utf-8")
    assert ast.dump(ast.parse(made)) == ast.dump(ast.parse(written)), "run: python .ci/stubs.py"
