"""Summary: how a call of `pretrain` went, as a record and as text."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from m3ae_fast.data.loader import LEFT_OUT

SHOWN = 5  # damaged samples that are named


@dataclass
class Summary:
    """The result of a call of `pretrain`, equal in all of its processes except for what each one measures: seconds,
    wait_seconds, tokens_per_second. Counts, times and rates are of this call, not of what it resumed."""

    folder: Path  # of the run
    step: int = 0  # steps taken in all
    steps: int = 0  # steps of the whole run
    bad_steps: int = 0  # steps in all that were not finite and were skipped: bad_steps/ has their batches
    interrupted: bool = False  # by Ctrl-C or SIGTERM
    last: dict = field(default_factory=dict)  # the last row of metrics.jsonl, {} where no step was taken
    tokens: int = 0  # patches and words of the batches
    seconds: float = 0.0  # of the call
    wait_seconds: float = 0.0  # of those, spent waiting for data
    counters: dict = field(default_factory=dict)  # images skipped, texts cut, ...: Loader.counters
    workers_died: int = 0  # how often data workers were started again
    images: int = 0  # of the batches
    read_seconds: float = 0.0  # spent making batches, by all workers together; a mean over the run's processes
    workers: int = 0  # processes that made them for each of those; 0: itself
    processes: int = 1  # of the run
    skipped: dict = field(default_factory=dict)  # samples that could not be read and were replaced, by what was damaged
    streamed: list = field(default_factory=list)  # the run's data, where a command or a server gives some of them
    bad: list = field(default_factory=list)  # the first of those and all shards that are damaged, as text


def print_summary(summary: Summary) -> None:
    """What a call of `pretrain` did, and how to go on."""
    folder = summary.folder
    if not summary.last:
        print(f"nothing to do: {folder} has taken all of its {summary.steps} steps; --resume --steps N gives it more")
        return
    rate = summary.tokens / summary.seconds
    print(
        f"\n{summary.step:,} of {summary.steps:,} steps; {summary.seconds:,.1f} s, "
        f"of which {summary.wait_seconds:,.1f} s waiting for data; {rate:,.0f} tokens/s"
    )
    others = ("step", "lr", "bad_steps", "tokens_per_second")
    losses = {name: value for name, value in summary.last.items() if name not in others}
    print("last step: " + ", ".join(f"{name} {as_text(value)}" for name, value in losses.items()))
    if summary.bad_steps:
        print(f"steps skipped, not finite: {summary.bad_steps:,} (batches: {folder / 'bad_steps'})")
    counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in summary.counters.items())
    print(f"samples: {counts}")
    if summary.workers_died:
        print(f"data workers died and were started again: {summary.workers_died:,} times")
    print_data(summary)
    if summary.step < summary.steps:
        streamed = "".join(f" --data {shlex.quote(spec)}" for spec in summary.streamed)
        print(f"continue with: m3ae-fast pretrain --out {shlex.quote(str(folder))} --resume{streamed}")
    if not summary.interrupted:
        print(f"pictures: {folder / 'pictures'}")
    print(f"numbers: {folder / 'metrics.jsonl'}, tensorboard --logdir {shlex.quote(str(folder / 'tensorboard'))}")


def as_text(loss: float | None) -> str:
    """A loss, or another number of a step, as it is printed."""
    return "not finite" if loss is None else f"{loss:.4f}"


def print_data(summary: Summary) -> None:
    """How fast it came, and what was wrong with it."""
    if summary.images:
        by = f"{summary.workers} worker{'s' if summary.workers > 1 else ''}" if summary.workers else "this process"
        if summary.processes > 1:  # the images of all of them are counted
            by = f"{summary.processes} x {by}" if summary.workers else f"these {summary.processes} processes"
        able = summary.images / summary.read_seconds * max(1, summary.workers)
        used = summary.images / max(summary.seconds - summary.wait_seconds, 1e-9)
        print(f"images: {able:,.0f}/s is what {by} can load, {used:,.0f}/s what the model takes")
    for left_out, why in ((False, "for something was damaged"), (True, "for they are not of the kind wanted")):
        skipped = sorted((kind, count) for kind, count in summary.skipped.items() if (kind in LEFT_OUT) == left_out)
        if skipped:
            print(f"replaced by other samples, {why}: {', '.join(f'{kind} {count:,}' for kind, count in skipped)}")
    for bad in summary.bad[:SHOWN]:
        print(f"  {bad}")
    if len(summary.bad) > SHOWN:
        print("  ...")
