"""What a trained M3AE or MAMO makes of synthetic scenes that it has not seen, as one picture."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

import torch

from m3ae_fast._drawing import NEXT_LINE, Card, Cards, plain_words
from m3ae_fast._settings import natural, path
from m3ae_fast.data.examples.files import open_phrases
from m3ae_fast.data.examples.questions import QUESTIONS
from m3ae_fast.data.seeds import QUESTION, generator
from m3ae_fast.downstream.commands.arguments import add_device, add_picture, add_run
from m3ae_fast.downstream.commands.session import open_run
from m3ae_fast.downstream.scoring.recall import right_pairs
from m3ae_fast.downstream.tasks.ground import point_at
from m3ae_fast.downstream.tasks.retrieve import BOTH, score_pairs
from m3ae_fast.downstream.tasks.vqa import answer, load_vqa
from m3ae_fast.examples import Pair, Question
from m3ae_fast.train import Run
from m3ae_fast.train.pictures import draw_reconstruction, held_out

SCENES, AMONG = 4, 100  # of a MAMO's picture: scenes, and captions to choose theirs from
FOUND = "cross and box are green where the phrase is found"
ANSWERS = "gray is the right answer, the model's answer is below it: green where it is right"


def demo(run: Run, path: Path, *, vqa: Path | None = None, seed: int = 0) -> str:
    """Draw what the model of a run makes of scenes of `shapes` that it has not seen.

    Of an M3AE: reconstructions of masked images and captions. Of a MAMO: where in a scene a phrase points, the best of
    100 captions for the scene and, with vqa, answers to questions about it.

    Args:
        run: of the objective m3ae or mamo. path: of the PNG.
        vqa: a MAMO's file that `m3ae-fast vqa --save` wrote; None: no questions. seed: of the scenes.
    Returns:
        What the picture shows, and how much of it is right.
    Raises:
        ValueError: a run of another objective, vqa for an M3AE, or images that are not of three channels; or as
            `load_vqa`.
        FileNotFoundError: there is no file vqa.
    """
    scenes_seed = 2 * (seed + run.config.seed) + 1  # as in the tasks: that of no training
    if run.config.objective == "mamo":
        return _draw_mamo(run, path, vqa, scenes_seed)
    if run.config.objective != "m3ae":
        raise ValueError(f"run must be of the objective m3ae or mamo, got {run.config.objective}")
    if vqa:
        raise ValueError(f"vqa must not be given for a run of m3ae, which answers no questions, got {vqa}")
    return _draw_m3ae(run, path, scenes_seed)


@torch.no_grad()
def _draw_m3ae(run: Run, path: Path, seed: int) -> str:
    model, device = run.model, next(run.model.parameters()).device
    config = dataclasses.replace(run.config, seed=seed - 1)  # held_out adds 1
    batch = held_out(model.config, run.tokenizer, config, data="shapes").to(device)
    result = draw_reconstruction(model, run.tokenizer, batch, path, seed=seed, device=device)
    lengths = batch.text_lengths.lengths
    hidden = torch.cat([mask[:length] for mask, length in zip(result.text_mask, lengths, strict=True)])
    right = hidden & (result.text_logits.argmax(1) == batch.text)
    return f"{len(batch)} unseen scenes, {right.sum()} of {hidden.sum()} masked words guessed"


def _draw_mamo(run: Run, path: Path, vqa: Path | None, seed: int) -> str:
    model, tokenizer = run.model, run.tokenizer
    drawn = open_phrases("shapes", seed=seed, count=AMONG, **model.config.images)
    phrases, scenes = list(drawn), [drawn.scene(i) for i in range(AMONG)]
    pointed = point_at(model, phrases[:SCENES], tokenizer)

    pairs = [Pair(p.image, scene.captions[-1:], p.name) for p, scene in zip(phrases, scenes, strict=True)]
    scores = score_pairs(model, pairs, tokenizer, rerank=4)
    by_image = scores.tables[BOTH][0].cpu()
    right = right_pairs(scores.truth, AMONG, AMONG, texts=scores.captions, images=scores.images)
    ranks = 1 + (by_image > by_image.masked_fill(~right, -torch.inf).amax(1, keepdim=True)).sum(1)

    asked = load_vqa(vqa, copy.deepcopy(model)) if vqa else None  # it would change the run's model
    cards, answered = [], []
    for i, (panels, _) in enumerate(pointed):
        caption = scores.captions[by_image[i].argmax()]
        verdict = "right" if ranks[i] == 1 else f"its own is number {ranks[i]}"
        words = [*plain_words(f"where is {phrases[i].phrase}?"), NEXT_LINE]
        words += plain_words(f"best of {AMONG} captions: {caption} ({verdict})")
        if asked:
            possible = (ask(scenes[i], generator(seed, QUESTION, index=i)) for ask in QUESTIONS.values())
            questions = [Question(phrases[i].image, *each, phrases[i].name) for each in possible if each]
            for question, guess in zip(questions, answer(asked[0], questions, asked[1], tokenizer), strict=True):
                words += [NEXT_LINE, *plain_words(question.question), (question.answer, guess, True)]
                answered.append(question.answer == guess)
        cards.append(Card(panels, words))
    Cards(cards, ("unseen scene", "where it points"), FOUND, ANSWERS).save(path)
    told = f"{SCENES} unseen scenes, {sum(hit for _, hit in pointed)} of {SCENES} phrases pointed at"
    told += f", {sum(answered)} of {len(answered)} questions answered" if asked else ""
    return f"{told}; of {AMONG} scenes {(ranks == 1).sum()} find their own caption first"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast demo` takes."""
    add_run(command)
    command.add_argument(
        "--vqa", type=path, metavar="FILE", help="of a MAMO: answer questions with what m3ae-fast vqa --save wrote"
    )
    add_picture(command, "demo.png")
    command.add_argument("--seed", type=natural, default=0, metavar="S", help="seed of the scenes (%(default)s)")
    add_device(command)


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast demo`; returns the exit status."""
    run, *_ = open_run(args)
    print(f"{args.out}: {demo(run, args.out, vqa=args.vqa, seed=args.seed)}")
    return 0
