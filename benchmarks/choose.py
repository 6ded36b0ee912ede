"""Which backend attention shall take, by its benchmark's table: python -m benchmarks.choose docs/gpu_attention.json.

For each width and length that bench_varlen_attention measured forward and backward in bf16, "cuda" is chosen where its
upper quartile lies below Triton's lower one, else "triton". The choices are printed and written to `folder` as
sm_<capability>.json, by default where m3ae_fast/ops/varlen_attention/choice.py reads them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "m3ae_fast/ops/varlen_attention"
ABOUT = ("date", "commit", "GPU", "driver", "CUDA", "torch", "Triton", "m3ae_fast")
CUDA = "m3ae_fast, cuda"  # as `measure.compare_op` names it


def record(table: dict) -> dict:
    """A record of the choice, made from the table that `--table` wrote.

    Raises:
        ValueError: it was not measured on a GPU, or the CUDA kernels were not.
    """
    quartiles: dict[tuple[int, int], dict[str, tuple[float, float]]] = {}
    for row in table["rows"]:
        case = re.fullmatch(r"(\d+) x (\d+) bf16", row["case"])
        if row["op"] == "varlen_attention forward+backward" and case:
            length, width = map(int, case.groups())
            quartiles.setdefault((width, length), {})[row["provider"]] = row["quartiles_ms"]
    architecture = re.search(r"\bsm_\d+", table["machine"].get("GPU", ""))
    both = {shape: times for shape, times in quartiles.items() if {"m3ae_fast", CUDA} <= times.keys()}
    if architecture is None or not both:
        raise ValueError("the table must hold attention's forward and backward pass by both backends on a GPU")
    rows = [
        [*shape, "cuda" if times[CUDA][1] < times["m3ae_fast"][0] else "triton"]
        for shape, times in sorted(both.items())
    ]
    about = {name: table["machine"].get(name) for name in ABOUT}
    return {"architecture": architecture[0], **about, "rows": rows}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="the JSON file of attention's table")
    parser.add_argument("folder", type=Path, nargs="?", default=PACKAGE, help="where the record goes")
    options = parser.parse_args()
    try:
        made = record(json.loads(options.table.read_text()))
    except (OSError, ValueError) as error:
        parser.exit(2, f"choose: {options.table}: {error}\n")
    for width, length, impl in made["rows"]:
        print(f"heads of up to {width} channels, up to {length} tokens: {impl}")
    path = options.folder / f"{made['architecture']}.json"
    path.write_text(json.dumps(made, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
