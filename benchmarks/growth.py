"""How cost grows: `python -m benchmarks.growth docs/growth.png` (and docs/growth.json).

Left: a training step of M3AE-S over the tokens of its batch. Right: attention forward and backward over the length of
its sequences, 4,096 tokens in all (3,200 at 1,600). Ours and the peers, interleaved, medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import measure, report
from benchmarks.models import bench_m3ae
from benchmarks.ops import bench_varlen_attention as attention
from m3ae_fast import SeqLens, testing, varlen_attention
from m3ae_fast.models import M3AEConfig

TOKENS, HEADS, HEAD_DIM = 4096, 8, 64
measure.SETTINGS.seconds = 10.0


def over_tokens() -> list[dict]:
    config, shape = M3AEConfig.small(), testing.SHAPES["m3ae_small"]
    points = []
    for size in (1, 2, 4, 8):
        batch = bench_m3ae.make_batch(config, dataclasses.replace(shape, batch=size), seed=0)
        steps = {}
        for provider in ("m3ae_fast", "padded, eager"):
            model, loss_of = bench_m3ae.make_model(config, provider, [batch])
            steps[provider] = bench_m3ae.make_step(model, loss_of, "fp32")
        tokens = size * (1 + config.patches) + batch.text_lengths.total
        points.append({"x": tokens, **medians(steps)})
    return points


def over_length() -> list[dict]:
    points = []
    for longest in (50, 100, 200, 400, 800, 1600, 4096):
        count = TOKENS // longest
        lens = [longest - longest * i // (5 * count) for i in range(count)]  # ragged: the shortest a fifth shorter
        qkv = [torch.randn(sum(lens), HEADS, HEAD_DIM, requires_grad=True) for _ in range(3)]
        call = testing.Call((*qkv, SeqLens(lens)))
        padded = attention.padded_call(call)

        def both(function, call):
            out = function(*call.args, **call.kwargs)
            return torch.autograd.grad(out, call.leaves(), torch.ones_like(out))

        times = medians(
            {
                "m3ae_fast": lambda i, call=call: both(varlen_attention, call),
                "SDPA, padded + mask": lambda i, call=padded: both(F.scaled_dot_product_attention, call),
                "SDPA, a loop": lambda i, call=call: both(attention.loop, call),
            }
        )
        points.append({"x": longest, **times})
    return points


def medians(providers: dict) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in measure.interleave(providers, 1).items()}


def draw(path: Path, about: dict, curves: dict[str, list[dict]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    labels = {
        "step": ("a training step of M3AE-S, fp32", "tokens of the batch"),
        "attention": ("attention, forward + backward, 8 heads x 64, fp32", "longest sequence"),
    }
    for ax, (name, points) in zip(axes, curves.items(), strict=True):
        for provider in [key for key in points[0] if key != "x"]:
            ax.plot([p["x"] for p in points], [p[provider] for p in points], marker="o", label=provider)
        ax.set(title=labels[name][0], xlabel=labels[name][1], ylabel="ms", xscale="log", yscale="log")
        ax.grid(alpha=0.3, which="both")
        ax.legend()
    figure.suptitle(f"{about['CPU']}, {about['instruction set']}, {torch.get_num_threads()} threads, {about['date']}")
    figure.savefig(path, dpi=100)


def main(path: Path) -> None:
    about = report.machine()
    curves = {"step": over_tokens(), "attention": over_length()}
    path.with_suffix(".json").write_text(json.dumps({"machine": about, "curves_ms": curves}, indent=1) + "\n")
    draw(path, about, curves)


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.growth", description="Measure how cost grows.")
    parser.add_argument("picture", type=Path, metavar="OUT.png", help="the numbers go into OUT.json")
    main(parser.parse_args().picture)
