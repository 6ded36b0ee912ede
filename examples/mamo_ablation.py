"""The six rows of MAMO's ablation in miniature: python examples/mamo_ablation.py OUT [--seeds 0 1 2] [--rows all ...]

Each row trains a tiny model on `shapes`, for each seed from the same weights on the same scenes, with some of the
losses, and is scored by retrieval among 500 scenes it has not seen. What is there already is not trained again. The
table, means over the seeds and standard deviations, goes to OUT/ablation.md, beside the paper's figures (COCO,
fine-tuned, arXiv:2210.04183, table 5).
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

from m3ae_fast.data.examples.files import open_pairs
from m3ae_fast.downstream.scoring.report import write
from m3ae_fast.downstream.tasks.retrieve import retrieve
from m3ae_fast.train import RunConfig, load_run, pretrain

LOSSES = ("mrm", "mim", "mlm", "itc", "itm")
ROWS = {  # losses besides ITC and ITM, and the paper's R@1 of texts and of images
    "ITC + ITM": ((), (71.9, 55.2)),
    "+ MLM": (("mlm",), (75.5, 58.0)),
    "+ MLM + MIM": (("mlm", "mim"), (74.7, 58.2)),
    "+ MRM": (("mrm",), (71.8, 55.5)),
    "+ MRM + MLM": (("mrm", "mlm"), (75.8, 59.0)),
    "all": (("mrm", "mlm", "mim"), (76.6, 59.2)),
}


def folder_of(out: Path, row: str, seed: int | str) -> Path:
    name = row.lower().replace(" + ", "_").replace("+ ", "plus_").replace(" ", "_")
    return out / f"{name}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    for seed, row in itertools.product(args.seeds, args.rows):
        folder = folder_of(args.out, row, seed)
        options = {f"{loss}_weight": 0 for loss in LOSSES if loss not in (*ROWS[row][0], "itc", "itm")}
        config = RunConfig(
            objective="mamo", precision="bf16", steps=args.steps, lr=2e-3, seed=seed, options=options or None
        )
        pretrain(config, folder, resume=(folder / "run.json").is_file())
        run = load_run(folder)
        pairs = open_pairs("shapes", image_size=64, seed=2**32, count=500)
        write(folder / "retrieval.json", retrieve(run.model, pairs, run.tokenizer), {"row": row, "step": run.step})
    print((args.out / "ablation.md").write_text(table(args.out)) and table(args.out))


def table(out: Path) -> str:
    """What is there so far, in Markdown."""
    lines = [
        "| losses | steps | seeds | ITC, R@1 text / image | re-ranked by ITM | re-ranked by both | the paper's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, (_, paper) in ROWS.items():
        runs = [json.loads(path.read_text()) for path in out.glob(f"{folder_of(out, row, '*').name}/retrieval.json")]
        if not runs:
            continue
        found = [{each["name"]: 100 * each["value"] for each in run["results"]} for run in runs]
        figures = [
            " / ".join(spread([each[f"{how}{side} R@1"] for each in found]) for side in ("text", "image"))
            for how in ("ITC ", "", "ITC + ITM ")
        ]
        steps = runs[0]["about"]["step"]
        lines.append(f"| {row} | {steps} | {len(runs)} | {' | '.join(figures)} | {paper[0]} / {paper[1]} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    deviation = f" +/- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
