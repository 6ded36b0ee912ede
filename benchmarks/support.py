"""Which op runs where, in which dtypes, as far as it was checked: a table made of what `benchmarks.probe` found.

    python -m benchmarks.probe --device cpu --json cpu.jsonl
    TRITON_INTERPRET=1 python -m benchmarks.probe --device cpu --impl triton --json triton.jsonl
    python -m benchmarks.support docs/support.md "C++=cpu.jsonl" "Triton, in its interpreter=triton.jsonl"

CONTRIBUTING.md says how the CUDA kernels are emulated. Of a GPU, `benchmarks/gpu.sh first` writes gpu_probe.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch

from benchmarks import report
from m3ae_fast._files import replacing

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
HEAD = """# Which op runs where

Made by `python -m benchmarks.support` on {date} at commit {commit}, with torch {torch} on an {cpu},
of what `python -m benchmarks.probe` found: each op on each backend against fp64, with an error of at most a few times
eager PyTorch's. A dtype that is not named is computed by plain PyTorch where `impl=None`; asked for by name, a backend
refuses it. "-": there is no such backend of this op.
"""


def cells(path: Path) -> dict[tuple[str, str], str]:
    """(op, backend) to the dtypes that passed every case, and those that failed one."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        found.setdefault((result["op"], result["impl"]), {}).setdefault(result["dtype"], []).append(result["failure"])
    return {
        key: ", ".join(SHORT[dtype] + (" (FAILS)" if any(dtypes[dtype]) else "") for dtype in SHORT if dtype in dtypes)
        for key, dtypes in found.items()
    }


def page(columns: dict[str, Path]) -> str:
    """The table, an op a row; of a file, the backend that it has beside the reference."""
    tables = {title: {op: text for (op, impl), text in cells(path).items() if impl != "reference"}
              for title, path in columns.items()}  # fmt: skip
    ops = sorted({op for table in tables.values() for op in table})
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": report.said_by("git", "describe", "--always", "--exclude=*"),
        "torch": torch.__version__,
        "cpu": report.processor(),
    }
    rows = [f"| op | {' | '.join(tables)} |", "|---" * (len(tables) + 1) + "|"]
    rows += [f"| `{op}` | {' | '.join(table.get(op, '-') for table in tables.values())} |" for op in ops]
    return "\n".join([HEAD.format(**about), *rows, ""])


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.support", description="Make a table of probes' results.")
    parser.add_argument("page", type=Path, metavar="OUT.md")
    parser.add_argument("columns", nargs="+", metavar="TITLE=FILE.jsonl", help="what `benchmarks.probe --json` wrote")
    args = parser.parse_args()
    columns = dict(column.rsplit("=", 1) for column in args.columns)
    with replacing(args.page) as temporary:
        temporary.write_text(page({title: Path(path) for title, path in columns.items()}))


if __name__ == "__main__":
    main()
