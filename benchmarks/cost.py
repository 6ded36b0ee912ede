"""What a pre-training run costs: `python -m benchmarks.cost docs/scale.md` writes the tables of that page anew.

A model of it, from the architecture alone: the products of a step, what its optimizer reads and writes, what processes
send each other. Where docs/gpu_step.json is there (`benchmarks/gpu.sh step`), its measured steps take the place of the
assumed share of a GPU's peak.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

from m3ae_fast.models import M3AE, M3AEConfig

ROOT = Path(__file__).parents[1]
SIZES = ("small", "base", "large", "huge")
WORDS = 21  # of a caption: the mean of the benchmarks' 10 to 32
BATCH = 4096  # samples of a step, over all GPUs
RUNS = {"CC12M, 50 epochs": 12_423_374 * 50, "1 B pairs, once": 1_000_000_000}
GPUS = (1, 8, 64)
# Data sheets of the H100 SXM and the DGX H100: dense bf16 FLOPs a second; bytes a second, one way, of a GPU's NVLink,
# and of a machine's eight links of 400 Gb/s InfiniBand
PEAK, NVLINK, INFINIBAND = 989e12, 450e9, 8 * 50e9
ASSUMED = (0.2, 0.35, 0.5)  # of the peak: from a careless to a very good training step
MEASURED = re.compile(r"m3ae_(\w+) bf16, batch (\d+)")


def products(config: M3AEConfig, words: int = WORDS) -> dict[str, float]:
    """FLOPs of the matrix products of a sample's forward pass: encoder, decoder, heads. A backward pass has twice as
    many."""
    c = config
    patches, kept_words = int(c.patches * (1 - c.image_mask_ratio)), max(int(words * (1 - c.text_mask_ratio)), 1)
    masked = c.patches - patches, words - kept_words
    of_image, of_text = (round(n * part) for n, part in zip(masked, c.predict_ratios, strict=True))  # predicted
    seen, predicted = 1 + patches + kept_words, of_image + of_text

    def block(width: int, tokens: int, rows: int, token_width: int | None = None) -> float:
        """Keys and values of all tokens; queries, projection and MLP of `rows`, some of them or others."""
        keys = 4 * tokens * (token_width or width) * width
        return keys + (2 * rows + 2 * rows + 4 * c.mlp_ratio * rows) * width**2 + 4 * rows * tokens * width

    if c.decoder == "cross":
        decoder = c.decoder_depth * block(c.decoder_width, seen, predicted, c.width)
    else:
        every = seen + predicted
        decoder = (c.decoder_depth - 1) * block(c.decoder_width, every, every)  # the last makes predicted rows alone
        decoder += block(c.decoder_width, every, predicted) + 2 * seen * c.width * c.decoder_width
    return {
        "encoder": c.depth * block(c.width, seen, seen) + 2 * patches * c.patch_dim * c.width,
        "decoder": decoder,
        "heads": 2 * c.decoder_width * (of_image * c.patch_dim + of_text * c.vocab_size),
    }


def training(config: M3AEConfig, words: int = WORDS) -> float:
    """FLOPs of a sample, forward and backward."""
    return 3 * sum(products(config, words).values())


def parameters(config: M3AEConfig) -> int:
    """Of the whole model."""
    with torch.device("meta"):
        return sum(p.numel() for p in M3AE(config).parameters())


def sent(config: M3AEConfig, gpus: int) -> float:
    """Bytes that a GPU sends in a step of one pass. DDP: a ring all-reduce of fp32 gradients, 2 x 4 bytes a parameter.
    FSDP2 in bf16: two gathers of 2 bytes and a reduce-scatter of 4, the same."""
    return 8 * parameters(config) * (gpus - 1) / gpus


def seconds(config: M3AEConfig, samples: float, gpus: int, rate: float) -> float:
    """Of a run on `gpus` GPUs that compute `rate` FLOPs a second each; what is sent goes on beside the backward pass,
    two thirds of a step, and counts as far as it takes longer."""
    compute = BATCH * training(config) / (gpus * rate)
    link = NVLINK if gpus <= 8 else INFINIBAND
    return samples / BATCH * (compute + max(sent(config, gpus) / link - compute * 2 / 3, 0))


def measured(path: Path) -> dict[str, float]:
    """FLOPs a second by size, of the measured steps of docs/gpu_step.json; {} where there is none."""
    rates = {}
    for row in json.loads(path.read_text())["rows"] if path.is_file() else []:
        case = MEASURED.fullmatch(row["case"])
        if case and (row["op"], row["provider"]) == ("M3AE step", "m3ae_fast"):
            rates[case[1]] = int(case[2]) * training(M3AEConfig.preset(case[1])) / (row["median_ms"] / 1e3)
    return rates


def cpu_check(path: Path) -> list[list[str]]:
    """Predicted against measured: M3AE-S, batch 8, on the machine of docs/cpu.json. Its products at the rate of a large
    one, and AdamW's 28 bytes a parameter at the bandwidth of a copy, both measured there."""
    found, config = json.loads(path.read_text()), M3AEConfig.small()
    bandwidth = float(found["machine"]["copy bandwidth"].split()[0]) * 1e9
    rows = []
    for precision in ("fp32", "bf16"):
        rate = float(found["machine"][f"product, {precision}"].split()[0]) * 1e9
        predicted = 8 * training(config) / rate + 28 * parameters(config) / bandwidth
        (step,) = (
            row["median_ms"] / 1e3
            for row in found["rows"]
            if (row["op"], row["case"], row["provider"]) == ("M3AE step", f"m3ae_small {precision}", "m3ae_fast")
        )
        rows.append([f"M3AE-S {precision}, batch 8", f"{predicted:.2f} s", f"{step:.2f} s", f"{step / predicted:.2f}"])
    return rows


def tables(docs: Path) -> dict[str, str]:
    """The tables of docs/scale.md by name, from what is measured in `docs`."""
    configs = {size: M3AEConfig.preset(size) for size in SIZES}
    models, costs, rates = [], {run: [] for run in RUNS}, measured(docs / "gpu_step.json")
    for size, config in configs.items():
        count, flops = parameters(config), training(config)
        parts = [f"{3 * part / 1e9:.0f}" for part in products(config).values()]
        traffic = sent(config, 64)
        models.append([
            size, f"{count / 1e6:.0f} M", *parts, f"{flops / 1e9:.0f}", f"{16 * count / 1e9:.1f} GB",
            f"{traffic / 1e9:.1f} GB", *(f"{1e3 * traffic / link:.1f} ms" for link in (NVLINK, INFINIBAND, 50e9)),
        ])  # fmt: skip
        shares = [rates[size] / PEAK] if size in rates else ASSUMED
        for run, samples in RUNS.items():
            times = {n: [seconds(config, samples, n, share * PEAK) for share in shares] for n in GPUS}
            costs[run].append([
                size, ("measured: " if size in rates else "assumed: ") + _range([100 * s for s in shares], "%"),
                *(_range([t / 3600 for t in times[n]], "h") for n in GPUS),
                _range([share * PEAK / flops for share in shares], ""),
            ])  # fmt: skip
    costs_of = [f"{n} GPU{'s' * (n > 1)}" for n in GPUS]
    columns = ["model", "share of the peak", *costs_of, "images/s of a GPU"]
    return {
        "models": _table(
            ["model", "parameters", "encoder", "decoder", "heads", "GFLOP a sample", "held",
             "sent in a step", "NVLink", "InfiniBand x 8", "x 1"], models,
        ),
        "check": _table(["step", "predicted", "measured", "measured / predicted"], cpu_check(docs / "cpu.json")),
        **{run: _table(columns, rows) for run, rows in costs.items()},
    }  # fmt: skip


def _range(values: list[float], unit: str) -> str:
    low, high = min(values), max(values)
    shown = [f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in ((low, high) if high > low else (low,))]
    return f"{' - '.join(shown)} {unit}".strip()


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def renewed(page: str, docs: Path) -> str:
    """The page with every table between `<!-- table: NAME -->` and `<!-- end -->` as it is now."""
    for name, table in tables(docs).items():
        marks = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
        page, found = marks.subn(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", page)
        if found != 1:
            raise ValueError(f"the page must have one place for the table {name!r}, got {found}")
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.cost", description="What a pre-training run costs.")
    parser.add_argument("page", type=Path, metavar="PAGE.md", help="its tables are written anew, such as docs/scale.md")
    path = parser.parse_args().page
    path.write_text(renewed(path.read_text(encoding="utf-8"), ROOT / "docs"), encoding="utf-8")
