"""The one timing protocol.

Correct first (the caller asserts), then ours and its peers interleaved in one process, inputs rotated past the last
cache, medians and quartiles of many rounds, ratios of medians. Beside each row its share of a roof measured in the
same run: the bandwidth of a copy or the rate of a large matrix product. Machines are shared and noisy: only ratios
within one run mean anything.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils import _pytree as pytree

CACHE_BYTES = 64 << 20  # rotate inputs through more than this
LEAST_ROUNDS, SECONDS = 5, 6.0  # what takes long gets fewer rounds
ROWS: list[Row] = []  # what conftest prints at the end


@dataclasses.dataclass
class Row:
    op: str
    case: str
    provider: str
    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float | None = None  # this provider's median over ours
    roof: str = ""  # which one bounds it: "copy" or "product"
    roof_share: float | None = None
    extra: str = ""


@dataclasses.dataclass
class Settings:
    smoke: bool = False

    @property
    def rounds(self) -> int:
        return 3 if self.smoke else 40


SETTINGS = Settings()


def copies(make: Callable[[], object], bytes_each: int) -> list:
    """Enough independent inputs that a round trip through them leaves the last cache."""
    count = 1 if SETTINGS.smoke else min(64, max(2, -(-CACHE_BYTES // max(bytes_each, 1))))
    return [make() for _ in range(count)]


def interleave(providers: dict[str, Callable[[int], object]], inputs: int) -> dict[str, list[float]]:
    """Milliseconds of each provider in each round: provider(i) runs on input i.

    Providers take turns, each on an input that no other has just brought into the cache.
    """
    for run in providers.values():
        run(0)
    times = {name: [] for name in providers}
    began = time.perf_counter()
    for round_ in range(SETTINGS.rounds):
        if round_ >= LEAST_ROUNDS and time.perf_counter() - began > SECONDS:
            break
        for turn, (name, run) in enumerate(providers.items()):
            i = (round_ + turn * inputs // len(providers)) % inputs  # not the input that the one before has just warmed
            start = time.perf_counter()
            run(i)
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a millisecond, read and written, of torch's copy of 256 MiB: the roof of every memory-bound op."""
    source = torch.ones((8 if SETTINGS.smoke else 256) << 18)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append((time.perf_counter() - start) * 1e3)
    return 2 * source.numel() * 4 / statistics.median(times)


def compare(
    benchmark,
    op: str,
    case: str,
    providers: dict[str, Callable[[int], object]],
    *,
    inputs: int = 1,
    bytes_moved: int | None = None,
    flops: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Row]:
    """Time providers against each other (the first one is ours), note rows for the table, feed pytest-benchmark.

    Args:
        benchmark: pytest-benchmark's fixture: ours is recorded there, with the ratios as extra_info.
        providers: name -> run(i), on input i of `inputs`.
        bytes_moved: what one run of ours must read and write at the least; gives the share of copy bandwidth.
        flops: what the problem asks for at the least, padding left out; gives the share of a product in `dtype`.
    """
    times = interleave(providers, inputs)
    rows: dict[str, Row] = {}
    ours = statistics.median(next(iter(times.values())))
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4)
        row = Row(op, case, name, statistics.median(values), (quartiles[0], quartiles[2]))
        row.ratio = row.median_ms / ours
        if bytes_moved is not None:
            row.roof, row.roof_share = "copy", bytes_moved / row.median_ms / copy_bandwidth()
        if flops is not None:
            row.roof, row.roof_share = "product", flops / row.median_ms / product_rate(dtype)
        rows[name] = row
    ROWS.extend(rows.values())
    benchmark.extra_info.update({f"{name} / ours": round(row.ratio, 3) for name, row in rows.items()})
    first = next(iter(providers.values()))
    benchmark.pedantic(lambda: first(0), rounds=3, warmup_rounds=0)
    return rows


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a millisecond of torch's product of two square matrices: the roof of matrix work."""
    size = 256 if SETTINGS.smoke else 2048
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        times.append((time.perf_counter() - start) * 1e3)
    return 2 * size**3 / min(times)


def compare_op(benchmark, op: str, case: str, calls: list, mode: str, providers: dict, bytes_moved=None, flops=None):
    """`compare` for one op: each provider has the op's public signature and runs on every Call of `calls`.

    Args:
        providers: name -> function, or (function, calls of its own): a peer may need its inputs padded beforehand.
        mode: "forward" (no grad) or "forward+backward" (gradients of every leaf of the Call).
        bytes_moved: of the forward pass; the backward pass is taken to move as much again.
        flops: of the forward pass; the backward pass is taken to need twice as many.
    """
    dtype = next((x.dtype for x in calls[0].tensors() if x.is_floating_point()), torch.float32)

    def floats(function, call):
        out = function(*call.args, **call.kwargs)
        return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]

    def runner(function, calls=calls):  # each with gradients of its own: a peer's output may be padded
        gradients = [[torch.randn_like(x) for x in floats(function, call)] for call in calls]

        def forward(i):
            with torch.no_grad():
                return function(*calls[i].args, **calls[i].kwargs)

        def both(i):
            return torch.autograd.grad(floats(function, calls[i]), calls[i].leaves(), gradients[i])

        return forward if mode == "forward" else both

    if mode != "forward":
        bytes_moved = bytes_moved and 2 * bytes_moved
        flops = flops and 3 * flops
    runners = {name: runner(*p) if isinstance(p, tuple) else runner(p) for name, p in providers.items()}
    roofs = {"bytes_moved": bytes_moved, "flops": flops, "dtype": dtype}
    return compare(benchmark, f"{op} {mode}", case, runners, inputs=len(calls), **roofs)
