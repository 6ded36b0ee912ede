"""Tiles of a Triton kernel, tried on this GPU: python -m benchmarks.tune varlen_attention [--width 64] [--length 81].

For each width and length of heads and sequences, every candidate tile of every kernel is checked against the reference
and timed against the others, and the best are printed as the backend's table `TILES` has them. Nothing tunes itself in
a user's process: what this finds is written into the table by hand. TRITON_INTERPRET=1 tries it out without a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from unittest import mock

import torch

from benchmarks import measure
from m3ae_fast import SeqLens, _backends, testing, varlen_attention

WIDTHS, LENGTHS = (32, 64, 80), (50, 81, 128, 197, 297, 512)
# (blocks of queries, blocks of keys, warps, stages): streamed kernels, and those that hold all keys of a sequence
STREAMED = ((64, 128), (32, 64), (4, 8), (2, 3))
WHOLE = ((16, 32, 64, 128), (128,), (4, 8), (1,))


def make(batch: int, heads: int, length: int, width: int) -> testing.Call:
    """A batch of equal lengths, bf16."""
    device = measure.SETTINGS.device
    q, k, v = (torch.randn(batch * length, heads, width, device=device).bfloat16().requires_grad_() for _ in range(3))
    return testing.Call((q, k, v, SeqLens([length] * batch, device)))


def candidates(backend, architecture: str, kernel: str, width: int, length: int, whole: bool) -> dict[tuple, dict]:
    """Row of TILES -> the table with this row; the row that is used today first, one row for each tile it comes to."""
    covered = sum(backend._pieces(width))
    name = f"{kernel}_whole" if whole else kernel
    today = next(row for row in backend.TILES[architecture][name] if covered <= row[0])
    tables, seen = {}, set()
    for tile in (today[1:], *itertools.product(*(WHOLE if whole else STREAMED))):
        row = (covered, *tile)
        with mock.patch.dict(backend.TILES[architecture], {name: (row,)}):
            comes_to = tuple(backend._tiling(kernel, architecture, width, length, length, whole).items())
        if comes_to not in seen:
            tables[row] = {name: (row,)}
        seen.add(comes_to)
    return tables


def runner(tables: dict, table: dict, calls: list, backward: bool):
    """run(i): the forward or the backward pass of call i with a table's tiles."""
    if backward:
        outs = [varlen_attention(*call.args, impl="triton") for call in calls]
        douts = [torch.randn_like(out) for out in outs]

    def run(i):
        with mock.patch.dict(tables, table):
            if not backward:
                with torch.no_grad():
                    return varlen_attention(*calls[i].args, impl="triton")
            return torch.autograd.grad(outs[i], calls[i].leaves(), douts[i], retain_graph=True)

    return run


def tune(backend, batch: int, heads: int, length: int, width: int) -> None:
    """Print the best tiles of every kernel that runs at this width and length."""
    calls = measure.copies(make(batch, heads, length, width), 2)
    few = make(4, heads, length, width)
    eager, truth = (call.run(varlen_attention, impl="reference") for call in (few, few.to(torch.float64)))
    architecture = backend._architecture(few.args[0])
    tables = backend.TILES[architecture]
    whole = backend._is_whole(architecture, width, length)
    for kernel in ("forward", "keys") if whole else ("forward", "queries", "keys"):
        rows = candidates(backend, architecture, kernel, width, length, whole)
        today, runs = next(iter(rows)), {}
        for row, table in rows.items():
            try:
                with mock.patch.dict(tables, table):
                    ours = few.run(varlen_attention, impl="triton")
                testing.assert_error_rules(ours, eager, truth)
                run = runner(tables, table, calls, kernel != "forward")
                run(0)
            except Exception as error:  # too much shared memory, a shape the compiler refuses, a wrong result
                print(f"  {row}: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}", flush=True)
            else:
                runs[row] = run
        times = {row: statistics.median(each) for row, each in measure.interleave(runs, len(calls)).items()}
        print(f"{architecture} {kernel}{'_whole' * whole}, width {width}, length {length}; today {today}")
        for row in sorted(times, key=times.get)[:3]:
            print(f"  {row}, {times[row]:.3f} ms, {times[row] / times.get(today, float('nan')):.2f} of today's time")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["varlen_attention"])
    parser.add_argument("--width", type=int, help="of a head; default 32, 64 and 80")
    parser.add_argument("--length", type=int, help="of the sequences; default 50 to 512")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--heads", type=int, default=16)
    options = parser.parse_args()
    measure.SETTINGS.device = "cpu" if _backends.INTERPRETED else "cuda"
    refusal = _backends.LOADED[options.op].refusal("triton", measure.SETTINGS.device)
    if refusal or not (_backends.INTERPRETED or torch.cuda.is_available()):
        parser.exit(2, f"tune: impl='triton' must run here: {refusal or 'torch sees no GPU'}\n")
    backend = _backends.LOADED[options.op]["triton"]
    for width in (options.width,) if options.width else WIDTHS:
        for length in (options.length,) if options.length else LENGTHS:
            tune(backend, options.batch, options.heads, length, width)


if __name__ == "__main__":
    main()
