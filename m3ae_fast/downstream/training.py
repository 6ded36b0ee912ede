"""Training for a task: steps of AdamW on examples, or down any loss."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from m3ae_fast._settings import OPTIONS, check, documented, setting
from m3ae_fast.data.seeds import ORDER, generator
from m3ae_fast.train.schedule import learning_rate
from m3ae_fast.train.trainer import make_optimizer


@documented
@dataclasses.dataclass(frozen=True)
class Training:
    """How a model is trained for a task."""

    lr: float = setting(5e-4, "peak learning rate of training", OPTIONS, within="(0, inf)")
    steps: int = setting(600, "training steps", OPTIONS, "N", "[1, inf)")
    batch_size: int = setting(32, "examples per step", OPTIONS, "B", "[1, inf)")
    seed: int = setting(0, "seed of everything random", within=f"[0, {2**63})")
    __post_init__ = check


def train(
    model: nn.Module,
    examples: Sequence,
    loss_of: Callable[[list, int], Tensor],
    *,
    progress: bool = True,
    **settings,
) -> list[float]:
    """Train all of `model` that is trained at all; returns the loss of every step.

    A tenth of the steps warm up, then a cosine to 0.

    Args:
        examples: read one at a time, each once an epoch in an order drawn from the seed.
        loss_of: loss_of(list of examples, step) -> scalar.
        progress: show a bar on stderr.
        settings: fields of `Training`.

    Raises:
        ValueError, TypeError: a setting. FloatingPointError: as `descend`.
    """
    training = Training(**settings)
    batch_size, order, epoch = min(training.batch_size, len(examples)), [], 0

    def loss_at(step: int) -> Tensor:
        nonlocal order, epoch
        while len(order) < batch_size:
            order += generator(training.seed, ORDER, epoch).permutation(len(examples)).tolist()
            epoch += 1
        chosen, order = order[:batch_size], order[batch_size:]
        return loss_of([examples[i] for i in chosen], step)

    optimizer, steps = make_optimizer(model, lr=training.lr, weight_decay=0.05), training.steps
    return descend(model, optimizer, loss_at, steps=steps, warmup=steps // 10, lr=training.lr, progress=progress)


def descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    warmup: int,
    lr: float,
    progress: bool = True,
) -> list[float]:
    """Steps down a loss, the gradient's norm cut at 1; returns the loss of every step.

    Args:
        optimizer: of the parameters; a group's rate is `lr` times its "scale", if it has one.
        loss_at: loss_at(step) -> scalar.
        steps, warmup, lr: of `learning_rate`.

    Raises:
        FloatingPointError: the loss or the gradient is not finite; the step was not taken.
    """
    from tqdm import trange

    losses = []
    model.train()
    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants fewer lines
    for step in trange(steps, disable=not progress, desc="fine-tuning", leave=False, mininterval=interval):
        loss = loss_at(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step + 1} of fine-tuning is not finite (loss {losses[-1]:.4g}, gradient norm {norm:.4g}): "
                "a lower lr may help"
            )
        for group in optimizer.param_groups:
            rate = learning_rate(step, steps=steps, warmup=warmup, peak=lr)
            group["lr"] = rate * group.get("scale", 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses
