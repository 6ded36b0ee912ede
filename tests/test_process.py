"""What holds for a whole process: environment variables, imports, threads."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import m3ae_fast
from m3ae_fast import testing

ROOT = Path(__file__).parents[1]
needs_cpp = pytest.mark.skipif(not testing.isas(), reason="the compiled module is missing")


@needs_cpp
@pytest.mark.parametrize("isa", testing.isas())
def test_an_instruction_set_can_be_forced(isa, python):
    done = python("import m3ae_fast; print(m3ae_fast.explain())", M3AE_FAST_ISA=isa)
    assert f"{isa} (M3AE_FAST_ISA={isa})" in done.stdout, done.stderr


@needs_cpp
def test_an_instruction_set_that_is_not_there_is_refused(python):
    done = python("import m3ae_fast", M3AE_FAST_ISA="avx1024")
    assert done.returncode != 0
    listed = re.findall(r"^M3AE_INSTRUCTION_SET\((\w+)", (ROOT / "csrc/cpu/isas.inc").read_text(), re.M)
    names = ", ".join(name for name in listed if not name.endswith("emulated"))
    assert re.search(f"M3AE_FAST_ISA must be one of .*{names}, got 'avx1024'", done.stderr)


@needs_cpp
def test_who_multiplies_can_be_forced(python):
    code = "import m3ae_fast; print(m3ae_fast.explain())"
    torchs, own = (python(code, M3AE_FAST_PRODUCTS=name).stdout for name in ("torch", "own"))
    assert re.search(r"^products +fp32 and bf16 and fp64 by torch's [^;]*\(M3AE_FAST_PRODUCTS=torch\)$", torchs, re.M)
    assert re.search(r"^products +fp32 and bf16 and fp64 by m3ae_fast[^;]*\(M3AE_FAST_PRODUCTS=own\)$", own, re.M)
    refused = python("import m3ae_fast", M3AE_FAST_PRODUCTS="mkl")
    assert "M3AE_FAST_PRODUCTS must be torch or own, got 'mkl'" in refused.stderr


@needs_cpp
@pytest.mark.parametrize("isa", testing.isas())
def test_loops_that_are_slower_than_torch_are_not_preferred(isa, python):
    """Without vector instructions of ours None takes PyTorch at some ops, and explain() says so; "cpp" is obeyed."""
    code = """
import torch, m3ae_fast
from m3ae_fast import _backends
for op, backends in _backends.LOADED.items():
    x = torch.ones(2, 4)
    print(op, *(_backends.pick(backends, impl, x) for impl in (None, "cpp")))
print(m3ae_fast.explain())
"""
    done = python(code, M3AE_FAST_ISA=isa)
    for op in m3ae_fast._backends.LOADED:
        slow = isa == "scalar" and op in m3ae_fast._backends.SLOW_WITHOUT_VECTORS
        runs = "reference" if slow else "cpp"
        assert f"{op} {runs} cpp\n" in done.stdout, done.stderr
        assert re.search(rf"^{op} +{runs} ", done.stdout, re.M)
        assert bool(re.search(rf"slower than PyTorch.*\n.*\b{op}\b", done.stdout)) == slow


def test_a_backend_can_be_forced_for_a_process(python):
    code = "import m3ae_fast, torch; print(m3ae_fast.restore_tokens(torch.ones(1, 4), *[torch.zeros(1).int() - 1] * 2))"
    assert python(code, M3AE_FAST_IMPL="reference").returncode == 0
    refused = python(code, M3AE_FAST_IMPL="triton")
    assert "impl='triton' cannot run restore_tokens" in refused.stderr
    unknown = python(code, M3AE_FAST_IMPL="fast")
    assert "M3AE_FAST_IMPL must be one of reference, cpp, triton, cuda, got 'fast'" in unknown.stderr


@needs_cpp
def test_torch_rules_the_threads():
    """One thread pool: torch.set_num_threads is seen by the compiled module."""
    from m3ae_fast._cpp import _C

    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            assert _C.num_threads() == count
    finally:
        torch.set_num_threads(before)


@needs_cpp
def test_one_openmp_runtime_does_the_work(python):
    """_C's parallel regions run on the runtime that torch loaded: no second pool of threads appears."""
    code = """
import torch, m3ae_fast, os
torch.set_num_threads(2)
torch.ones(1 << 22).add_(1)
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
rows = torch.arange(4096, dtype=torch.int32)
m3ae_fast.restore_tokens(torch.ones(4096, 512), rows, torch.full_like(rows, -1))
print(before, threads())
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    before, after = python(code).stdout.split()
    assert before == after


@pytest.mark.parametrize("started", ["m3ae-fast", "-m", "library"])
def test_an_interrupted_import_of_the_command_is_silent(tmp_path, started):
    """In the midst of torch's import; what imports the library gets its KeyboardInterrupt."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "m3ae-fast").write_text("from m3ae_fast.cli import main")
    command = {"m3ae-fast": ["m3ae-fast"], "-m": ["-m", "m3ae_fast"], "library": ["-c", "import m3ae_fast"]}[started]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(m3ae_fast.__file__).parents[1])])}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=60)
    assert done.returncode == -signal.SIGINT and done.stdout == ""
    assert ("KeyboardInterrupt" in done.stderr) == (started == "library") == (done.stderr != "")


def test_without_torch_the_import_says_what_to_install(python):
    done = python("import sys; sys.modules['torch'] = None; import m3ae_fast")
    assert "ModuleNotFoundError: m3ae_fast needs PyTorch: pip install torch" in done.stderr


@pytest.mark.parametrize("before", ["default_int_handler", "SIG_IGN"])
def test_a_command_that_is_imported_handles_interrupts_as_before(python, before):
    code = f"import signal, sys; sys.argv[0] = 'bin/m3ae-fast'; signal.signal(signal.SIGINT, signal.{before})\n"
    code += f"import m3ae_fast; assert signal.getsignal(signal.SIGINT) is signal.{before}"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_explain_names_every_op_and_no_gpu_that_is_not_there():
    text = m3ae_fast.explain()
    for op in m3ae_fast._backends.LOADED:
        _, _, gpu, *_ = re.search(rf"^{op} .*", text, re.M)[0].split()
        assert (gpu == "-") == (not torch.cuda.is_available())
    reasons = [reason for backends in m3ae_fast._backends.LOADED.values() for reason in backends.reasons.values()]
    for reason in reasons:
        assert text.count(reason) == 1


def test_import_needs_no_optional_package(python):
    code = """
import re
import sys
for name in ("triton", "PIL", "tokenizers", "safetensors", "tqdm", "tensorboard", "matplotlib", "xformers"):
    sys.modules[name] = None
import m3ae_fast, m3ae_fast.nn, m3ae_fast.models, m3ae_fast.convert
m3ae_fast.explain()
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@needs_cpp
@pytest.mark.skipif(sys.platform != "linux", reason="pages are counted as Linux counts them")
def test_kernels_keep_their_working_memory_and_not_too_much_of_it(python):
    code = """
import resource, torch
from m3ae_fast import varlen_attention
from m3ae_fast._cpp import _C, products

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

torch.set_num_threads(1)
x, weight, y = torch.randn(64, 512), torch.randn(1024, 512), torch.empty(64, 1024)
def product():
    of = products(torch.float32)
    _C.linear(x=x, weight=weight, bias=None, activation="", input_activation="", products=of, y=y, z=None)
product()
before = faults()
product()
print(faults() - before)  # pages; packed, the weight has 512 of them

before = resident()
q, k = torch.randn(1, 1, 64, requires_grad=True), torch.randn(150_000, 1, 64)
cu = [torch.tensor([0, n], dtype=torch.int32) for n in (1, 150_000)]
varlen_attention(q, k, k, *cu).sum().backward()  # in 73 MiB, for the gradients of as many keys
del q, k
print(resident() - before)  # MiB
"""
    done = python(code, MALLOC_MMAP_THRESHOLD_="65536")  # what is freed is gone
    pages, grown = map(float, done.stdout.split())
    assert pages < 64, done.stderr
    assert grown < 48
