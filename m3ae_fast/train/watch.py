"""What happens beside the steps of a run: requests to stop, a progress bar, and a check whether the model waits for
data."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data import Loader
from m3ae_fast.train import checkpoint, distributed, run
from m3ae_fast.train.config import RunConfig
from m3ae_fast.train.summary import as_text

LONG = 3600  # seconds: how long a run lasts that takes more is said once, after ESTIMATE_STEPS
ESTIMATE_STEPS = 10
WAIT_STEPS, WAIT_SHARE = 100, 0.2  # warn where waiting for data takes more than this share of so many steps


class Waiting:
    """Warns, once, where training waits for its data."""

    def __init__(self, loader: Loader):
        self._loader, self._steps, self._warned = loader, 0, False
        self._clock, self._waited = time.perf_counter(), 0.0

    def look(self, clock: float) -> None:
        """After each step, with the time."""
        self._steps += 1
        if self._warned or self._steps % WAIT_STEPS:
            return
        passed, waited = clock - self._clock, self._loader.wait_seconds - self._waited
        self._clock, self._waited = clock, self._loader.wait_seconds
        if waited > WAIT_SHARE * passed:
            self._warned = True
            message = (
                f"data is the bottleneck: {waited / passed:.0%} of the last {WAIT_STEPS} steps went by waiting for it"
            )
            warnings.warn(f"{message}; more workers may help", M3AEFastWarning, stacklevel=3)


class StopRequest:
    """Ctrl-C and SIGTERM ask for a stop (`made`) instead of tearing a step apart; the second one is not held back."""

    def __init__(self):
        self.made, self._before = False, {}

    def _ask(self, number, frame) -> None:
        self.made = True
        self.__exit__()
        if distributed.is_first():
            os.write(2, b"\nstopping after this step; once more stops at once\n")  # print could interrupt a print

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


class Progress:
    """tqdm: loss, tokens a second, time left, once in a line of its own where that is hours; where the run breaks off,
    how to go on."""

    def __init__(self, folder: Path, config: RunConfig, done: int, shown: bool):
        from tqdm import tqdm

        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants fewer lines
        self._bar = tqdm(
            total=config.steps, initial=done, disable=not shown, mininterval=interval, dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
        )  # fmt: skip
        self._folder, self._shown, self._rate, self._validated, self._probed = folder, shown, None, "", ""
        self._left, self._first, self._start = config.steps - done, done, time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        self._bar.close()
        if error is not None and self._shown and run.exists(self._folder):
            newest = checkpoint.latest(self._folder / "checkpoints").name
            print(f"broken off by {error.__name__}; {newest} is there to go on from: --resume", file=sys.stderr)

    def show(self, row: dict) -> None:
        rate = row["tokens_per_second"]
        self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
        if "val_loss" in row:
            self._validated = f", validation {as_text(row['val_loss'])}"
        if "knn_accuracy" in row:
            self._probed = f", k-NN {as_text(row['knn_accuracy'])} (chance {row['knn_chance']:.4f})"
        losses = f"loss {as_text(row['loss'])}{self._validated}{self._probed}"
        self._bar.set_postfix_str(f"{losses}, {self._rate:,.0f} tokens/s", refresh=False)
        self._bar.update()
        if self._shown and row["step"] == self._first + ESTIMATE_STEPS:
            self._estimate((time.perf_counter() - self._start) / ESTIMATE_STEPS)

    def _estimate(self, seconds: float) -> None:
        """Say how long the run will take, by the seconds of a step, where that is hours."""
        if seconds * self._left > LONG:
            hours = f"about {seconds * self._left / 3600:,.0f} hours"
            self._bar.write(f"this run takes {hours}: {self._left:,} steps of {seconds:.2f} s", file=sys.stderr)
