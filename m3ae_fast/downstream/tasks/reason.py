"""Reasoning: is a sentence true of two images?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from m3ae_fast._settings import given
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.files import open_statements
from m3ae_fast.downstream.commands.arguments import add_scored, add_trained
from m3ae_fast.downstream.commands.session import finish, open_run, save
from m3ae_fast.downstream.pack import chunks, pack_for
from m3ae_fast.downstream.scoring.accuracy import accuracies
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.downstream.training import Training, train
from m3ae_fast.examples import Statement
from m3ae_fast.models.reason import Reason


def train_reason(model: Reason, statements: Sequence[Statement], tokenizer: Tokenizer, **settings) -> list[float]:
    """Train a Reason model on statements; returns the losses. settings: as of `train`."""

    def loss_of(examples: list[Statement], step: int) -> Tensor:
        label = torch.tensor([float(s.label) for s in examples], device="cpu")
        logits = _logits(model, examples, tokenizer)
        return F.binary_cross_entropy_with_logits(logits, label.to(logits.device))

    return train(model, statements, loss_of, **settings)


@torch.no_grad()
def reason(
    model: Reason, statements: Sequence[Statement], tokenizer: Tokenizer, *, batch_size: int = 64
) -> list[Result]:
    """Accuracy, of all and by kind.

    Args:
        model: trained by `train_reason`. statements: with their labels, read a batch at a time.
        tokenizer: of the model. batch_size: of a pass.
    """
    kinds, truths, guesses = [], [], []
    for chunk in chunks(statements, batch_size):
        guesses += (_logits(model, chunk, tokenizer) > 0).tolist()
        kinds += [s.kind for s in chunk]
        truths += [s.label for s in chunk]
    return accuracies(kinds, truths, guesses)


def _logits(model: Reason, statements: Sequence[Statement], tokenizer: Tokenizer) -> Tensor:
    device = next(model.parameters()).device
    left = pack_for(model, [s.left for s in statements], None, tokenizer).to(device).images
    sentences = [s.sentence for s in statements]
    return model(left, pack_for(model, [s.right for s in statements], sentences, tokenizer).to(device))


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast reason` takes."""
    rows = '{"left": PATH, "right": PATH, "sentence": TEXT, "label": true|false}'
    add_scored(command, "shapes|FILE.jsonl", rows)
    add_trained(command, Training)


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast reason`; returns the exit status."""
    run, scored, trained = open_run(args, "pair")
    statements, training = scored(open_statements), trained(open_statements)
    model = Reason(run.model).to(args.device)
    train_reason(model, training, run.tokenizer, **given(Training, args))
    save(args, model)
    return finish(args, run, reason(model, statements, run.tokenizer))
