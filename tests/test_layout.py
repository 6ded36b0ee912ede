"""The layout of the repository: every op has its folders, its test and its benchmark under one name."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import m3ae_fast
from m3ae_fast import _backends, downstream

ROOT = Path(__file__).parents[1]
OPS = sorted(p.parent.name for p in (ROOT / "m3ae_fast/ops").glob("*/op.py"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_found_by_its_name(op):
    assert op in _backends.LOADED and callable(getattr(m3ae_fast, op))
    for path in (
        f"m3ae_fast/ops/{op}/reference.py",
        f"m3ae_fast/ops/{op}/cases.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/ops/bench_{op}.py",
    ):
        assert (ROOT / path).exists(), path
    assert f'"{op}"' in (ROOT / "m3ae_fast/ops/__init__.py").read_text()


@pytest.mark.parametrize("task", downstream.TASKS)
def test_a_task_is_found_by_its_name(task):
    """As a function, as a command, and in the tests."""
    pytest.importorskip("m3ae_fast.train", reason="tasks need the train extra")
    module = importlib.import_module(f"m3ae_fast.downstream.tasks.{task}")
    assert getattr(downstream, task) is vars(module)[task] and callable(module.add_arguments) and callable(module.main)
    assert (ROOT / f"tests/downstream/tasks/test_{task}.py").exists()


def test_every_task_is_listed():
    modules = {path.stem for path in (ROOT / "m3ae_fast/downstream/tasks").glob("*.py")}
    assert modules == {"__init__", *downstream.TASKS}


def test_compiled_ops_are_listed_where_they_are_built():
    folders = sorted(p.name for p in (ROOT / "csrc/ops").iterdir())
    cmake = re.search(r"set\(M3AE_OPS(.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.S)[1].split()
    assert sorted(cmake) == folders
    compiled = pytest.importorskip("m3ae_fast._C")
    assert all(hasattr(compiled, op) for op in folders)
    for op in folders:
        assert op in OPS
        for suffix in (".h", ".cpp", "_kernel.cpp"):
            assert (ROOT / f"csrc/ops/{op}/{op}{suffix}").exists(), f"{op}{suffix}"


def test_cuda_kernels_and_their_backends_belong_together():
    sources = {path.parent.name for path in (ROOT / "csrc/ops").glob("*/*_cuda.cu")}
    assert all((ROOT / f"csrc/ops/{op}/{op}_cuda.cu").exists() for op in sources)  # CMake finds an op by this file
    assert sources == {path.parent.name for path in (ROOT / "m3ae_fast/ops").glob("*/cuda_backend.py")}


def test_kernels_stay_out_of_the_standard_library():
    """An inline function of the standard library, compiled for AVX-512, could be linked for every machine."""
    # constants, types, and what is always inlined
    allowed = {"cmath", "cstdint", "cstring", "immintrin.h", "limits", "type_traits"}
    for kernel in (ROOT / "csrc").rglob("*_kernel.cpp"):
        included = set(re.findall(r"#include <([^>]+)>", kernel.read_text()))
        assert included <= allowed, f"{kernel.name}: {included - allowed}"


@pytest.mark.parametrize("path", sorted((ROOT / "m3ae_fast").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_public_functions_and_classes_are_documented(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if path.name in ("cpp_backend.py", "triton_backend.py", "cuda_backend.py", "cases.py"):
                continue  # forward, backward, make: the same everywhere, described once in op.py and testing.py
            if any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list):
                continue  # the function that follows it has the docstring
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
