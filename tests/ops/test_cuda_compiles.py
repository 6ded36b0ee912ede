"""What nvcc made of every CUDA kernel, read from the compiled module: no GPU needed, nothing is run."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.exhaustive

ARCHS = {"sm_80", "sm_90a", "sm_100a"}
ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("m3ae_fast._cuda") is None, reason="built without nvcc")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton, whose cuobjdump is used, is missing")
def test_no_kernel_spills_and_attention_runs_on_tensor_cores():
    import m3ae_fast._cuda

    from benchmarks import resources

    kernels = resources.cuda_kernels(m3ae_fast._cuda.__file__)
    assert not [(k.arch, k.name, k.complaints()) for k in kernels if k.complaints()]
    archs = {k.arch for k in kernels}
    assert archs and archs <= ARCHS
    for op in {path.parent.name for path in (ROOT / "csrc/ops").glob("*/*_cuda.cu")}:
        assert {k.arch for k in kernels if k.name.startswith(op)} == archs, op
    # all that the test above can see would be seen: kernels have registers, and not all of them products
    assert all(k.used["REG"] > 0 for k in kernels) and not all(k.tensor_cores for k in kernels)
