"""finetune: a few steps of AdamW on examples, for the downstream tasks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast.data.seeds import ORDER, generator
from m3ae_fast.train.schedule import learning_rate
from m3ae_fast.train.trainer import make_optimiser


def finetune(
    model: nn.Module,
    examples: Sequence,
    loss_of: Callable[[list, int], Tensor],
    *,
    steps: int,
    batch_size: int = 32,
    lr: float = 5e-4,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train all of `model` that is trained at all; returns the loss of every step.

    Args:
        examples: read one at a time, each once an epoch in an order drawn from the seed.
        loss_of: loss_of(list of examples, step) -> scalar.
        lr: peak; a tenth of the steps warm up, then a cosine to 0.

    Raises:
        ValueError: lr is not finite and positive. FloatingPointError: as `descend`.
    """
    _checks.positive("lr", lr)
    batch_size, order, epoch = min(batch_size, len(examples)), [], 0

    def loss_at(step: int) -> Tensor:
        nonlocal order, epoch
        while len(order) < batch_size:
            order += generator(seed, ORDER, epoch).permutation(len(examples)).tolist()
            epoch += 1
        chosen, order = order[:batch_size], order[batch_size:]
        return loss_of([examples[i] for i in chosen], step)

    optimiser = make_optimiser(model, lr=lr, weight_decay=0.05)
    return descend(model, optimiser, loss_at, steps=steps, warmup=steps // 10, lr=lr, progress=progress)


def descend(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    warmup: int,
    lr: float,
    progress: bool = True,
) -> list[float]:
    """Steps down a loss, the gradient's norm cut at 1; returns the loss of every step.

    Args:
        optimiser: of the parameters; a group's rate is `lr` times its "scale", if it has one.
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
        for group in optimiser.param_groups:
            rate = learning_rate(step, steps=steps, warmup=warmup, peak=lr)
            group["lr"] = rate * group.get("scale", 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return losses
