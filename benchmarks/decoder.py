"""What less of the decoder saves: `python -m benchmarks.decoder docs/decoder.md` writes the table of that page anew.

A training step of M3AE-S, forward, backward and AdamW, with each decoder, interleaved: medians of processor time on one
thread, which others on the machine hardly change.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import textwrap
from pathlib import Path

import torch

from benchmarks import cost, measure, memory, report
from benchmarks.models import bench_m3ae
from m3ae_fast import testing
from m3ae_fast._cpp import _C
from m3ae_fast.models import M3AEConfig

SHAPE = testing.SHAPES["m3ae_small"]
WAYS = {
    "joint, all masked tokens": {},
    "joint, a third of them": {"predict_ratio": 1 / 3},
    "cross, all": {"decoder": "cross"},
    "cross, a third": {"decoder": "cross", "predict_ratio": 1 / 3},
}
PRECISIONS = ("fp32", "bf16")
TABLE = re.compile(r"(<!-- table: steps -->\n).*?(<!-- end -->)", re.S)


def make_step(changes: dict, precision: str):
    """run(i): a training step on batch i of two."""
    config = M3AEConfig.small(**changes)
    batches = [bench_m3ae.make_batch(config, SHAPE, seed) for seed in range(2)]
    model, loss_of = bench_m3ae.make_model(config, "m3ae_fast", batches)
    return bench_m3ae.make_step(model, loss_of, precision)


def alone(way: str, precision: str):
    """For memory.peak_beyond: a step, of which nothing is owned: gradients are counted, for at the peak not all of them
    are there."""
    torch.set_num_threads(1)
    run = make_step(WAYS[way], precision)
    return lambda: run(0), 0


def seconds() -> dict[str, dict[str, float]]:
    """Medians of a step, by precision and decoder."""
    torch.set_num_threads(1)
    measure.SETTINGS.processor, found = True, {}
    for precision in PRECISIONS:
        steps = {way: make_step(changes, precision) for way, changes in WAYS.items()}
        times = measure.interleave(steps, 2)
        found[precision] = {way: statistics.median(values) / 1e3 for way, values in times.items()}
    return found


def mebibytes() -> dict[str, dict[str, float]]:
    """What a step adds at its peak, likewise."""
    return {
        precision: {way: memory.peak_beyond(alone, way, precision) / 2**20 for way in WAYS} for precision in PRECISIONS
    }


def table(times: dict, extra: dict, about: str) -> str:
    """A row for each decoder, and where it was measured."""
    lines = ["| decoder | GFLOP a sample | step, fp32 | step, bf16 | memory, fp32 | memory, bf16 |", "|" + " --- |" * 6]
    first = next(iter(WAYS))
    for way, changes in WAYS.items():
        cells = [way, f"{cost.training(M3AEConfig.small(**changes)) / 1e9:.0f}"]
        cells += [f"{own[way]:.2f} s ({own[way] / own[first]:.2f})" for own in times.values()]
        cells += [f"{own[way]:,.0f} MiB ({own[way] / own[first]:.2f})" for own in extra.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", textwrap.fill(about, 120)])


def main(path: Path) -> None:
    """Measure, and write the table into the page."""
    page = path.read_text(encoding="utf-8")
    if not TABLE.search(page):
        raise ValueError(f"{path} must have a place for the table 'steps', got none")
    load, times = os.getloadavg()[0], seconds()
    load = f"load {load:.1f} before and {os.getloadavg()[0]:.1f} after"
    about = f"Batch {SHAPE.batch}, one thread of {report.processor()}, {_C.active_isa()}, torch {torch.__version__}, "
    found = table(times, mebibytes(), f"{about}{datetime.date.today()}; {load}.")
    path.write_text(TABLE.sub(lambda match: f"{match[1]}{found}\n{match[2]}", page), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.decoder", description="What less of the decoder saves.")
    parser.add_argument("page", type=Path, metavar="PAGE.md", help="its table is written anew, such as docs/decoder.md")
    main(parser.parse_args().page)
