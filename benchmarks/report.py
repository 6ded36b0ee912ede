"""What a benchmark run prints and, with `--table docs/cpu.md`, writes: the machine, then every row measured."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import m3ae_fast
from benchmarks import measure
from m3ae_fast import testing


def machine() -> dict[str, object]:
    """Everything that a number depends on."""
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": os.environ.get("COMMIT") or said_by("git", "describe", "--always", "--dirty", "--exclude=*"),
        "m3ae_fast": m3ae_fast.__version__,
        "torch": torch.__version__,
    }
    if measure.SETTINGS.gpu:
        about |= gpu()
    else:
        from m3ae_fast._cpp import _C

        about |= {"CPU": processor(), "instruction set": _C.active_isa(), "threads": _C.num_threads()}
    return about | {
        "copy bandwidth": f"{measure.copy_bandwidth() / 1e6:.1f} GB/s, read + written",
        "product, fp32": f"{measure.product_rate(torch.float32) / 1e6:.0f} GFLOP/s",
        "product, bf16": f"{measure.product_rate(torch.bfloat16) / 1e6:.0f} GFLOP/s",
    }


def said_by(*command: str) -> str:
    """What a command prints, in this folder; "unknown" where it cannot."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return (done.returncode == 0 and done.stdout.strip()) or "unknown"


def gpu() -> dict[str, object]:
    """The GPU, its software and the peers that are installed. Its clocks are as they were found."""
    card = torch.cuda.get_device_properties(0)
    return {
        "Triton": version("triton"),
        "CUDA": torch.version.cuda,
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "GPU": f"{card.name}, sm_{card.major}{card.minor}, {card.multi_processor_count} multiprocessors, "
        f"{card.total_memory / 2**30:.0f} GiB",
        "CPU": processor(),
        **{peer: version(peer) for peer in ("xformers", "flash-attn", "flash-attn-3", "liger-kernel")},
        "batch": f"{testing.SHAPES['m3ae_small'].batch}, of m3ae_small, m3ae_huge and mae_base",
    }


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def missing() -> list[str]:
    """A line for each peer and reason why it could not run."""
    return [
        f"not measured: {peer}: {reason} ({len(where)}: {', '.join(where[:3])}{', ...' if len(where) > 3 else ''})"
        for (peer, reason), where in measure.MISSING.items()
    ]


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
    lines = [f"{'op':<38}{'case':<26}{'provider':<26}{'median ms':>10}{'quartiles':>20}{'x ours':>8}{'% roofline':>13}"]
    for row in rows:
        low, high = row.quartiles_ms
        share = "" if row.roof_share is None else f"{100 * row.roof_share:.0f} {row.roof}"
        lines.append(
            f"{row.op:<38}{row.case:<26}{row.provider:<26}{row.median_ms:>10.3f}{f'{low:.3f}-{high:.3f}':>20}"
            f"{row.ratio:>8.2f}{share:>13}  {row.extra}"
        )
    return lines


def short(rows: list[measure.Row]) -> list[str]:
    """A line for each case: our milliseconds, and how many times as long its peers take."""
    lines = {}
    for row in rows:
        ours = row.provider == "m3ae_fast"
        said = f"{row.median_ms:.3f} ms" if ours else f"{row.provider} {row.ratio:.2f}x"
        lines.setdefault((row.op, row.case), []).append(said)
    return [f"{op}, {case}: {'; '.join(said)}" for (op, case), said in lines.items()]


def compact(result: dict) -> str:
    """As JSON, a row a line, numbers to four digits."""
    rows = [{name: _short(value) for name, value in row.items() if value not in ("", None)} for row in result["rows"]]
    rest = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    return rest.removesuffix("\n}") + ',\n "rows": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n"


def _short(value):
    if isinstance(value, list | tuple):
        return [_short(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(path: Path, rows: list[measure.Row], command: str) -> None:
    """path (Markdown) and, beside it, the same as JSON."""
    about = machine()
    result = {"machine": about, "command": command, "rows": [dataclasses.asdict(row) for row in rows]}
    if measure.SETTINGS.gpu:
        result["missing"] = [
            {"peer": peer, "reason": reason, "where": where} for (peer, reason), where in measure.MISSING.items()
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(compact(result))
    lines = [
        f"# Measured on {torch.cuda.get_device_name(0) if measure.SETTINGS.gpu else 'a CPU'}",
        "",
        f"Made by `{command}`.",
        'Ours and its peers take turns in one process; medians; "x" is the peer\'s median over ours.',
        "A share of a roofline is of the copy bandwidth or of the large matrix product measured in the same run.",
        "",
        *(f"- {name}: {value}" for name, value in about.items()),
        *(f"- {line}" for line in missing()),
        "",
    ]
    groups: dict[str, list[list[measure.Row]]] = {}
    for row in rows:  # ours comes first, then its peers
        group = groups.setdefault(row.op, [])
        if not group or row.provider in {r.provider for r in group[-1]} or group[-1][0].case != row.case:
            group.append([])
        group[-1].append(row)
    for op, cases in groups.items():
        lines += [f"## {op}", "", "| case | ours, ms | of the roofline | against | remarks |", "|---|---|---|---|---|"]
        for ours, *peers in cases:
            share = "" if ours.roof_share is None else f"{100 * ours.roof_share:.0f} % {ours.roof}"
            against = ", ".join(f"{peer.provider} **{peer.ratio:.2f}x**" for peer in peers)
            remarks = "; ".join(f"{row.provider}: {row.extra}" for row in (ours, *peers) if row.extra)
            lines.append(f"| {ours.case} | {ours.median_ms:.3f} | {share} | {against} | {remarks} |")
        lines.append("")
    path.write_text("\n".join(lines))
