"""Where the type of a result depends on an argument, overloads say so, and they take what the function takes."""

import inspect
import typing

import pytest

import m3ae_fast
from m3ae_fast.integrations import flash_attn

if not hasattr(typing, "get_overloads"):
    pytest.skip("typing.get_overloads is of Python 3.11", allow_module_level=True)

FUNCTIONS = [
    *(getattr(m3ae_fast, name) for name in m3ae_fast.__all__),
    *(value for name, value in vars(flash_attn).items() if name.startswith("flash_attn_")),
]
DEPENDS = [
    f
    for f in FUNCTIONS
    if inspect.isfunction(f)
    and any(p.startswith("return_") or p == "residual" for p in inspect.signature(f).parameters)
]


def test_functions_are_found():
    assert {"layer_norm", "linear_cross_entropy", "flash_attn_varlen_func"} <= {each.__name__ for each in DEPENDS}


@pytest.mark.parametrize("function", DEPENDS, ids=lambda function: function.__name__)
def test_overloads_take_what_the_function_takes(function):
    overloads = typing.get_overloads(function)
    assert len({typing.get_type_hints(each)["return"] for each in overloads}) >= 2
    taken = inspect.signature(function).parameters
    for overload in overloads:
        parameters = inspect.signature(overload).parameters
        assert list(parameters) == list(taken)
        for name, parameter in parameters.items():
            assert parameter.default in (taken[name].default, parameter.empty), name
