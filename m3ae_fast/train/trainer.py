"""pretrain(): the training loop.

A run stopped at any step and resumed gives the same bits as one that never stopped, because nothing a step needs
lives outside the checkpoint and the step's number: data order, augmentation and masks are functions of (seed, step),
and so are torch's random numbers, reseeded at every step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.distributed import Store

from m3ae_fast import _checks
from m3ae_fast._files import remove_unfinished
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import Loader
from m3ae_fast.nn import checkpoint_blocks
from m3ae_fast.train import checkpoint, distributed, metrics, run
from m3ae_fast.train.average import Average
from m3ae_fast.train.bad_steps import BadSteps, NotFinite
from m3ae_fast.train.config import PAIRED, RunConfig
from m3ae_fast.train.pictures import REBUILDING, draw_pictures, held_out
from m3ae_fast.train.schedule import learning_rate

WAIT_STEPS, WAIT_SHARE = 100, 0.2  # waiting for data takes more than this share of so many steps: a word about it


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


def pretrain(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool | str = False,
    stop_after: int | None = None,
    progress: bool = True,
) -> Summary:
    """Train a model, writing into the folder `out` (see `m3ae_fast.train.run`).

    Under torchrun all of its processes take part (or all of a process group that is there already, with a backend for
    CPUs), each with its share of every batch; the first one writes, into a folder that all see. docs/scale.md.

    Ctrl-C and SIGTERM end it after the step in hand, with a checkpoint; a second one ends it at once.

    Args:
        config: the run. When resuming, what it is made of must be what run.json says.
        out: the run's folder, made if need be.
        resume: continue from the newest checkpoint. "auto": where `out` holds no run yet, start it, so that the same
            call can be repeated until the run is done. A call that `torchrun --max-restarts` repeats needs neither.
        stop_after: end once this many of the run's steps are taken, with a checkpoint.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is not set. FileNotFoundError: nothing to resume, no data.
        ValueError: a setting, the data or a file of the run is not as it must be. OSError: a file cannot be written.
        ChildProcessError: data workers died again and again. Whatever is raised, the newest checkpoint stays whole.
        FloatingPointError: the loss or the gradient was not finite for more than config.max_bad_steps steps in a row.
        ConnectionError: another process is gone. distributed.FailedElsewhere: the first one failed.
    """
    _checks.choice("resume", resume, (False, True, "auto"))
    with distributed.process_group(config.rank_timeout) as store:
        return _pretrain(config, Path(out), resume, stop_after, progress, store)


def _pretrain(
    config: RunConfig, folder: Path, resume: bool | str, stop_after: int | None, progress: bool, store: Store
) -> Summary:
    # torchrun --max-restarts starts again with the same words: what this launch has begun goes on, nothing older does
    begun = f"begun {folder.absolute()}"
    resume = distributed.on_first(lambda: run.exists(folder) if resume == "auto" or store.check([begun]) else resume)
    config, dataset, tokenizer = run.open_run(folder, config, resume=resume)
    rank, processes, first = distributed.rank(), distributed.world_size(), distributed.is_first()
    distributed.on_first(lambda: _refuse_what_does_not_split(config, processes))
    device = run.pick_device(distributed.own_device(config.device))
    model = run.build_model(config).to(device)
    checkpoint_blocks(model, config.checkpoint_blocks)
    spread = distributed.spread(
        model, device, shard=config.shard, bf16=config.precision == "bf16",
        unused=config.objective == "mamo",  # what is of a loss of weight 0 has no gradient
    )  # fmt: skip
    optimiser = make_optimiser(model, lr=config.lr, weight_decay=config.weight_decay)
    average = Average(model, config.ema) if config.ema else None
    checkpoints = folder / "checkpoints"
    done, bad_steps = 0, BadSteps(folder, config)
    if resume:
        path = distributed.on_first(lambda: checkpoint.latest(checkpoints))
        saved = checkpoint.load(path, model)
        before = RunConfig(**saved.config)
        run.refuse_differences(path, before, config)
        run.warn_of_other_readers(before, config, dataset)
        checkpoint.restore(saved, model, optimiser, average)
        done, bad_steps = saved.step, BadSteps(folder, config, *saved.bad_steps)
        del saved  # all of a model and its moments
    stop = config.steps if stop_after is None else min(stop_after, config.steps)
    if stop_after is not None and stop_after <= done:
        raise ValueError(f"stop_after must be more than the {done} steps already taken, got {stop_after}")

    def save() -> None:
        if first:
            rows.flush()
        counts = (bad_steps.total, bad_steps.in_a_row)
        path = checkpoint.step_path(checkpoints, done, shards=config.shard and processes > 1)
        checkpoint.save(path, done, config.to_dict(), model, optimiser, counts, average)
        if first:
            checkpoint.keep_last(checkpoints)

    @functools.cache  # one for all pictures: a stream is read to a thousand samples for it
    def shown() -> ImageTextBatch:
        return held_out(model.config, tokenizer, config)

    def draw() -> None:
        drawn = model
        if config.shard and processes > 1 and config.objective in REBUILDING:  # it draws nothing without the others
            weights = distributed.gather_weights(model)
            if first:
                drawn = run.build_model(config).to(device)
                drawn.load_state_dict(weights)
        if first:
            draw_pictures(folder, drawn, tokenizer, config, done, device, shown)

    summary = Summary(folder, done, config.steps, bad_steps.total)
    if done >= config.steps:
        return summary
    loader = Loader(
        dataset, tokenizer, image_size=model.config.image_size, seed=config.seed,
        batch_size=config.batch_size // processes, rank=rank, world_size=processes,
        max_text_length=model.config.max_text_length, start_step=done * config.accumulate, workers=config.workers,
        strict=config.strict, pairs_only=config.objective in PAIRED,
        labelled_only=config.objective == "supervised",
    )  # fmt: skip
    if resume:  # what a killed process left there takes the room of the next one
        distributed.on_first(lambda: (checkpoint.keep_last(checkpoints), remove_unfinished(bad_steps.folder)))
    else:
        distributed.on_first(lambda: run.prepare_folder(folder, tokenizer))
    start = clock = time.perf_counter()
    waiting = _Waiting(loader)
    with (
        _StopRequest() as request,
        metrics.Metrics(folder, done) if first else contextlib.nullcontext() as rows,
        _Progress(folder, config, done, progress and first) as bar,
    ):
        if not resume:
            save()  # a full disk shows now, and there is always a checkpoint to resume from
            distributed.on_first(lambda: (store.set(begun, ""), config.save(folder)))
        stopping = False  # all processes stop at the same step, whichever was asked to
        while done < stop and not stopping:
            micro_batches = [next(loader)[1] for _ in range(config.accumulate)]
            lr = learning_rate(done, steps=config.steps, warmup=config.warmup, peak=config.lr)
            try:
                losses = train_step(spread, optimiser, micro_batches, config, done, lr, device)
                bad_steps.in_a_row = 0
                if average is not None:
                    average.update(model, done + 1)
            except NotFinite as bad:
                bad_steps.add(bad, micro_batches)
                losses = bad.values
            done += 1  # a step that was skipped, too: data order and masks go on
            tokens = sum(count_tokens(batch, model.config.patches) for batch in micro_batches)
            tokens, requests = distributed.total(tokens, request.made)
            stopping = requests > 0
            before, clock = clock, time.perf_counter()
            summary.last = {"step": done, **losses, "lr": lr, "bad_steps": bad_steps.total}
            summary.last["tokens_per_second"] = tokens / (clock - before)
            summary.tokens += int(tokens)
            waiting.look(clock)
            if first:
                rows.write(summary.last)
                bar.show(summary.last)
            if done < stop and not stopping:
                if config.checkpoint_every and done % config.checkpoint_every == 0:
                    save()
                if config.picture_every and done % config.picture_every == 0:
                    draw()
        save()
        summary.seconds = time.perf_counter() - start
        summary.step, summary.interrupted = done, stopping and done < stop
        summary.bad_steps, summary.wait_seconds, summary.workers = bad_steps.total, loader.wait_seconds, config.workers
        summary.processes = processes
        _add_up(summary, loader)
        if not summary.interrupted:
            draw()
    return summary


def _add_up(summary: Summary, loader: Loader) -> None:
    """What the loaders of all processes counted."""
    counted = Counter(loader.counters, images=loader.images, died=loader.workers_died, read=loader.read_seconds)
    every = distributed.gather((counted, loader.skipped, list(map(str, loader.bad.values()))))
    sums = sum((each[0] for each in every), Counter(dict.fromkeys(counted, 0)))
    summary.images, summary.workers_died = sums["images"], sums["died"]
    summary.read_seconds = sums["read"] / len(every)
    summary.counters = {name: sums[name] for name in loader.counters}
    summary.skipped = dict(sum((each[1] for each in every), Counter()))
    summary.bad = list(dict.fromkeys(text for each in every for text in each[2]))


def _refuse_what_does_not_split(config: RunConfig, processes: int) -> None:
    """ValueError, or a warning, about what would not be the run of one process."""
    if processes == 1:
        return
    if config.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {config.batch_size}")
    if config.objective not in PAIRED:
        return
    if config.model_config.get("queue_size"):
        raise ValueError(f"queue_size must be 0 in {processes} processes, each of which would have a queue of its own")
    warnings.warn(
        f"{config.objective} compares the pairs that a process has, {config.batch_size // processes} of the "
        f"{config.batch_size} of a pass: its losses are not those of one process, and change with their number",
        M3AEFastWarning,
        stacklevel=2,
    )


def train_step(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    micro_batches: list[ImageTextBatch],
    config: RunConfig,
    step: int,
    lr: float,
    device: torch.device,
) -> dict[str, float]:
    """One optimiser step over the mean loss of the micro-batches; returns the means of the model's METRICS.

    Both are means over all processes, too: these have the same number of samples each.
    NotFinite: one of them or the gradient is not finite; then model and optimiser are as they were, in all processes.
    """
    torch.manual_seed((config.seed << 32) + step)
    own = distributed.bare(model)
    names = own.METRICS
    buffers = [buffer.clone() for buffer in own.buffers()]  # a forward pass fills MAMO's queue
    totals = torch.zeros(len(names), device=device)
    for number, batch in enumerate(micro_batches, 1):
        with distributed.summing_gradients(model, number == len(micro_batches)):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = model(batch.to(device), seed=config.seed, step=step)
            (output.loss / len(micro_batches)).backward()
        totals += torch.stack([getattr(output, name).detach().float() for name in names]) / len(micro_batches)
    norm = distributed.whole(nn.utils.clip_grad_norm_(own.parameters(), config.grad_clip or math.inf))
    totals = distributed.mean(totals)
    *values, norm = torch.cat([totals, norm.reshape(1)]).tolist()  # the one wait for the device in a step
    values = dict(zip(names, values, strict=True))
    if not all(map(math.isfinite, (*values.values(), norm))):
        optimiser.zero_grad()
        for buffer, before in zip(own.buffers(), buffers, strict=True):
            buffer.copy_(before)
        raise NotFinite(step + 1, values, norm)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad()
    if hasattr(own, "update_target"):  # the momentum network follows, once for each step that is taken
        own.update_target()
    return values


def make_optimiser(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (.9, .95); weight decay on matrices only: not on biases, norms, embeddings, CLS, type and mask tokens.

    Args:
        model: of which the parameters that require a gradient are trained.
        lr, weight_decay: AdamW's.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for p in parameters if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)


def count_tokens(batch: ImageTextBatch, patches: int) -> int:
    """Patches of the images and words of the texts, masked or not: what `tokens_per_second` counts."""
    return patches * sum(batch.has_image) + batch.text_lengths.total


class _Waiting:
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


class _StopRequest:
    """Ctrl-C and SIGTERM ask for a stop (`made`) instead of tearing a step apart; the second one is not held back."""

    def __init__(self):
        self.made, self._before = False, {}

    def _ask(self, number, frame) -> None:
        self.made = True
        self.__exit__()
        if distributed.is_first():
            os.write(2, b"\nstopping after this step; once more stops at once\n")  # print could interrupt a print

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


class _Progress:
    """tqdm: loss, tokens a second, time left; where the run breaks off, how to go on."""

    def __init__(self, folder: Path, config: RunConfig, done: int, shown: bool):
        from tqdm import tqdm

        interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants fewer lines
        self._bar = tqdm(
            total=config.steps, initial=done, disable=not shown, mininterval=interval, dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left{postfix}]",
        )  # fmt: skip
        self._folder, self._shown, self._rate = folder, shown, None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        self._bar.close()
        if error is not None and self._shown and run.exists(self._folder):
            newest = checkpoint.latest(self._folder / "checkpoints").name
            print(f"broken off by {error.__name__}; {newest} is there to go on from: --resume", file=sys.stderr)

    def show(self, row: dict) -> None:
        rate = row["tokens_per_second"]
        self._rate = rate if self._rate is None else 0.95 * self._rate + 0.05 * rate
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        self._bar.set_postfix_str(f"loss {loss}, {self._rate:,.0f} tokens/s", refresh=False)
        self._bar.update()
