"""Trainer: a pre-training run, step by step; pretrain(): all of it.

A run stopped at any step and resumed gives the same bits as one that never stopped, because nothing a step needs
lives outside the checkpoint and the step's number: data order, augmentation and masks are functions of (seed, step),
and so are torch's random numbers, reseeded at every step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed import HashStore, Store

from m3ae_fast import _checks
from m3ae_fast._files import remove_unfinished
from m3ae_fast._mixed_seed import mixed_seed
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data.specs import is_streamed, listed
from m3ae_fast.models import OBJECTIVES, GraphedStep, Model
from m3ae_fast.models.masking import BatchPlan
from m3ae_fast.nn import checkpoint_blocks
from m3ae_fast.train import checkpoint, distributed, precision, run
from m3ae_fast.train.average import Average
from m3ae_fast.train.bad_steps import BadSteps, NotFinite
from m3ae_fast.train.config import RunConfig
from m3ae_fast.train.knn import KNNProbe
from m3ae_fast.train.metrics import Metrics
from m3ae_fast.train.pictures import Shown, draw_pictures, samples_to_show
from m3ae_fast.train.schedule import learning_rate
from m3ae_fast.train.summary import Summary
from m3ae_fast.train.validation import Validation, open_held_out
from m3ae_fast.train.watch import Progress, StopRequest, Waiting


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

    Ctrl-C and SIGTERM end it after the current step, with a checkpoint; a second one ends it at once.

    Args:
        config: the run. When resuming, it must agree with run.json; data may name the same data in another place: the
            same last names, weights and number of classes, and captions that make its vocabulary.
        out: the run's folder, made if need be.
        resume: continue from the newest checkpoint; a run that has taken all of its steps may be given more, and its
            learning rate then follows the schedule of all of them from there on. "auto": where `out` holds no run yet,
            start it, so that the same call can be repeated until the run is done. A call that
            `torchrun --max-restarts` repeats needs neither.
        stop_after: end once this many of the run's steps are taken, with a checkpoint.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is not set. FileNotFoundError: nothing to resume, no data.
        ValueError: a setting, the data or a file of the run is not as it must be. OSError: a file cannot be written.
        ChildProcessError: data workers died repeatedly. Whatever is raised, the newest checkpoint stays whole.
        FloatingPointError: the loss or the gradient was not finite for more than config.max_bad_steps steps in a row.
        BlockingIOError: another process trains in `out`.
        ConnectionError: another process is gone. distributed.FailedElsewhere: the first one failed.
    """
    with distributed.process_group(config.rank_timeout) as store:
        return Trainer(config, out, resume=resume, store=store).run(stop_after, progress=progress)


class Trainer:
    """A pre-training run in the folder `out`, to be driven step by step where `pretrain` is not enough:

        with Trainer(RunConfig(steps=100), "runs/mine") as trainer:
            while trainer.done < 100:
                row = trainer.step()  # what metrics.jsonl gets
            trainer.save()
            trainer.draw()

    Entering makes the folder and its first checkpoint (of a new run) and opens its data and its metrics; leaving closes
    them. A subclass may override any of the methods. Of several processes all call the same methods, in a process group
    that is there already (`pretrain` makes one).

    Args:
        config, out, resume: as of `pretrain`, which says what is raised, too.
        store: what `torchrun --max-restarts` keeps (see `distributed.process_group`); None: nothing.

    Attributes:
        config: everything resolved. folder: of the run. done: steps taken, the bad ones too.
        model, optimizer, device; average: of the weights, or None. tokenizer: None for a model of images alone.
        scaler: of the loss, enabled in fp16 alone.
        spread: the model as it is called in training, by DDP for instance. loader: gives the batches.
        dataset: trained on. held_out: for validation, or None.
        stopping: whether a process was asked to stop, by Ctrl-C or SIGTERM during `run`.
        summary: of what was done since it was entered.
    """

    def __init__(self, config: RunConfig, out: str | Path, *, resume: bool | str = False, store: Store | None = None):
        _checks.choice("resume", resume, (False, True, "auto"))
        if not str(out):
            raise ValueError(f"out must name a folder, got {out!r}")
        if Path(out).is_file():
            raise FileExistsError(f"out must name a folder, got the file {out}")
        self.folder, self.checkpoints = Path(out), Path(out) / "checkpoints"
        self._store, self._begun = store or HashStore(), f"begun {self.folder.absolute()}"
        self.resumed = distributed.on_first(lambda: self._resumes(resume))
        self.config, self.dataset, self.tokenizer = run.open_run(self.folder, config, resume=self.resumed)
        self.held_out = open_held_out(self.config, self.dataset, self.config.images)
        self.processes, self.is_first = distributed.world_size(), distributed.is_first()
        self.sharded = self.config.shard and self.processes > 1
        self.done, self.stopping, self.bad_steps = 0, False, BadSteps(self.folder, self.config)
        self._request, self._opened, self.loader, self.metrics = StopRequest(), None, None, None
        self._validation = self._knn = None
        self.build()
        if self.resumed:
            self.resume()
        self.summary = self._new_summary()

    def _new_summary(self) -> Summary:
        data = listed(self.config.data)
        streamed = data if any(map(is_streamed, data)) else []
        return Summary(self.folder, self.done, self.config.steps, self.bad_steps.total, streamed=streamed)

    def _resumes(self, resume: bool | str) -> bool:
        """Whether to resume: torchrun --max-restarts starts again with the same arguments, and what this launch has
        begun goes on, but nothing older."""
        return run.exists(self.folder) if resume == "auto" or self._store.check([self._begun]) else resume

    def build(self) -> None:
        """The model, spread over the processes; its optimizer; the moving average of its weights."""
        config = self.config
        distributed.on_first(lambda: _refuse_what_does_not_split(config, self.processes))
        self.device = run.pick_device(distributed.own_device(config.device))
        distributed.on_first(lambda: precision.check(config.precision, self.device))
        self.model = run.build_model(config)
        if config.init is not None and not self.resumed:
            run.start_from(self.model, config.init)
        self.model.to(self.device)
        self.model.joined = self.processes > 1
        checkpoint_blocks(self.model, config.checkpoint_blocks)
        self.spread = distributed.spread(
            self.model, self.device, shard=config.shard, dtype=precision.DTYPES[config.precision],
            unused=not self.model.ALL_GRADIENTS,
        )  # fmt: skip
        self.optimizer = make_optimizer(self.model, lr=config.lr, weight_decay=config.weight_decay)
        self.average = Average(self.model, config.ema) if config.ema else None
        self.scaler = precision.loss_scaler(config.precision, self.device)
        self.graphed = None
        if config.cuda_graphs:
            self.graphed = GraphedStep(
                lambda batch, plan: passes(self.spread, batch, config, self.scaler, plan=plan), self.model
            )

    def resume(self) -> None:
        """Read the newest checkpoint."""
        self._newest = path = distributed.on_first(lambda: checkpoint.latest(self.checkpoints))
        saved = checkpoint.load(path, self.model)
        before = RunConfig.from_dict(saved.config, path)
        if saved.step == before.steps:
            before = run.extended(before, self.config)
        run.refuse_differences(path, before, self.config)
        run.warn_of_other_readers(before, self.config, self.dataset)
        checkpoint.restore(saved, self.model, self.optimizer, self.average, self.scaler)
        self.done, self.bad_steps = saved.step, BadSteps(self.folder, self.config, *saved.bad_steps)

    def __enter__(self) -> Trainer:
        if self._opened is not None:
            raise RuntimeError("the trainer is open already: call run outside of `with trainer:`")
        config, model = self.config, self.model
        loader = run.make_loader(
            self.dataset, self.tokenizer, model, config, batch_size=config.batch_size // self.processes,
            seed=config.seed, start_step=self.done * config.accumulate, workers=config.workers,
            pin_memory=self.device.type == "cuda", plan=planner(model, config),
        )  # fmt: skip
        if self.held_out is not None:
            self._validation = Validation(self.held_out, self.tokenizer, model, config, self.device)
            if config.knn_every:
                self._knn = KNNProbe(self.dataset, self.held_out, config, model.config, self.device)
        self._start = self._clock = time.perf_counter()
        with contextlib.ExitStack() as stack:
            distributed.on_first(lambda: self._open_folder(stack))
            stack.callback(self._close)
            self._opened, self.loader, self._waiting = stack, loader, Waiting(loader)
            self.summary = self._new_summary()
            if self.is_first:
                self.metrics = stack.enter_context(Metrics(self.folder, self.done))
                self.metrics.describe(config.to_dict(), self._figures())
            if not self.resumed:
                self.save()  # a full disk shows now, and there is always a checkpoint to resume from
                distributed.on_first(lambda: (self._store.set(self._begun, ""), config.save(self.folder)))
                self.resumed = True
            self._opened = stack.pop_all()
        return self

    def _open_folder(self, stack: contextlib.ExitStack) -> None:
        """Lock it, see that nobody has used it meanwhile, and make room."""
        stack.callback(run.lock(self.folder).release)
        if not self.resumed:
            run.refuse_used(self.folder)
            run.prepare_folder(self.folder, self.tokenizer)
        elif (newest := checkpoint.latest(self.checkpoints)) != self._newest:
            raise BlockingIOError(f"{self.folder} has gone on to {newest.name} in another process: --resume once more")
        else:  # what a killed process left there takes the room of the next one
            checkpoint.keep_last(self.checkpoints)
            remove_unfinished(self.bad_steps.folder)
            saved = RunConfig.load(self.folder)
            if self.config.steps > saved.steps or self.config.data != saved.data:  # given more steps, or moved
                self.config.save(self.folder)

    def _figures(self) -> list[str]:
        """What a run is compared by with others."""
        more = {"val_loss": self._validation, "knn_accuracy": self._knn}
        return [*self.model.METRICS, *(name for name, source in more.items() if source is not None)]

    def _close(self) -> None:
        self.loader.close()
        self._opened = self.loader = self._waiting = self._validation = self._knn = self.metrics = None

    def __exit__(self, *error) -> None:
        self._opened.__exit__(*error)

    def _check_open(self, method: str) -> None:
        if self._opened is None:
            raise RuntimeError(f"{method} must be called inside `with trainer:`, which opens the run's data and folder")

    def step(self) -> dict[str, float | None]:
        """Take a step, which may turn out a bad one; returns its row of metrics.jsonl. RuntimeError: all are taken."""
        self._check_open("step")
        config = self.config
        if self.done >= config.steps:
            raise RuntimeError(f"the run has taken all of its {config.steps} steps")
        micro_batches = [next(self.loader)[1:] for _ in range(config.accumulate)]
        lr = learning_rate(self.done, steps=config.steps, warmup=config.warmup, peak=config.lr)
        try:
            losses = train_step(
                self.spread, self.optimizer, micro_batches, config, self.done, lr, self.device, self.scaler,
                self.graphed,
            )  # fmt: skip
            self.bad_steps.in_a_row = 0
            if self.average is not None:
                self.average.update(self.model, self.done + 1)
        except NotFinite as bad:
            self.bad_steps.add(bad, [batch for batch, _ in micro_batches])
            losses = bad.values
        self.done += 1  # a step that was skipped, too: data order and masks go on
        tokens = sum(count_tokens(batch, self.model.config.grid) for batch, _ in micro_batches)
        tokens, requests = distributed.total(tokens, self._request.made)
        self.stopping = requests > 0  # all processes stop at the same step, whichever was asked to
        before, self._clock = self._clock, time.perf_counter()
        row = {"step": self.done, **losses, "lr": lr, "bad_steps": self.bad_steps.total}
        row["tokens_per_second"] = tokens / (self._clock - before)
        self.summary.last, self.summary.tokens = row, self.summary.tokens + int(tokens)
        self._waiting.look(self._clock)
        if self._validation is not None and self._due(config.val_every):
            row |= self._validation.losses(self.spread, self.average)
        if self._knn is not None and self._due(config.knn_every):
            row |= self._knn.scores(self.spread, self.average)
        self._clock = time.perf_counter()  # the rate of the next step is its own
        if self.metrics is not None:
            self.metrics.write(row)
        return row

    def _due(self, every: int) -> bool:
        """Whether it is time for what is measured every so many steps, and at the end."""
        return self.done == self.config.steps or is_due(every, self.done)

    def save(self) -> None:
        """Write a checkpoint; the newest two are kept."""
        self._check_open("save")
        if self.metrics is not None:
            self.metrics.flush()
        counts = (self.bad_steps.total, self.bad_steps.in_a_row)
        self._newest = path = checkpoint.step_path(self.checkpoints, self.done, shards=self.sharded)
        checkpoint.save(
            path, self.done, self.config.to_dict(), self.model, self.optimizer, counts, self.average, self.scaler
        )
        if self.is_first:
            checkpoint.keep_last(self.checkpoints)

    def draw(self) -> None:
        """Draw the curves of the run and, where its model has one, a picture of what it has learned."""
        self._check_open("draw")
        drawn = self.model
        if self.sharded and drawn.PICTURE is not None:  # it computes nothing without the others
            weights = distributed.gather_weights(drawn)
            if self.is_first:
                drawn = run.build_model(self.config).to(self.device)
                drawn.load_state_dict(weights)
        if self.is_first:
            shown = lambda: self._shown  # noqa: E731
            path = draw_pictures(self.folder, drawn, self.tokenizer, self.config, self.done, self.device, shown)
            if path is not None:
                self.metrics.add_picture(drawn.PICTURE, path, self.done)

    @functools.cached_property
    def _shown(self) -> Shown:
        """The same in all pictures: a stream is read to a thousand samples for it."""
        return samples_to_show(self.model.config, self.tokenizer, self.config, self.dataset, self.held_out)

    def run(self, stop_after: int | None = None, *, progress: bool = True) -> Summary:
        """Take all steps that are left, with checkpoints and pictures on the way; arguments as `pretrain`'s."""
        config = self.config
        if stop_after is not None and stop_after <= self.done:
            raise ValueError(f"stop_after must be more than the {self.done} steps already taken, got {stop_after}")
        stop = config.steps if stop_after is None else min(stop_after, config.steps)
        if self.done >= config.steps:
            return self.summary
        self._request, self.stopping = StopRequest(), False
        with self._request, self, Progress(self.folder, config, self.done, progress and self.is_first) as bar:
            while self.done < stop and not self.stopping:
                bar.show(self.step())
                if self.done < stop and not self.stopping:
                    if is_due(config.checkpoint_every, self.done):
                        self.save()
                    if is_due(config.picture_every, self.done):
                        self.draw()
            self.save()
            self._sum_up(stop)
            if not self.summary.interrupted:
                self.draw()
        return self.summary

    def _sum_up(self, stop: int) -> None:
        """The summary of a call, with what the loaders of all processes counted."""
        summary, loader = self.summary, self.loader
        summary.seconds = time.perf_counter() - self._start
        summary.step, summary.interrupted = self.done, self.stopping and self.done < stop
        summary.bad_steps, summary.wait_seconds = self.bad_steps.total, loader.wait_seconds
        summary.workers, summary.processes = self.config.workers, self.processes
        counted = Counter(loader.counters, images=loader.images, died=loader.workers_died, read=loader.read_seconds)
        every = distributed.gather((counted, loader.skipped, list(map(str, loader.bad.values()))))
        sums = sum((each[0] for each in every), Counter(dict.fromkeys(counted, 0)))
        summary.images, summary.workers_died = sums["images"], sums["died"]
        summary.read_seconds = sums["read"] / len(every)
        summary.counters = {name: sums[name] for name in loader.counters}
        summary.skipped = dict(sum((each[1] for each in every), Counter()))
        summary.bad = list(dict.fromkeys(text for each in every for text in each[2]))


def is_due(every: int, step: int) -> bool:
    """Whether it is time for what happens after every so many steps; 0: never."""
    return every > 0 and step % every == 0


def _refuse_what_does_not_split(config: RunConfig, processes: int) -> None:
    """ValueError, or a warning, about what would not be the run of one process."""
    if processes == 1:
        return
    if config.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {config.batch_size}")
    if config.cuda_graphs:
        raise ValueError(f"cuda_graphs must be False in {processes} processes: the gradients they send are in no graph")
    model, model_config = OBJECTIVES[config.objective]
    own = model.losses_of_own_batch(model_config.from_dict(config.model_config))
    if own:
        warnings.warn(
            f"{' and '.join(own)} of {config.objective} compares the pairs that a process has, "
            f"{config.batch_size // processes} of the {config.batch_size} of a pass: it is not that of one process, "
            "and changes with their number",
            M3AEFastWarning,
            stacklevel=2,
        )


def planner(model: Model, config: RunConfig) -> Callable[[ImageTextBatch, int], BatchPlan | None]:
    """plan(batch, number) of a run's micro-batches, as its loader calls it; None where the model plans in the step."""
    if not model.plans_ahead():
        return lambda batch, number: None
    bucket = {"bucket": True} if config.cuda_graphs else {}
    return lambda batch, number: model.plan(batch, seed=config.seed, step=number // config.accumulate, **bucket)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[tuple[ImageTextBatch, BatchPlan | None]],
    config: RunConfig,
    step: int,
    lr: float,
    device: torch.device,
    scaler: torch.amp.GradScaler,
    graphed: GraphedStep | None = None,
) -> dict[str, float]:
    """One optimizer step over the mean loss of the micro-batches; returns the means of the model's METRICS, and in fp16
    the loss_scale of the step.

    Micro-batches lie on the host, for a GPU in page-locked memory, each with its plan where the model plans ahead.
    Both are means over all processes, too: these have the same number of samples each.
    NotFinite: one of them or the gradient is not finite; then model and optimizer are as they were, in all processes.
    graphed: of `passes`, which it stands for.
    """
    torch.manual_seed(mixed_seed(config.seed, step))
    own = distributed.bare(model)
    names = tuple(own.METRICS)
    buffers = [buffer.clone() for buffer in own.buffers()]  # a forward pass may fill a queue
    totals = torch.zeros(len(names), device=device)
    for number, (batch, plan) in enumerate(micro_batches, 1):
        if graphed is not None:
            totals += graphed(batch, plan)
            continue
        drawn = {"seed": config.seed, "step": step} if plan is None else {"plan": plan.to(device)}
        with distributed.summing_gradients(model, number == len(micro_batches)):
            totals += passes(model, batch.to(device), config, scaler, **drawn)
    scaler.unscale_(optimizer)
    total_norm = nn.utils.get_total_norm(p.grad for p in own.parameters() if p.grad is not None)
    totals = distributed.mean(totals)
    norm = distributed.whole(total_norm).reshape(1)
    *values, norm = torch.cat([totals, norm]).tolist()  # the one wait for the device in a step
    values = dict(zip(names, values, strict=True))
    if scaler.is_enabled():
        values["loss_scale"] = scaler.get_scale()  # the device is idle: no wait
        scaler.update()
    if not all(map(math.isfinite, (*values.values(), norm))):
        optimizer.zero_grad()
        for buffer, before in zip(own.buffers(), buffers, strict=True):
            buffer.copy_(before)
        raise NotFinite(step + 1, values, norm)
    if config.grad_clip and norm + 1e-6 > config.grad_clip:  # else the factor is 1, and costs two passes over memory
        nn.utils.clip_grads_with_norm_(own.parameters(), config.grad_clip, total_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    own.update_target()
    return values


def passes(model: nn.Module, batch: ImageTextBatch, config: RunConfig, scaler: torch.amp.GradScaler, **drawn) -> Tensor:
    """Forward and backward pass of a micro-batch, on its device; returns its share of the model's METRICS, [METRICS].

    drawn: seed and step of the masks, or the plan that was made of them.
    """
    with precision.autocast(config.precision, batch.device):
        output = model(batch, **drawn)
    scaler.scale(output.loss / config.accumulate).backward()
    values = [getattr(output, name).detach().float() for name in distributed.bare(model).METRICS]
    return torch.stack(values) / config.accumulate


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (.9, .95), fused on CPUs and CUDA; weight decay on matrices only: not on biases, norms, embeddings, CLS,
    type and mask tokens.

    Args:
        model: of which the parameters that require a gradient are trained.
        lr, weight_decay: AdamW's.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in parameters if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for p in parameters if p.dim() < 2 or id(p) in embeddings]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)


def count_tokens(batch: ImageTextBatch, grid: tuple[int, int]) -> int:
    """Patches of the images and words of the texts, masked or not: what `tokens_per_second` counts."""
    return sum(batch.patch_counts(grid)) + batch.text_lengths.total
