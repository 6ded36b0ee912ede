"""Grounding, scored and drawn: how often the map of a phrase is highest within its box, and maps with their boxes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from m3ae_fast._drawing import FAINT, RIGHT, WRONG, Card, Cards, heat, mark, note_of_channels, plain_words, visible
from m3ae_fast._settings import natural, picture
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.files import open_phrases
from m3ae_fast.downstream.commands.arguments import add_scored
from m3ae_fast.downstream.commands.session import finish, open_run
from m3ae_fast.downstream.pack import chunks, crop_box, pack_for
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.examples import Phrase
from m3ae_fast.models import Model
from m3ae_fast.models.ground import ground as maps_of
from m3ae_fast.models.ground import points, to_pixels


def ground(
    model: Model, phrases: Sequence[Phrase], tokenizer: Tokenizer, *, batch_size: int = 64, block: int | None = None
) -> list[Result]:
    """Pointing accuracy: how often the highest pixel of the map lies in the phrase's box. Chance: a random pixel.

    If the number of objects is known for the images of all phrases, a second result is the accuracy of choosing one of
    them at random, which is that of a map that finds objects but ignores the phrase.

    Phrases without a box are left out, as are those whose box lies outside the center crop.

    Args:
        model: whose maps are looked at. phrases: read a batch at a time. tokenizer: of the model.
        batch_size: of a pass. block: of the fusion encoder; None: the middle one.
    Raises:
        ValueError: none is left.
    """
    device, (height, width) = next(model.parameters()).device, model.config.image_shape
    hits, shares, guesses = [], [], []
    for chunk in chunks(phrases, batch_size):
        batch = pack_for(model, [p.image for p in chunk], [p.phrase for p in chunk], tokenizer).to(device)
        best = points(maps_of(model, batch, block=block), model.config).tolist()
        for phrase, (x, y) in zip(chunk, best, strict=True):
            box = phrase.box and crop_box(phrase.box, *phrase.image.shape[:2], (height, width))
            if box:
                hits.append(box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3])
                shares.append((box[2] - box[0]) * (box[3] - box[1]) / (height * width))
                guesses.append(phrase.objects and 1 / phrase.objects)
    if not hits:
        raise ValueError(
            f"phrases must have boxes to be scored, none of {len(phrases)} has one within the square in the middle"
        )
    chance = sum(shares) / len(shares)
    results = [Result.of("pointing accuracy", hits, chance)]
    if all(guesses):
        results.append(Result.of("a random object", guesses, chance))
    return results


def draw_ground(
    model: Model, phrases: Sequence[Phrase], tokenizer: Tokenizer, path: Path, *, block: int | None = None
) -> None:
    """Each image, its map, the highest pixel (a cross) and the box, where it is known, with the phrase below."""
    pointed = point_at(model, phrases, tokenizer, block=block)
    cards = [Card(panels, plain_words(p.phrase)) for p, (panels, _) in zip(phrases, pointed, strict=True)]
    Cards(cards, ("original", "where it points"), note_of_channels(model.config.channels)).save(path)


def point_at(
    model: Model, phrases: Sequence[Phrase], tokenizer: Tokenizer, *, block: int | None = None
) -> list[tuple[list[np.ndarray], bool | None]]:
    """([image, its map with the highest pixel and the box], whether that lies in the box; None: no box is known) of
    each phrase. Arguments as of `ground`."""
    height, width = model.config.image_shape
    side, scale = min(height, width), 4
    batch = pack_for(model, [p.image for p in phrases], [p.phrase for p in phrases], tokenizer)
    maps = maps_of(model, batch.to(next(model.parameters()).device), block=block).cpu()
    found = []
    for phrase, image, map, (x, y) in zip(
        phrases, batch.images, to_pixels(maps, model.config), points(maps, model.config).tolist(), strict=True
    ):
        pixels = visible(image.permute(1, 2, 0).numpy())
        box = phrase.box and crop_box(phrase.box, *phrase.image.shape[:2], (height, width))
        shown = Image.fromarray(heat(pixels, map)).resize((scale * width, scale * height))
        pen, inside = ImageDraw.Draw(shown), box and box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
        color = (RIGHT if inside else WRONG) if box else FAINT
        (cx, cy), arm = (scale * (x + 0.5), scale * (y + 0.5)), side // 5
        lines = [(cx - arm, cy, cx + arm, cy), (cx, cy - arm, cx, cy + arm)]
        if box:
            x0, y0, x1, y1 = (scale * each for each in box)
            lines.append((x0, y0, x1, y0, x1, y1, x0, y1, x0, y0))
        mark(pen, lines, color, max(side // 16, 2))
        found.append(([pixels, np.asarray(shown)], inside))
    return found


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast ground` takes."""
    rows = '{"image": PATH, "phrase": TEXT, "box": [x0, y0, x1, y1] if known}'
    add_scored(command, "shapes|FILE.jsonl", rows)
    command.add_argument(
        "--block", type=natural, metavar="N", help="the block of the fusion encoder to read (default: the middle one)"
    )
    command.add_argument("--picture", type=picture, metavar="FILE", help="draw the first six examples there")


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast ground`; returns the exit status."""
    run, scored, _ = open_run(args, "pair")
    phrases = scored(open_phrases)
    if args.picture:
        first = [phrases[i] for i in range(min(6, len(phrases)))]
        draw_ground(run.model, first, run.tokenizer, args.picture, block=args.block)
        print(f"picture: {args.picture}")
    if all(phrases[i].box is None for i in range(len(phrases))):
        print("no phrase has a box: nothing to score" + (f", {args.out} is not written" if args.out else ""))
        return 0
    return finish(args, run, ground(run.model, phrases, run.tokenizer, block=args.block))
