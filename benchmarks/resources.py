"""Registers, spills, shared memory and tensor-core instructions of every GPU kernel, without a GPU.

python -m benchmarks.resources [--arch sm_80,sm_90] [--op layer_norm] compiles the Triton kernels. It fails where one
spills or is a trap (its sums do not fit sm_100's tensor memory), where the instruction that it means is missing, or
where an exact one holds a fused multiply-add. What is compiled is what each backend's resources() declares
(m3ae_fast/_triton.py).

python -m benchmarks.resources --cuda [--op layer_norm] reads the compiled module m3ae_fast._cuda. It fails where a
kernel spills, and where one of attention runs outside the tensor cores.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

PRODUCTS = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
LARGE = {90: "wgmma", 100: "tcgen05"}  # the instruction for tiles of 64 rows and more; elsewhere "mma"
ARCHS = "sm_80,sm_90,sm_100,sm_120"


def backends(op: str | None):
    """(op, its Triton backend) of every op that has one."""
    import m3ae_fast.ops

    for folder in sorted(Path(m3ae_fast.ops.__path__[0]).iterdir()):
        if (folder / "triton_backend.py").exists() and op in (None, folder.name):
            yield folder.name, importlib.import_module(f"m3ae_fast.ops.{folder.name}.triton_backend")


def compile_for(resource, capability: int):
    """The compiled kernel, with pointers and the integers that say so aligned to 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = resource.kernel.arg_names
    missing = [n for n in names if n not in resource.signature and n not in resource.constexprs]
    if missing:
        raise SystemExit(f"{resource.name}: resources() names no type for {', '.join(missing)}")
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in resource.constexprs:
            signature[name] = "constexpr"
            continue
        kind = resource.signature[name]
        if not isinstance(kind, tuple):
            kind, _, divisor = kind.partition(":")
            if kind.startswith("*") or divisor == "16":
                attributes[(i,)] = [["tt.divisibility", 16]]
        signature[name] = kind
    source = ASTSource(fn=resource.kernel, signature=signature, constexprs=resource.constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=resource.options)


def cuobjdump(path: str | Path, *options: str) -> str:
    """What it prints of a file; Triton's package holds it."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


def numbers(text: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of a kernel."""
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return numbers(cuobjdump(file.name, "-res-usage"))


class CudaKernel(NamedTuple):
    """One kernel of the compiled module for one architecture."""

    arch: str
    name: str  # with its template arguments, without namespaces and parameters
    used: dict[str, int]
    tensor_cores: bool

    def complaints(self) -> list[str]:
        """Why it fails the check."""
        spilled = self.used["STACK"] + self.used["LOCAL"]
        return [f"spills {spilled} bytes"] * (spilled > 0) + ["no tensor-core instruction"] * (
            self.name.startswith("varlen_attention") and not self.tensor_cores
        )


def cuda_kernels(module: str | Path) -> list[CudaKernel]:
    """Every kernel in the machine code of a compiled module."""
    kernels, arch = [], ""
    for line in cuobjdump(module, "-res-usage").splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif line.startswith(" Function "):
            mangled = line.removeprefix(" Function ").rstrip(":")
        elif "REG:" in line:
            kernels.append((arch, mangled, numbers(line)))
    products = set()
    for line in cuobjdump(module, "-sass").splitlines():
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = ")
        elif "Function :" in line:
            mangled = line.partition(":")[2].strip()
        elif re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", line):
            products.add((arch, mangled))
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(name for _, name, _ in kernels), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        CudaKernel(arch, re.sub(r"(\(anonymous namespace\)|\b\w+)::", "", name), used, (arch, mangled) in products)
        for (arch, mangled, used), name in zip(kernels, names, strict=True)
    ]


def show_cuda(op: str | None) -> int:
    """Print the compiled module's table; how many kernels failed."""
    import m3ae_fast._cuda

    failed = 0
    print(f"{'arch':<9}{'kernel':<72}{'regs':>6}{'spill':>7}{'shared':>8}  tensor cores")
    for kernel in sorted(cuda_kernels(m3ae_fast._cuda.__file__), key=lambda each: (each.name, each.arch)):
        if not kernel.name.startswith(op or ""):
            continue
        wrong, used = kernel.complaints(), kernel.used
        failed += bool(wrong)
        print(
            f"{kernel.arch:<9}{kernel.name:<72}{used['REG']:>6}{used['STACK'] + used['LOCAL']:>7}{used['SHARED']:>8}  "
            f"{'mma' if kernel.tensor_cores else '-'}{'   FAILED: ' + '; '.join(wrong) if wrong else ''}"
        )
    return failed


def complaints(resource, capability: int, used: dict[str, int], ptx: str, found: set[str]) -> list[str]:
    """Why this kernel fails the check."""
    out = []
    if used["STACK"] or used["LOCAL"]:
        out.append(f"spills {used['STACK'] + used['LOCAL']} bytes")
    if "trap;" in ptx:
        out.append("is a trap")
    if resource.instruction == "mma" and not found:
        out.append("no tensor-core instruction")
    meant = LARGE.get(capability, "mma")
    if resource.instruction == "wgmma" and meant not in found:
        out.append(f"no {meant}")
    fused = len(re.findall(r"\bfma\.rn", ptx))
    if resource.options.get("enable_fp_fusion") is False and fused:
        out.append(f"{fused} fused multiply-adds")
    return out


def main() -> None:
    """Print a table; exit 1 with complaints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=ARCHS, help=f"comma-separated; default {ARCHS}")
    parser.add_argument("--op", help="one op alone")
    parser.add_argument("--cuda", action="store_true", help="the compiled CUDA module instead")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        sys.exit("Triton is not installed: pip install '.[test]' brings it on Linux")
    failed = show_cuda(options.op) if options.cuda else show_triton(options.op, options.arch.split(","))
    if failed:
        sys.exit(f"{failed} kernels failed")


def show_triton(only: str | None, archs: list[str]) -> int:
    """Compile, and print the table; how many kernels failed."""
    os.environ.pop("TRITON_INTERPRET", None)  # read at import: an interpreted kernel cannot be compiled
    failed = 0
    print(f"{'arch':<7}{'kernel':<58}{'warps':>6}{'regs':>6}{'spill':>7}{'shared':>8}  tensor cores")
    for op, backend in backends(only):
        if not hasattr(backend, "resources"):
            sys.exit(f"{op}: triton_backend.py declares no resources()")
        for resource in backend.resources():
            for arch in archs:
                if resource.architecture not in (None, arch):
                    continue
                capability = int(arch.removeprefix("sm_"))
                compiled = compile_for(resource, capability)
                used, ptx = usage(compiled.asm["cubin"]), compiled.asm["ptx"]
                found = {name for name, pattern in PRODUCTS.items() if re.search(pattern, ptx)}
                wrong = complaints(resource, capability, used, ptx, found)
                failed += bool(wrong)
                print(
                    f"{arch:<7}{resource.name:<58}{compiled.metadata.num_warps:>6}{used['REG']:>6}"
                    f"{used['STACK'] + used['LOCAL']:>7}{compiled.metadata.shared:>8}  {' '.join(sorted(found)) or '-'}"
                    f"{'   FAILED: ' + '; '.join(wrong) if wrong else ''}",
                    flush=True,
                )
    return failed


if __name__ == "__main__":
    main()
