"""What a call costs on the host: microseconds of every op on tiny tensors, milliseconds of whole training steps.

python -m benchmarks.host [--base TREE] [--op layer_norm] [--page docs/host.md] [--json FILE] [--smoke]

Two devices, each in a process of its own, on one thread: the CPU ("cpu"), and a GPU that need not be there ("gpu"):
Triton's launches on the stub of benchmarks/stub_gpu.py. Beside each op stands the call of torch.nn.functional that it
replaces, on tensors of the same size, interleaved with it; the tables have medians. --base measures another checkout,
too, with its own compiled module, and prints "before → after".
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# m3ae_fast is imported in functions: a child takes it from the tree that it measures, a stubbed GPU being there first.

ROOT = Path(__file__).parents[1]
DEVICES = {"cpu": "CPU", "gpu": "GPU, launches stubbed"}
ROWS, WIDTH, HEADS = 8, 64, 2
THIN = 32  # width of a whole model: wider, products on the CPU take longer than a GPU's launches
TURN = 20  # calls of one provider before it is another's turn
TURNS, STEPS = 50, 30
SIZES = {"tiny": "tiny", "small": "small, base", "large": "large", "huge": "huge"}  # base is as deep as small
MEASURED = "## Measured"
PARTS = ("no gradient", "forward", "backward", "both")


# -- a child: one tree, one device -------------------------------------------------------------------------------------


def child(tree: str, device: str, ops: list[str] | None, smoke: bool) -> dict[str, list[dict]]:
    """{"ops": rows, "steps": rows} of the m3ae_fast in `tree`; steps where no op is named."""
    sys.path.insert(0, tree)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what a stubbed kernel leaves unwritten may be any number
    torch.manual_seed(0)
    if device == "gpu":
        from benchmarks import stub_gpu

        stub_gpu.install()
    import m3ae_fast
    from m3ae_fast import _backends

    assert Path(m3ae_fast.__file__).parents[1] == Path(tree), f"m3ae_fast is that of {m3ae_fast.__file__}"
    rows = [measure_op(op, 1 if smoke else TURNS) for op in ops or sorted(_backends.LOADED)]
    return {"ops": rows, "steps": [] if ops else steps(device, smoke)}


def pair(op: str) -> tuple:
    """Our call of an op, then its peer's name, function and call. An op without a peer has F.layer_norm."""
    from m3ae_fast import SeqLens, testing
    from m3ae_fast.testing import Call

    F = torch.nn.functional

    def param(*size):
        return torch.randn(size).requires_grad_()

    def smallest():  # of a model with 8 rows in its encoder: CLS, a patch and two words of each of two samples
        shape = testing.ModelShape(2, 8, 4, WIDTH, HEADS, WIDTH, HEADS, WIDTH, (8, 8))
        with mock.patch.dict(testing.SHAPES, small=shape):
            return testing.cases(op).make(testing.cases(op).SMALL[0])

    x, weight, bias, scale = param(ROWS, WIDTH), param(WIDTH, WIDTH), param(WIDTH), param(WIDTH)
    target, rows = torch.randint(WIDTH, (ROWS,)), torch.randn(ROWS, WIDTH)
    q, k, v = (param(ROWS, HEADS, WIDTH // HEADS) for _ in range(3))
    by_head = [each.detach().transpose(0, 1)[None].contiguous().requires_grad_() for each in (q, k, v)]
    norm = "F.layer_norm", F.layer_norm, Call((x, (WIDTH,), scale, bias))
    mse = "F.mse_loss", F.mse_loss, Call((x, rows))
    if op == "layer_norm":
        return Call((x, scale, bias)), *norm
    if op == "linear":
        return Call((x, weight, bias)), "F.linear", F.linear, Call((x, weight, bias))
    if op == "varlen_attention":
        attention = F.scaled_dot_product_attention
        return Call((q, k, v, SeqLens([ROWS]))), "F.scaled_dot_product_attention", attention, Call(tuple(by_head))
    if op == "linear_cross_entropy":
        return (
            Call((x, weight, target, bias)),
            "F.linear, F.cross_entropy",
            lambda x, weight, target, bias: F.cross_entropy(F.linear(x, weight, bias), target),
            Call((x, weight, target, bias)),
        )
    if op == "feature_regression":
        return Call((x, rows)), *mse
    return smallest(), *(mse if op == "masked_mse" else norm)


def measure_op(op: str, turns: int) -> dict:
    """A row: medians in microseconds of ours, of the peer and of the op's reference, which is plain PyTorch, by PARTS
    (without a gradient, the first alone)."""
    import m3ae_fast

    ours, peer, function, theirs = pair(op)
    public = getattr(m3ae_fast, op)
    reference = functools.partial(public, impl="reference")
    providers = {"ours": (public, ours), "theirs": (function, theirs), "reference": (reference, ours)}
    row = {"op": op, "peer": peer}
    times = {name: {part: [] for part in PARTS} for name in providers}
    for turn in range(turns + 1):
        for name, (run, call) in providers.items():
            found = measured(run, call)
            for part in PARTS if turn else ():  # the first is to warm up: kernels compile
                times[name][part] += found[part]
    for name, parts in times.items():
        row[name] = {part: statistics.median(values) for part, values in parts.items() if values}
    return row


def measured(run: Callable, call) -> dict[str, list[float]]:
    """Microseconds of each call of one turn, by PARTS."""
    times, clock, leaves = {part: [] for part in PARTS}, time.perf_counter, call.leaves()
    args, kwargs = call.args, call.kwargs
    with torch.no_grad():
        for _ in range(TURN):
            start = clock()
            run(*args, **kwargs)
            times["no gradient"].append(1e6 * (clock() - start))
    if not leaves:
        return times
    for _ in range(TURN):
        start = clock()
        out = run(*args, **kwargs)
        forward = clock() - start
        out = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad]
        gradients = [torch.ones_like(x) for x in out]
        start = clock()
        torch.autograd.grad(out, leaves, gradients)
        backward = clock() - start
        for part, seconds in zip(PARTS[1:], (forward, backward, forward + backward), strict=True):
            times[part].append(1e6 * seconds)
    return times


def steps(device: str, smoke: bool) -> list[dict]:
    """Rows of whole steps: thin models as deep as the real ones; on the CPU also the real M3AE-tiny, with AdamW."""
    from benchmarks.models import bench_m3ae
    from m3ae_fast import testing
    from m3ae_fast.models import M3AEConfig

    thin = {
        "image_size": 16, "patch_size": 4, "vocab_size": 64, "max_text_length": 16, "width": THIN, "heads": HEADS,
        "decoder_width": THIN, "decoder_heads": HEADS,
    }  # fmt: skip
    shape = testing.ModelShape(2, 16, 4, THIN, HEADS, THIN, HEADS, 64, (8, 12))
    rows, repeats = [], 2 if smoke else STEPS
    for precision in ("fp32", "bf16"):
        for size, name in list(SIZES.items())[: 1 if smoke else None]:
            config = M3AEConfig.preset(size, **thin)
            row = {"model": f"{name}: {config.depth} + {config.decoder_depth} blocks", "precision": precision}
            rows.append(row | measure_step(config, bench_m3ae.make_batch(config, shape, 0), precision, repeats))
    if device == "cpu":
        config, shape = bench_m3ae.SIZES["m3ae_tiny"]
        row = {"model": f"M3AE-tiny itself, batch {shape.batch}, with AdamW", "precision": "fp32"}
        rows.append(row | measure_training(config, shape, repeats))
    return rows


def measure_step(config, batch, precision: str, repeats: int) -> dict:
    """Milliseconds of a plan, a forward and a backward pass, and of the last two of the padded PyTorch model."""
    from benchmarks import padded_m3ae
    from m3ae_fast.models import M3AE

    ours, theirs = M3AE(config), padded_m3ae.PaddedM3AE(config)
    plan = ours.plan(batch, seed=0)
    masks = plan.image.as_bool(config.patches), plan.text.as_bool(batch.text_lengths.max)
    padded = padded_m3ae.padded_inputs(batch, *masks)
    providers = {
        "ours": (ours, lambda: ours.plan(batch, seed=0), lambda plan: ours(batch, plan=plan).loss),
        "theirs": (theirs, lambda: None, lambda _: theirs(*padded)),
    }
    times = {name: {part: [] for part in ("plan", *PARTS[1:])} for name in providers}
    for repeat in range(repeats + 1):
        for name, (model, prepare, loss_of) in providers.items():
            marks = [time.perf_counter()]
            prepared = prepare()
            marks.append(time.perf_counter())
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of(prepared)
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            model.zero_grad(set_to_none=True)
            for part, first, last in (("plan", 0, 1), ("forward", 1, 2), ("backward", 2, 3), ("both", 1, 3)):
                if repeat:
                    times[name][part].append(1e3 * (marks[last] - marks[first]))
    del times["theirs"]["plan"]
    return {name: {part: statistics.median(each) for part, each in parts.items()} for name, parts in times.items()}


def measure_training(config, shape, repeats: int) -> dict:
    """Milliseconds of masks, forward, backward and AdamW, and of the same with the padded PyTorch model."""
    from benchmarks.models import bench_m3ae

    batches = [bench_m3ae.make_batch(config, shape, seed) for seed in range(2)]
    run = {
        name: bench_m3ae.make_step(*bench_m3ae.make_model(config, provider, batches), "fp32")
        for name, provider in {"ours": "m3ae_fast", "theirs": "padded, eager"}.items()
    }
    times = {name: [] for name in run}
    for repeat in range(repeats + 1):
        for name, step in run.items():
            start = time.perf_counter()
            step(repeat % 2)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"both": statistics.median(values)} for name, values in times.items()}


# -- the parent ------------------------------------------------------------------------------------------------------


def measure(device: str, tree: Path | None = None, ops: list[str] | None = None, smoke: bool = False) -> dict:
    """What `child` returns, of a process of its own. tree: None for the m3ae_fast that is imported here."""
    import m3ae_fast

    tree = (tree or Path(m3ae_fast.__file__).parents[1]).resolve()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        asked = json.dumps({"tree": str(tree), "device": device, "ops": ops, "smoke": smoke})
        subprocess.run(
            [sys.executable, "-m", "benchmarks.host", "--child", asked, "--json", result.name],
            cwd=ROOT, env=environment, check=True,
        )  # fmt: skip
        return json.loads(Path(result.name).read_text())


def machine(base: Path | None) -> dict[str, str]:
    """Everything that a number depends on."""
    from benchmarks import report
    from m3ae_fast._cpp import _C

    about = {
        "date": datetime.date.today().isoformat(),
        "commit": report.said_by("git", "describe", "--always", "--dirty", "--exclude=*"),
        "torch": torch.__version__,
        "Triton": report.version("triton"),
        "CPU": f"{report.processor()}, {os.cpu_count()} cores, one thread",
        "instruction set": _C.active_isa(),
    }
    if base is not None:
        about["before"] = report.said_by("git", "-C", str(base.resolve()), "describe", "--always", "--exclude=*")
    return about


def numbers(now: dict, before: dict | None, part: str) -> str:
    """One part: before → now, or the one number."""
    if part not in now:
        return ""
    values = [each[part] for each in (before, now) if each is not None]
    return " → ".join(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in values)


def ratio(row: dict, before: dict | None, part: str) -> str:
    """Ours over theirs, each tree's against the peer that took turns with it."""
    if part not in row["ours"]:
        return ""
    return " → ".join(f"{each['ours'][part] / each['theirs'][part]:.1f}x" for each in (before, row) if each)


def markdown(about: dict[str, str], results: dict[str, dict], base: dict[str, dict]) -> str:
    """The tables. results, base: by device, what `measure` returns; base is empty without one."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    for device, result in results.items():
        before = {row["op"]: row for row in base[device]["ops"]} if base else {}
        lines += ["", f"### Ops, {DEVICES[device]}: microseconds", ""]
        lines += [
            "| op | peer | no gradient | peer | ratio | forward | peer | backward | peer | both | peer | ratio "
            "| plain PyTorch, no gradient | both |",
            "|" + "---|" * 14,
        ]
        for row in result["ops"]:
            was, cells = before.get(row["op"]), [row["op"], row["peer"]]
            for part in PARTS:
                cells += [numbers(row["ours"], was and was["ours"], part)]
                cells += [numbers(row["theirs"], None, part) if part in row["ours"] else ""]
                cells += [ratio(row, was, part)] * (part in ("no gradient", "both"))
            cells += [numbers(row["reference"], None, part) for part in ("no gradient", "both")]
            lines.append("| " + " | ".join(cells) + " |")
    if any(result["steps"] for result in results.values()):
        lines += ["", "### Whole steps: milliseconds", ""]
        lines += ["| device | model | precision | plan | forward | backward | both | padded PyTorch | ratio |"]
        lines += ["|" + "---|" * 9]
    for device, result in results.items():
        before = {(row["model"], row["precision"]): row for row in base[device]["steps"]} if base else {}
        for row in result["steps"]:
            was, cells = before.get((row["model"], row["precision"])), [device, row["model"], row["precision"]]
            cells += [numbers(row["ours"], was and was["ours"], part) for part in ("plan", *PARTS[1:])]
            lines.append(
                "| " + " | ".join([*cells, numbers(row["theirs"], None, "both"), ratio(row, was, "both")]) + " |"
            )
    return "\n".join(lines)


def main() -> None:
    """The command above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="another checkout, to be measured as 'before'")
    parser.add_argument("--op", action="append", help="this op alone, and no steps; may be given several times")
    parser.add_argument("--device", choices=DEVICES, help="this one alone")
    parser.add_argument("--page", type=Path, help=f"write what is printed there, in place of all after {MEASURED!r}")
    parser.add_argument("--json", type=Path, help="write every number there, too")
    parser.add_argument("--smoke", action="store_true", help="few rounds: proves that it runs, measures nothing")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        options.json.write_text(json.dumps(child(**options.child)))
        return
    if options.page and MEASURED not in (options.page.read_text(encoding="utf-8") if options.page.exists() else ""):
        parser.error(f"--page must be a file with the line {MEASURED!r}, got {options.page}")
    devices = [options.device] if options.device else list(DEVICES)
    about, load = machine(options.base), os.getloadavg()[0]
    base, results = {}, {}
    for device in devices:
        if options.base:
            base[device] = measure(device, options.base, options.op, options.smoke)
        results[device] = measure(device, None, options.op, options.smoke)
    about["load"] = f"{load:.1f} before, {os.getloadavg()[0]:.1f} after"
    text = markdown(about, results, base)
    print(text)
    if options.page:
        before = options.page.read_text(encoding="utf-8").partition(MEASURED)[0]
        options.page.write_text(f"{before}{MEASURED}\n\n{text}\n", encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "after": results, "before": base}, indent=1) + "\n")


if __name__ == "__main__":
    main()
