"""VQA: questions about images, answers ranked over a fixed list."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast._settings import given, path
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.files import open_questions, read_answers
from m3ae_fast.downstream.commands.arguments import add_scored, add_trained
from m3ae_fast.downstream.commands.session import finish, open_run, save
from m3ae_fast.downstream.pack import chunks, pack_for
from m3ae_fast.downstream.scoring.accuracy import accuracies
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.downstream.training import Training, train
from m3ae_fast.examples import Question
from m3ae_fast.models.vqa import VQA


def train_vqa(model: VQA, questions: Sequence[Question], tokenizer: Tokenizer, **settings) -> list[float]:
    """Train a VQA model on questions with their answers; returns the losses. settings: as of `train`."""
    device = next(model.parameters()).device

    def loss_of(examples: list[Question], step: int) -> Tensor:
        answers = [tokenizer.encode(q.answer) for q in examples]
        return model(_batch(model, examples, tokenizer).to(device), answers)

    return train(model, questions, loss_of, **settings)


@torch.no_grad()
def answer(
    model: VQA, questions: Sequence[Question], answers: Sequence[str], tokenizer: Tokenizer, *, batch_size: int = 64
) -> list[str]:
    """The likeliest answer of a list to each question.

    Raises:
        ValueError: an empty list, or an answer without a word.
    """
    if not len(answers):
        raise ValueError("answers must hold at least one, got none")
    encoded = [tokenizer.encode(text) for text in answers]
    for text, ids in zip(answers, encoded, strict=True):
        if not ids:
            raise ValueError(f"answers must hold words, got {text!r}")
    device, found = next(model.parameters()).device, []
    for chunk in chunks(questions, batch_size):
        ranks = model.rank(_batch(model, chunk, tokenizer).to(device), encoded)
        found += [answers[i] for i in ranks.argmax(1).tolist()]
    return found


def vqa(
    model: VQA, questions: Sequence[Question], answers: Sequence[str], tokenizer: Tokenizer, *, batch_size: int = 64
) -> list[Result]:
    """Accuracy, of all and by kind. A question whose answer is not in the list counts as wrong, with a warning.

    Args:
        model: trained by `train_vqa`. questions: with their answers, read a batch at a time.
        answers: to choose from. tokenizer: of the model. batch_size: of a pass.
    Raises:
        ValueError: as `answer`.
    """
    kinds, truths, guesses = [], [], []
    for chunk in chunks(questions, batch_size):
        guesses += answer(model, chunk, answers, tokenizer, batch_size=batch_size)
        kinds += [q.kind for q in chunk]
        truths += [q.answer for q in chunk]
    missing = len(truths) - sum(map(set(answers).__contains__, truths))
    if missing:
        message = f"{missing} of {len(truths)} questions have an answer that is not in the list: they count as wrong"
        warnings.warn(message, M3AEFastWarning, stacklevel=2)
    return accuracies(kinds, truths, guesses)


def _batch(model: VQA, questions: Sequence[Question], tokenizer: Tokenizer):
    return pack_for(model, [q.image for q in questions], [q.question for q in questions], tokenizer)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast vqa` takes."""
    add_scored(command, "shapes|FILE.jsonl", '{"image": PATH, "question": TEXT, "answer": TEXT}')
    add_trained(command, Training)
    command.add_argument(
        "--answers",
        type=path,
        metavar="FILE",
        help="the possible answers, one per line (default: those of the training data)",
    )


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast vqa`; returns the exit status."""
    run, scored, trained = open_run(args, "pair")
    questions, training = scored(open_questions), trained(open_questions)
    answers = read_answers(args.answers) if args.answers else training.answers()
    model = VQA(run.model).to(args.device)
    train_vqa(model, training, run.tokenizer, **given(Training, args))
    save(args, model)
    return finish(args, run, vqa(model, questions, answers, run.tokenizer))
