"""The one timing protocol.

Correct first (the caller asserts), then ours and its peers interleaved in one process, inputs rotated past the last
cache, medians and quartiles of many rounds, ratios of medians. Beside each row its share of a roofline measured in the
same run: the bandwidth of a copy or the rate of a large matrix product. Machines are shared and noisy: only ratios
within one run mean anything.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from types import ModuleType

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from m3ae_fast import _backends, linear, testing
from m3ae_fast.testing import Call

CACHE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}  # rotate inputs through more than this
LEAST_ROUNDS = 5
ROWS: list[Row] = []  # what conftest prints at the end
MISSING: dict[tuple[str, str], list[str]] = {}  # (peer, why it could not run) -> where


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
    device: str = "cpu"  # or "cuda"
    seconds: float = 6.0  # what takes longer gets fewer rounds
    processor: bool = False  # processor time of this process, in place of the host's clock: where others work, too

    @property
    def rounds(self) -> int:
        return 3 if self.smoke else 40

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def batches(self) -> int:
        """How many of a CPU's batches make one that fills the device."""
        return 64 if self.gpu and not self.smoke else 1


SETTINGS = Settings()


class _DrawnThere(TorchFunctionMode):
    """torch.randn draws on the device that is measured."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.randn:
            kwargs = kwargs | {"device": SETTINGS.device, "generator": None}
        return func(*args, **(kwargs or {}))


def make(cases: ModuleType, *args) -> Call:
    """cases.make(*args); on a GPU its normal numbers are drawn there, for a CPU takes seconds to draw them."""
    if SETTINGS.device == "cpu":
        return cases.make(*args)
    torch.manual_seed(0)
    with _DrawnThere():
        return cases.make(*args)


def copies(call: Call, count: int | None = None) -> list[Call]:
    """Copies of a call on the device that is measured: `count`, or so many that a round trip leaves the last cache."""
    if count is None:
        size = sum(x.nbytes for x in call.tensors())
        count = 1 if SETTINGS.smoke else min(64, max(2, -(-CACHE_BYTES[SETTINGS.device] // max(size, 1))))
    return [call.on(SETTINGS.device) for _ in range(count)]


def attempt(peer: str, where: str, function: Callable[[], object]) -> object:
    """function(); None where a peer cannot run: it may be absent from this machine, or refuse a size. Noted in MISSING.

    On the CPU every peer is PyTorch itself, and an error is one of the benchmark's: it is raised.
    """
    if not SETTINGS.gpu:
        return function()
    try:
        return function()
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        MISSING.setdefault((peer, f"{type(error).__name__}: {lines[0][:200]}"), []).append(where)


def milliseconds(run: Callable[..., object], *args, queued: bool = True) -> float:
    """The time of run(*args): by the host's clock (or `processor`); on a GPU, between events around what it launches.

    Args:
        queued: the GPU first reads through a large tensor, so that its caches are cold and the host is ahead of it, as
            it is in training: the time of the kernels. Else launches count where the GPU waits for them.
    """
    if not SETTINGS.gpu:
        clock = time.process_time if SETTINGS.processor else time.perf_counter
        start = clock()
        run(*args)
        return (clock() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if queued:
        for _ in range(4):  # a millisecond at 4 TB/s; reads, since a write would leave lines to be written back
            large().sum()
    begin.record()
    run(*args)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def interleave(providers: dict[str, Callable[[int], object]], inputs: int, queued: bool = True) -> dict[str, list]:
    """Milliseconds of each provider in each round: provider(i) runs on input i.

    Providers take turns, each on an input that no other has just brought into the cache.
    """
    for run in providers.values():
        for _ in range(3 if SETTINGS.gpu else 1):  # kernels compile, workspaces are allocated
            run(0)
    times = {name: [] for name in providers}
    began = time.perf_counter()
    for round_ in range(SETTINGS.rounds):
        if round_ >= LEAST_ROUNDS and time.perf_counter() - began > SETTINGS.seconds:
            break
        for turn, (name, run) in enumerate(providers.items()):
            i = (round_ + turn * inputs // len(providers)) % inputs  # not the input that the one before has just warmed
            times[name].append(milliseconds(run, i, queued=queued))
    return times


@functools.cache
def large() -> torch.Tensor:
    """fp32 ones that fit no cache: 256 MiB, on a GPU 1 GiB."""
    return torch.ones((8 if SETTINGS.smoke else 1024 if SETTINGS.gpu else 256) << 18, device=SETTINGS.device)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a millisecond, read and written, of torch's copy of a large tensor: the roofline of memory-bound ops."""
    target = torch.empty_like(large())
    target.copy_(large())
    times = [milliseconds(target.copy_, large()) for _ in range(5)]
    return 2 * target.nbytes / statistics.median(times)


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a millisecond of a product of two square matrices, torch's or ours, whichever is faster
    here: the roofline of matrix work."""
    size = 256 if SETTINGS.smoke else 8192 if SETTINGS.gpu else 2048
    a, b = (torch.randn(size, size, device=SETTINGS.device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(milliseconds(product, a, b) for product in (torch.mm, linear) for _ in range(7))


def compare(
    benchmark,
    op: str,
    case: str,
    providers: dict[str, Callable[[int], object]],
    *,
    inputs: int = 1,
    queued: bool = True,
    bytes_moved: int | None = None,
    flops: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Row]:
    """Time providers against each other (the first one is ours), note rows for the table, feed pytest-benchmark.

    Args:
        benchmark: pytest-benchmark's fixture: ours is recorded there, with the ratios as extra_info.
        providers: name -> run(i), on input i of `inputs`. A peer that cannot run is left out and named in MISSING.
        queued: see `milliseconds`.
        bytes_moved: what one run of ours must read and write at the least; gives the share of copy bandwidth.
        flops: what the problem asks for at the least, padding left out; gives the share of a product in `dtype`.
    """
    (first, ours), *peers = providers.items()
    able = [peer for peer in peers if attempt(peer[0], f"{op} {case}", lambda run=peer[1]: (run(0),))]
    times = interleave({first: ours} | dict(able), inputs, queued)
    rows: dict[str, Row] = {}
    for name, values in times.items():
        quartiles = statistics.quantiles(values, n=4)
        row = Row(op, case, name, statistics.median(values), (quartiles[0], quartiles[2]))
        row.ratio = row.median_ms / statistics.median(times[first])
        if bytes_moved is not None:
            row.roof, row.roof_share = "copy", bytes_moved / row.median_ms / copy_bandwidth()
        if flops is not None:
            row.roof, row.roof_share = "product", flops / row.median_ms / product_rate(dtype)
        rows[name] = row
    ROWS.extend(rows.values())
    benchmark.extra_info.update({f"{name} / ours": round(row.ratio, 3) for name, row in rows.items()})
    benchmark.pedantic(lambda: milliseconds(ours, 0, queued=False), rounds=3, warmup_rounds=0)
    return rows


def compare_op(
    benchmark,
    op: str,
    case: str,
    calls: list[Call],
    mode: str,
    providers: dict,
    bytes_moved: int | None = None,
    flops: int | None = None,
    backward_flops: float = 2.0,
) -> dict[str, Row]:
    """`compare` for one op: each provider has the op's public signature and runs on every Call of `calls`.

    Args:
        providers: name -> function, or (function, calls of its own): a peer may need its inputs padded beforehand. On a
            GPU ours runs with impl="cuda", too, and those whose names begin with "eager" run compiled, too.
        mode: "forward" (no grad) or "forward+backward" (gradients of every leaf of the Call).
        bytes_moved: of the forward pass; the backward pass is taken to move as much again.
        flops: of the forward pass; the backward pass needs `backward_flops` times as many.
    """
    dtype = next((x.dtype for x in calls[0].tensors() if x.is_floating_point()), torch.float32)
    (first, ours), *_ = providers.items()
    if SETTINGS.gpu and "cuda" in _backends.LOADED[op].modules:
        cuda = functools.partial(ours, impl="cuda")

        def is_right():
            references = (call.run(ours, impl="reference") for call in (calls[0], calls[0].to(torch.float64)))
            testing.assert_error_rules(calls[0].run(cuda), *references)
            return True

        if attempt(f"{first}, cuda", f"{op} {mode} {case}", is_right):
            providers |= {f"{first}, cuda": cuda}
    providers = {name: p if isinstance(p, tuple) else (p, calls) for name, p in providers.items()}
    if SETTINGS.gpu:
        torch._dynamo.reset()  # or, after eight sizes of one function, "compiled" would quietly mean eager
        providers |= {
            f"{name}, compiled": (torch.compile(function, dynamic=False), its)
            for name, (function, its) in providers.items()
            if name.startswith("eager")
        }

    def floats(function, call):
        out = function(*call.args, **call.kwargs)
        return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]

    def runner(function, calls):  # each with gradients of its own: a peer's output may be padded
        def forward(i):
            with torch.no_grad():
                return function(*calls[i].args, **calls[i].kwargs)

        if mode == "forward":
            return forward
        gradients = [[torch.randn_like(x) for x in floats(function, call)] for call in calls]
        return lambda i: torch.autograd.grad(floats(function, calls[i]), calls[i].leaves(), gradients[i])

    if mode != "forward":
        bytes_moved = bytes_moved and 2 * bytes_moved
        flops = flops and (1 + backward_flops) * flops
    (first, ours), *peers = providers.items()
    runners = {first: runner(*ours)}
    runners |= {name: attempt(name, f"{op} {mode} {case}", lambda p=p: runner(*p)) for name, p in peers}
    runners = {name: run for name, run in runners.items() if run}
    roofs = {"bytes_moved": bytes_moved, "flops": flops, "dtype": dtype}
    return compare(benchmark, f"{op} {mode}", case, runners, inputs=len(calls), **roofs)
