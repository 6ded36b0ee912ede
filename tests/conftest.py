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
    """TRITON_INTERPRET=1 is a run for the Triton backends: what does not concern them runs without it, faster."""
    if not _backends.INTERPRETED:
        return
    triton = [i for i in items if hasattr(i, "callspec") and i.callspec.params.get("impl") == "triton"]
    config.hook.pytest_deselected(items=[i for i in items if i not in triton])
    items[:] = triton


@pytest.fixture(params=["interpreter"] if _backends.INTERPRETED else testing.isas() or ["none"])
def isa(request):
    """Run the test once per instruction set this build and machine have; in Triton's interpreter just once."""
    if request.param == "interpreter":
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
def poison():
    """torch.empty starts as NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
