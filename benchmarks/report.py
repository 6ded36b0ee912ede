"""What a benchmark run prints and, with `--table docs/cpu.md`, writes: the machine, then every row measured."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from pathlib import Path

import measure
import torch

import m3ae_fast


def machine() -> dict[str, object]:
    """Everything that a number depends on."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    from m3ae_fast._cpp import _C

    return {
        "date": datetime.date.today().isoformat(),
        "commit": git.stdout.strip() or "unknown",
        "m3ae_fast": m3ae_fast.__version__,
        "torch": torch.__version__,
        "CPU": processor(),
        "instruction set": _C.active_isa(),
        "threads": _C.num_threads(),
        "copy bandwidth": f"{measure.copy_bandwidth() / 1e6:.1f} GB/s, read + written",
        "product, fp32": f"{measure.product_rate(torch.float32) / 1e6:.0f} GFLOP/s",
        "product, bf16": f"{measure.product_rate(torch.bfloat16) / 1e6:.0f} GFLOP/s",
    }


def processor() -> str:
    """The name, and the numbers that tell apart machines of one name."""
    fields = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name, family, model = (fields.get(field, "unknown") for field in ("model name", "cpu family", "model"))
    return f"{name}, family {family}, model {model}"


def text(rows: list[measure.Row]) -> list[str]:
    """Lines for a terminal, a row each."""
    lines = [f"{'op':<38}{'case':<26}{'provider':<26}{'median ms':>10}{'quartiles':>20}{'x ours':>8}{'% of roof':>13}"]
    for row in rows:
        low, high = row.quartiles_ms
        share = "" if row.roof_share is None else f"{100 * row.roof_share:.0f} {row.roof}"
        lines.append(
            f"{row.op:<38}{row.case:<26}{row.provider:<26}{row.median_ms:>10.3f}{f'{low:.3f}-{high:.3f}':>20}"
            f"{row.ratio:>8.2f}{share:>13}  {row.extra}"
        )
    return lines


def write(path: Path, rows: list[measure.Row], command: str) -> None:
    """path (Markdown) and, beside it, the same as JSON."""
    about = machine()
    path.with_suffix(".json").write_text(
        json.dumps({"machine": about, "command": command, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1)
        + "\n"
    )
    lines = [
        "# Measured on a CPU",
        "",
        f"Made by `{command}`.",
        'Ours and its peers take turns in one process; medians; "x" is the peer\'s median over ours.',
        "A share of a roof is of the copy bandwidth or of the large matrix product measured in the same run.",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        "",
    ]
    groups: dict[str, list[list[measure.Row]]] = {}
    for row in rows:  # ours comes first, then its peers
        group = groups.setdefault(row.op, [])
        if not group or row.provider in {r.provider for r in group[-1]} or group[-1][0].case != row.case:
            group.append([])
        group[-1].append(row)
    for op, cases in groups.items():
        lines += [f"## {op}", "", "| case | ours, ms | of the roof | against | remarks |", "|---|---|---|---|---|"]
        for ours, *peers in cases:
            share = "" if ours.roof_share is None else f"{100 * ours.roof_share:.0f} % {ours.roof}"
            against = ", ".join(f"{peer.provider} **{peer.ratio:.2f}x**" for peer in peers)
            remarks = "; ".join(f"{row.provider}: {row.extra}" for row in (ours, *peers) if row.extra)
            lines.append(f"| {ours.case} | {ours.median_ms:.3f} | {share} | {against} | {remarks} |")
        lines.append("")
    path.write_text("\n".join(lines))
