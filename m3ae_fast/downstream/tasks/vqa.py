"""VQA: questions about images, answers ranked over a fixed list."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from m3ae_fast._settings import given, path
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.files import open_questions, read_answers
from m3ae_fast.downstream.commands.arguments import add_scored, add_trained
from m3ae_fast.downstream.commands.session import finish, load_saved, open_run, save
from m3ae_fast.downstream.pack import chunks, pack_for
from m3ae_fast.downstream.scoring.accuracy import accuracies
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.downstream.training import Training, train
from m3ae_fast.examples import Question
from m3ae_fast.models import MAMO
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


def load_vqa(path: str | os.PathLike, model: MAMO) -> tuple[VQA, list[str]]:
    """What `m3ae-fast vqa --save` wrote, in evaluation mode, and the answers that it was trained to choose from.

    Args:
        path: of the file. model: like the one that was trained, with the same vocabulary; it is given the weights.
    Raises:
        FileNotFoundError: there is none. ValueError: it is no such file, or of another model.
    """
    device, what = next(model.parameters()).device, "a VQA model trained from a model like this one"
    return load_saved(path, "answers", lambda _: VQA(model).to(device), what)


def _batch(model: VQA, questions: Sequence[Question], tokenizer: Tokenizer):
    return pack_for(model, [q.image for q in questions], [q.question for q in questions], tokenizer)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast vqa` takes."""
    add_scored(command, "shapes|FILE.jsonl", '{"image": PATH, "question": TEXT, "answer": TEXT}')
    add_trained(command, Training)
    command.add_argument(
        "--load", type=path, metavar="FILE", help="a file that --save wrote: answer with it instead of training"
    )  # fmt: skip
    command.add_argument(
        "--answers",
        type=path,
        metavar="FILE",
        help="the possible answers, one per line (default: those of the training data, or of --load)",
    )


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast vqa`; returns the exit status."""
    run, scored, trained = open_run(args, "pair")
    questions = scored(open_questions)
    answers = read_answers(args.answers) if args.answers else None
    if args.load:
        usual = {"train": None, "save": None, **dataclasses.asdict(Training())}
        for name, value in {"train": args.train, "save": args.save, **given(Training, args)}.items():
            if value != usual[name] and name != "seed":  # which draws the scenes, too
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must not be given with --load, which trains nothing, got {value}")
        model, known = load_vqa(args.load, run.model)
    else:
        training = trained(open_questions)
        model, known = VQA(run.model).to(args.device), training.answers()
        train_vqa(model, training, run.tokenizer, **given(Training, args))
        save(args, model, answers=json.dumps(answers or known))
    answers = answers or known
    return finish(args, run, vqa(model, questions, answers, run.tokenizer))
