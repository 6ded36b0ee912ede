"""Registers, spills, shared memory and tensor-core instructions of every Triton kernel, compiled without a GPU.

python -m benchmarks.resources [--arch sm_80,sm_90] [--op layer_norm] fails where a kernel spills, where the
instruction that it means is missing, or where an exact one holds a fused multiply-add. What is compiled is what each
backend's resources() declares (m3ae_fast/_triton.py).
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

PRODUCTS = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async"}


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


def usage(cubin: bytes) -> dict[str, int]:
    """What cuobjdump says of the one kernel: REG, STACK, SHARED, LOCAL."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def complaints(resource, capability: int, used: dict[str, int], found: set[str], fused: int) -> list[str]:
    """Why this kernel fails the check."""
    out = []
    if used["STACK"] or used["LOCAL"]:
        out.append(f"spills {used['STACK'] + used['LOCAL']} bytes")
    if resource.instruction == "mma" and not found:
        out.append("no tensor-core instruction")
    meant = "wgmma" if capability >= 90 else "mma"
    if resource.instruction == "wgmma" and meant not in found:
        out.append(f"no {meant}")
    if resource.options.get("enable_fp_fusion") is False and fused:
        out.append(f"{fused} fused multiply-adds")
    return out


def main() -> None:
    """Print the table; exit 1 with complaints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_80,sm_90", help="comma-separated; default sm_80,sm_90")
    parser.add_argument("--op", help="one op alone")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        sys.exit("Triton is not installed: pip install '.[test]' brings it on Linux")
    os.environ.pop("TRITON_INTERPRET", None)  # read at import: an interpreted kernel cannot be compiled
    failed = 0
    print(f"{'arch':<7}{'kernel':<58}{'warps':>6}{'regs':>6}{'spill':>7}{'shared':>8}  tensor cores")
    for op, backend in backends(options.op):
        if not hasattr(backend, "resources"):
            sys.exit(f"{op}: triton_backend.py declares no resources()")
        for resource in backend.resources():
            for arch in options.arch.split(","):
                if resource.architecture not in (None, arch):
                    continue
                capability = int(arch.removeprefix("sm_"))
                compiled = compile_for(resource, capability)
                used, ptx = usage(compiled.asm["cubin"]), compiled.asm["ptx"]
                found = {name for name, pattern in PRODUCTS.items() if re.search(pattern, ptx)}
                wrong = complaints(resource, capability, used, found, len(re.findall(r"\bfma\.rn", ptx)))
                failed += bool(wrong)
                print(
                    f"{arch:<7}{resource.name:<58}{compiled.metadata.num_warps:>6}{used['REG']:>6}"
                    f"{used['STACK'] + used['LOCAL']:>7}{compiled.metadata.shared:>8}  {' '.join(sorted(found)) or '-'}"
                    f"{'   FAILED: ' + '; '.join(wrong) if wrong else ''}",
                    flush=True,
                )
    if failed:
        sys.exit(f"{failed} kernels failed")


if __name__ == "__main__":
    main()
