"""Speed and memory against PyTorch as bars: `python -m benchmarks.chart docs/cpu.json docs/speed.png`.

Draws what `pytest benchmarks --benchmark-only --all --table docs/cpu.md` measured; measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from m3ae_fast._drawing import new_figure, save_figure

OURS, EAGER = "#178a4c", "#b8bdc9"
SHADES = {"fp32": "#7fc29b", "bf16": OURS}

# label: (op, case without its dtype, how it names fp32 and bf16, the peer)
SPEED = {
    "M3AE-S training step": ("M3AE step", "m3ae_small", "short", "padded, eager"),
    "attention, encoder": ("varlen_attention forward+backward", "m3ae_small_encoder", "short", "SDPA, padded + mask"),
    "attention, decoder": ("varlen_attention forward+backward", "m3ae_small_decoder", "short", "SDPA, padded + mask"),
    "linear + cross-entropy": ("linear_cross_entropy forward+backward", "batch_64", "long", "eager"),
    "restore_tokens": ("restore_tokens forward+backward", "m3ae_small", "long", "eager padded"),
    "masked_mse": ("masked_mse forward+backward", "m3ae_small", "long", "eager (MAE)"),
    "gather_patches": ("gather_patches forward", "m3ae_small uint8 pixels", "long", "eager"),
}
MEMORY = {name: SPEED[name] for name in ("M3AE-S training step", "linear + cross-entropy")}
DTYPES = {"short": {"fp32": "fp32", "bf16": "bf16"}, "long": {"fp32": "float32", "bf16": "bfloat16"}}


def rows_of(table: dict, names: tuple[str, str, str, str], dtype: str) -> tuple[dict, dict]:
    """Our row and the peer's."""
    op, case, spelling, peer = names
    case = f"{case} {DTYPES[spelling][dtype]}"
    found = {row["provider"]: row for row in table["rows"] if (row["op"], row["case"]) == (op, case)}
    try:
        return found["m3ae_fast"], found[peer]
    except KeyError as error:
        raise ValueError(f"the table must have {op}, {case}, of {error}: measure them all, without -k") from None


def mebibytes(row: dict) -> float:
    return float(row["extra"].split()[0])  # "482 MiB beyond ..."


def draw(table: dict, path: Path) -> None:
    """As a PNG: speed on the left, memory on the right."""
    figure = new_figure(11, 4.2)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.06), "ncols": 2, "frameon": False}
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    for shift, (dtype, color) in zip((0.2, -0.2), SHADES.items(), strict=True):
        ratios = [rows_of(table, names, dtype)[1]["ratio"] for names in SPEED.values()]
        places = [-place + shift for place in range(len(ratios))]
        left.bar_label(left.barh(places, ratios, 0.38, color=color, label=dtype), fmt="%.1fx", padding=3, fontsize=9)
    left.axvline(1, color="#1f2430", linewidth=1)
    left.set_yticks([-place for place in range(len(SPEED))], SPEED)
    left.set(title="speed, eager PyTorch = 1", xlim=(0, left.get_xlim()[1] * 1.06))
    left.legend(**below)

    cases = [(name, dtype) for name in MEMORY for dtype in SHADES]
    for shift, provider, color in ((0.2, "eager PyTorch", EAGER), (-0.2, "m3ae_fast", OURS)):
        which = 1 if provider == "eager PyTorch" else 0
        sizes = [mebibytes(rows_of(table, MEMORY[name], dtype)[which]) for name, dtype in cases]
        places = [-place + shift for place in range(len(sizes))]
        right.bar_label(right.barh(places, sizes, 0.38, color=color, label=provider), fmt="%d", padding=3, fontsize=9)
    right.set_yticks([-place for place in range(len(cases))], [f"{name}\n{dtype}" for name, dtype in cases])
    right.set(title="peak memory, MiB*", xlim=(0, right.get_xlim()[1] * 1.1))
    right.legend(**below)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(left=False)

    about = table["machine"]
    threads = str(about["threads"]).split()[0]
    machine = f"{about['CPU']}, {about['instruction set']}, {threads} threads, torch {about['torch']}"
    figure.supxlabel(
        f"{machine}, {about['date']}. * beyond weights, gradients and optimizer state, or inputs", fontsize=8
    )
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.chart", description="Draw a benchmark table as bars.")
    parser.add_argument("table", type=Path, metavar="TABLE.json", help="what --table TABLE.md wrote beside it")
    parser.add_argument("picture", type=Path, metavar="OUT.png")
    args = parser.parse_args()
    draw(json.loads(args.table.read_text()), args.picture)


if __name__ == "__main__":
    main()
