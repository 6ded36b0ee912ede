"""Every op on every backend of a device, against fp64, without pytest: python -m benchmarks.probe --device cuda.

The first thing to run on a GPU that these kernels have not seen. A line for each backend, op, case and dtype, printed
at once: PASS, or FAIL and why. The rule is the contract tests': an error of at most that of eager PyTorch, a few times,
in outputs that begin as NaN. Each dtype of a backend of an op has a process of its own, so that one that breaks the
GPU's context, or hangs (`--limit` seconds), takes no other with it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

import m3ae_fast
from m3ae_fast import _backends, testing

FAILED = 3  # what a process ends with whose results say why
FIELDS = ("op", "impl", "dtype", "case", "failure", "seconds")


def names(op: str, which: str) -> tuple[str, ...]:
    """Names of the cases of an op: the "first" small one, "small" ones, or "all" (those of real models, too)."""
    cases = testing.cases(op)
    return {"first": cases.SMALL[:1], "small": cases.SMALL, "all": (*cases.SMALL, *cases.REAL)}[which]


def check(op: str, impl: str, case: str, dtype: torch.dtype, device: str) -> str:
    """Why a backend fails a case; "" where it passes."""
    function = getattr(m3ae_fast, op)
    try:
        call = testing.cases(op).make(case, dtype).on(device)
        torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty begins as NaN
        ours = call.run(function, impl=impl)
        torch.use_deterministic_algorithms(False)
        eager = call.to(torch.float32) if dtype == torch.float64 else call
        references = (each.run(function, impl="reference") for each in (eager, call.to(torch.float64)))
        testing.assert_error_rules(ours, *references)
    except Exception as error:  # whatever it is, it is what the probe is for
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def probe(op: str, impl: str, dtype: str, options: argparse.Namespace) -> bool:
    """Check one backend of one op with one dtype; print and note every result at once. Whether all is well."""
    passed = True
    for case in names(op, options.cases):
        began = time.perf_counter()
        failure = check(op, impl, case, getattr(torch, dtype), options.device)
        note(options, op, impl, dtype, case, failure, time.perf_counter() - began)
        passed = passed and not failure
    return passed


def in_a_process(op: str, impl: str, dtype: str, options: argparse.Namespace) -> bool:
    """`probe`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.probe", "--only", op, impl, dtype, "--cases", options.cases]
    command += ["--device", options.device, *(["--json", str(options.json)] if options.json else [])]
    began = time.perf_counter()
    try:
        status = subprocess.run(command, timeout=options.limit).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {options.limit:.0f} s"
    if status not in (0, FAILED):
        note(options, op, impl, dtype, "", f"the process ended: {status}", time.perf_counter() - began)
    return status == 0


def note(options: argparse.Namespace, *result) -> None:
    """Print a result and append it to the JSON lines."""
    *what, failure, seconds = result
    print("FAIL" if failure else "PASS", *what, f"({seconds:.1f} s)", failure, flush=True)
    if options.json:
        with options.json.open("a") as file:
            file.write(json.dumps(dict(zip(FIELDS, result, strict=True))) + "\n")


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--cases", default="all", choices=("first", "small", "all"))
    parser.add_argument("--op", help="this op alone")
    parser.add_argument("--impl", help="this backend alone")
    parser.add_argument("--only", nargs=3, metavar=("OP", "IMPL", "DTYPE"), help="in this process")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a process may take")
    parser.add_argument("--json", type=Path, help="append every result there, a line each")
    options = parser.parse_args()
    if options.only:
        return 0 if probe(*options.only, options) else FAILED
    backends = [(op, impl) for op in _backends.LOADED for impl in testing.impls(op, options.device)]
    calls = [
        (op, impl, str(dtype).removeprefix("torch."))
        for op, impl in sorted(backends, reverse=True)  # attention, which takes longest, comes first
        for dtype in testing.dtypes(impl, op)
        if options.op in (None, op) and options.impl in (None, impl)
    ]
    if not calls:
        parser.exit(2, f"probe: nothing of what was asked for runs on {options.device} here: m3ae-fast info says why\n")
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        passed = list(pool.map(lambda call: in_a_process(*call, options), calls))
    print(f"probe: {sum(passed)} of {len(calls)} passed: {options.device}, cases: {options.cases}")
    return 0 if all(passed) else FAILED


if __name__ == "__main__":
    sys.exit(main())
