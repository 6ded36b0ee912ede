"""Fixtures for all tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m3ae_fast
from m3ae_fast import _backends, testing


def pytest_configure(config):
    """M3AE_FAST_REQUIRE=cpp,triton: fail, not skip, where a backend that should be here is missing."""
    for impl in filter(None, os.environ.get("M3AE_FAST_REQUIRE", "").split(",")):
        missing = {op: b.reasons[impl] for op, b in _backends.LOADED.items() if impl in b.reasons}
        if missing or not any(impl in b.modules for b in _backends.LOADED.values()):
            raise pytest.UsageError(f"M3AE_FAST_REQUIRE={impl}: not available: {missing or 'no op has it'}")


def pytest_collection_modifyitems(config, items):
    """TRITON_INTERPRET=1 is a run for the Triton backends: what does not concern them runs without it, faster. So is
    M3AE_FAST_EMULATE=1 for the CUDA kernels.

    Instruction sets are the CPU's: what runs on a GPU runs once. Without --all, the scalar set and the best one of this
    CPU are tested, and tests marked "exhaustive" are left out, except in files that the command line names.
    """
    here = config.invocation_params.dir
    named = {(here / argument.split("::")[0]).resolve() for argument in config.args}  # folders match no test's file
    kept, left = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        on_gpu_again = params.get("device") == "cuda" and params.get("isa", ISAS[0]) != ISAS[0]
        wanted = not on_gpu_again if _backends.TESTED is None else params.get("impl") == _backends.TESTED
        if not config.getoption("--all") and item.path.resolve() not in named:
            few = params.get("isa") in (None, "none", _backends.TESTED, "scalar", BEST)
            wanted = wanted and few and item.get_closest_marker("exhaustive") is None
        (kept if wanted else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_report_header(config):
    return "" if config.getoption("--all") else "the tests that matter most: --all runs every one"


BEST = next((isa for isa in reversed(testing.isas()) if "emulated" not in isa), None)
ISAS = [_backends.TESTED] if _backends.TESTED else testing.isas() or ["none"]


@pytest.fixture(params=ISAS)
def isa(request):
    """Run the test once per instruction set this build and machine have; on a GPU, interpreted and emulated once."""
    if request.param == _backends.TESTED or request.node.callspec.params.get("device") == "cuda":
        yield None
        return
    if request.param == "none":
        pytest.skip("the compiled module is missing")
    from m3ae_fast._cpp import _C

    before = _C.active_isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def own_products():
    """`linear` multiplies by our kernels, also where torch's products are faster."""
    if not testing.isas():  # no compiled module
        yield
        return
    from m3ae_fast._cpp import _C

    _C.set_products("own")
    yield
    _C.set_products(os.environ.get("M3AE_FAST_PRODUCTS", ""))


@pytest.fixture
def command_line(capsys):
    """command_line(*arguments): (status, stdout, stderr) of m3ae-fast."""
    from m3ae_fast import cli

    def call(*arguments):
        try:
            status = cli.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def poison():
    """torch.empty starts as NaN: what a kernel forgets to write shows.

    PyTorch has no deterministic form of some of the references' operations on a GPU: it warns there.
    """
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def pinned(monkeypatch):
    """A stub of page-locked memory, which takes a GPU: pinned(x) says whether a tensor lies in it."""
    pieces = {}

    def pin(x):
        copy = x.clone()
        pieces[copy.untyped_storage().data_ptr()] = copy
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return lambda x: x.untyped_storage().data_ptr() in pieces


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def python(tmp_path):
    """python(code, **environment): run code in a process of its own, on the very package that is tested here."""

    def run(code, **environment):
        # in a folder of its own: a source tree in the current one would come before the installed package
        package = str(Path(m3ae_fast.__file__).parents[1])
        env = {**os.environ, "PYTHONPATH": package, **environment}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)

    return run
