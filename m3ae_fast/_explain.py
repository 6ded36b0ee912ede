"""m3ae_fast.explain(): what runs, and why."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from m3ae_fast import _backends

try:
    __version__ = importlib.metadata.version("m3ae_fast")
except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def cuda_module() -> str:
    """What the compiled CUDA module says of itself."""
    if importlib.util.find_spec("m3ae_fast._cuda") is None:
        return "not built (no NVIDIA GPU, no nvcc, or M3AE_CUDA=OFF, when the package was built)"
    try:
        from m3ae_fast import _cuda
    except ImportError as error:
        return f"built, but cannot be imported: {error}"
    if torch.cuda.is_available() and not _cuda.device_count():
        return "built with a newer CUDA than this machine's driver runs"
    version = f"{_cuda.runtime_version // 1000}.{_cuda.runtime_version % 1000 // 10}"
    return f'built with CUDA {version}; unverified, never run on a GPU: its kernels run where impl="cuda" asks for them'


def explain() -> str:
    """A readable report: versions, instruction set, threads, and, for every op, which backend runs where and why.

    The same text as `m3ae-fast info`.
    """
    try:
        from m3ae_fast._cpp import _C

        forced = os.environ.get("M3AE_FAST_ISA")
        why = f"M3AE_FAST_ISA={forced}" if forced else "the best of " + ", ".join(_C.available_isas())
        cpu = [f"instruction set   {_C.active_isa()} ({why})"]
        missing = {isa: why for isa, why in _C.unavailable_isas().items() if "emulated" not in isa}
        cpu += [f"                  not {isa}: {why}" for isa, why in missing.items()]
        sharing = "OpenMP" if _C.openmp else "built without OpenMP"
        cpu.append(f"threads           {_C.num_threads()} ({sharing}; torch has {torch.get_num_threads()})")
        forced = os.environ.get("M3AE_FAST_PRODUCTS")
        why = f" (M3AE_FAST_PRODUCTS={forced})" if forced else ""
        cpu.append(f"products          {_backends.LOADED['linear']['cpp'].library()}{why}")
    except ImportError as error:
        cpu = [f"compiled module   missing: {error}"]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    lines = [
        f"m3ae_fast         {__version__}",
        f"torch             {torch.__version__}, Python {platform.python_version()}, {platform.machine()}",
        *cpu,
        f"CUDA module       {cuda_module()}",
        f"GPU               {gpu}",
        f"M3AE_FAST_IMPL    {_backends._FORCED or 'not set: the preferred backend of the device'}",
        "",
        f"{'op':<24}{'CPU runs':<12}{'GPU runs':<12}backends",
    ]
    remarks: dict[str, list[str]] = {}  # what is said of several ops is said once
    for op, backends in sorted(_backends.LOADED.items()):
        runs = {device: _runs(backends, device) for device in _backends.PREFERENCE}
        runs["cuda"] = runs["cuda"] if torch.cuda.is_available() else "-"
        lines.append(f"{op:<24}{runs['cpu']:<12}{runs['cuda']:<12}{', '.join(['reference', *backends.modules])}")
        said = ["cpp is slower than PyTorch without vector instructions"] if backends.slow else []
        said += [f"{impl} is unavailable: {reason}" for impl, reason in backends.reasons.items()]
        for remark in said + backends.remarks:
            remarks.setdefault(remark, []).append(op)
    for remark, ops in remarks.items():
        lines += ["", remark, f"    ({len(ops)} ops: {', '.join(ops)})" if len(ops) > 1 else f"    ({ops[0]})"]
    return "\n".join(lines)


def _runs(backends: _backends.Backends, device: str) -> str:
    """The backend that None takes there for float32; "refused" where the one that is forced cannot."""
    can = [name for name in backends.preferred(device) if backends.refusal(name, device, torch.float32) is None]
    impl = _backends._FORCED or (can[0] if can else "reference")
    return "refused" if impl != "reference" and backends.refusal(impl, device, torch.float32) else impl
