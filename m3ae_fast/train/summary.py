"""Summary: how a call of `pretrain` went."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Summary:
    """How a call of `pretrain` went, the same in all of its processes but for what each one's own clock says: seconds,
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
    bad: list = field(default_factory=list)  # the first of those and all shards that are damaged, as text
