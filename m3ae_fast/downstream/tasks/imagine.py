"""An image from its caption alone, and a caption from its image alone: one of the two is kept whole, all of the other
is masked and predicted."""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast._drawing import Card, Cards, note_of_channels, visible
from m3ae_fast._settings import path, picture, positive
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.files import open_pairs
from m3ae_fast.data.images import open_image
from m3ae_fast.downstream.commands.arguments import add_scored, check_captions
from m3ae_fast.downstream.commands.session import finish, open_run
from m3ae_fast.downstream.features import evaluating
from m3ae_fast.downstream.pack import chunks, pack_for
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.examples import Pair
from m3ae_fast.models import M3AE
from m3ae_fast.train.pictures import unpatchify

DATA = "shapes"
SHOWN = 6  # pairs of a picture
ROUNDS = 8
WORDS = 10  # of a caption whose length is not given


def imagine(
    model: M3AE, pairs: Sequence[Pair], tokenizer: Tokenizer, *, rounds: int = ROUNDS, batch_size: int = 64
) -> list[Result]:
    """How near an image comes that is rebuilt from its first caption alone, and how many words are right that are
    guessed from the image alone.

    A pixel error is the root mean square over an image's pixels, as a share of their range. It stands beside that of
    what the model paints with the words masked, too, and that of the image's own mean color. The share of words that
    are right, at their places in the caption, stands beside that of guesses with the image masked, too.

    Args:
        model: of images and words. pairs: read a batch at a time. tokenizer: of the model. batch_size: of a pass.
        rounds: as of `words_from_image`.
    Raises:
        ValueError: no pair; as `image_from_words` and `words_from_image`.
    """
    if not len(pairs):
        raise ValueError("pairs must hold at least one, got none")
    device, found = next(model.parameters()).device, defaultdict(list)
    for chunk in chunks(pairs, batch_size):
        batch = pack_for(model, [p.image for p in chunk], [p.captions[0] for p in chunk], tokenizer).to(device)
        images = [image.permute(1, 2, 0).float() for image in batch.whole_images()]
        rebuilt = {
            "pixel error, from the caption": image_from_words(model, batch),
            "pixel error, from nothing": image_from_words(model, batch, masked=True),
            "pixel error, its mean color": [image.mean((0, 1)) for image in images],
        }
        guessed = {
            "words right, from the image": words_from_image(model, batch, rounds=rounds),
            "words right, from nothing": words_from_image(model, batch, rounds=rounds, masked=True),
        }
        for name, others in rebuilt.items():
            found[name] += [_pixel_error(image, other) for image, other in zip(images, others, strict=True)]
        for name, text in guessed.items():
            right = (text == batch.text).float().split(batch.text_lengths.lengths)
            found[name] += [float(each.mean()) for each in right]
    return [Result.of(name, scores) for name, scores in found.items()]


def _pixel_error(image: Tensor, other: Tensor) -> float:
    return float((image - other).square().mean().sqrt() / 255)


@torch.no_grad()
def image_from_words(model: M3AE, batch: ImageTextBatch, *, masked: bool = False) -> list[Tensor]:
    """Images as the model rebuilds them from their captions alone, every patch masked: B of [H, W, C] uint8.

    Args:
        model: of images and words, trained on plain pixels.
        batch: captions, each with the image whose size is wanted, or none of them with an image: then all get the
            configuration's size.
        masked: mask the words, too: what the model paints from their number alone.
    Raises:
        ValueError: another model, or of norm_pix, which predicts no patch's brightness; a sample without words; some
            samples have an image and others none.
    """
    _check(model, batch)
    if not all(batch.text_lengths.lengths):
        raise ValueError("batch must have words in every sample, got one without")
    if model.config.norm_pix:
        raise ValueError("model must be trained without norm_pix, with which it predicts no patch's brightness")
    if batch.images is None:
        blank = torch.zeros(len(batch), model.config.channels, *model.config.image_shape, dtype=torch.uint8)
        batch = ImageTextBatch(blank.to(batch.device), batch.text, batch.text_lengths)
    with evaluating(model):
        patches = model.reconstruct(batch, **_masks(model, batch, image=True, text=masked)).image.float()
    images = []
    for each, grid in zip(patches, batch.sample_grids(model.config.grid), strict=True):
        images.append(unpatchify(each[None, : math.prod(grid)], model.config, grid)[0])
    return images


@torch.no_grad()
def words_from_image(
    model: M3AE, batch: ImageTextBatch, *, words: int = WORDS, rounds: int = ROUNDS, masked: bool = False
) -> Tensor:
    """Captions as the model guesses them from the images alone, every word masked: [T] vocabulary ids, packed as
    batch.text is.

    A caption is filled in rounds. Each predicts all words that are still masked and keeps those it is surest of, about
    as many as the other rounds. In a single round no word is guessed in view of another one, so that they may
    contradict each other.

    Args:
        model: of images and words.
        batch: images with captions, of which only the lengths are used, or images alone.
        words: the length of every caption, of images alone.
        rounds: passes of the model, at least 1; of more than the longest caption has words, the rest are left out.
        masked: mask the image, too: what the model guesses from the length of a caption alone.
    Raises:
        ValueError: a model that reads no words; a sample without an image; a number outside its range.

    Source: MaskGIT, arXiv:2202.04200, without its random noise and with equal rounds.
    """
    _check(model, batch)
    _checks.integer("rounds", rounds, 1)
    if batch.images is None:
        raise ValueError("batch must have an image in every sample, got none")
    if not batch.text_lengths.total:
        _checks.integer("words", words, 1, model.config.max_text_length + 1)
        blank = torch.zeros(len(batch) * words, dtype=torch.int32, device=batch.device)
        batch = ImageTextBatch(batch.images, blank, [words] * len(batch), grids=batch.grids)
    lengths, text = torch.tensor(batch.text_lengths.lengths, device="cpu")[:, None], batch.text.clone()
    real = torch.arange(batch.text_lengths.max, device="cpu") < lengths
    masks, hidden, scores = _masks(model, batch, image=masked, text=True), real.clone(), torch.zeros(real.shape)
    rounds = min(rounds, batch.text_lengths.max)
    with evaluating(model):
        for done in range(1, rounds + 1):
            filled = ImageTextBatch(batch.images, text, batch.text_lengths, grids=batch.grids)
            logits = model.reconstruct(filled, **masks | {"text_mask": hidden}).text_logits
            sure, guesses = logits.float().softmax(-1).max(-1)
            scores[real] = sure.cpu()
            scores[~hidden] = 2.0  # above every probability: words that are kept stay first
            place = scores.masked_fill(~real, -1.0).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            found = hidden & (place < (lengths * done / rounds).ceil())
            new = found[real].to(text.device)
            text[new] = guesses[new].to(text.dtype)
            hidden = hidden & ~found
    return text


def _check(model: M3AE, batch: ImageTextBatch) -> None:
    if not isinstance(model, M3AE) or model.joint_encoder() is None:
        raise ValueError(f"model must be an M3AE of images and words, got {type(model).__name__}")
    if not len(batch):
        raise ValueError("batch must hold at least one sample, got none")
    if batch.images is not None and not all(batch.has_image):
        raise ValueError("batch must have an image in every sample, got one without")


def _masks(model: M3AE, batch: ImageTextBatch, *, image: bool, text: bool) -> dict[str, Tensor]:
    """All of a modality masked, or nothing of it."""
    patches = max(batch.patch_counts(model.config.grid))
    sizes = {"image_mask": (patches, image), "text_mask": (batch.text_lengths.max, text)}
    return {name: torch.full((len(batch), size), value, device="cpu") for name, (size, value) in sizes.items()}


def draw_imagined(
    model: M3AE,
    images: Sequence[np.ndarray] | None,
    texts: Sequence[str] | None,
    tokenizer: Tokenizer,
    path: Path,
    *,
    words: int = WORDS,
    rounds: int = ROUNDS,
) -> None:
    """A picture of pairs: each image, what the model makes of its caption alone, and the caption above the words that
    the model guesses from the image alone, green where right. Of images alone the guesses, of texts alone the images.

    Args:
        model: of images and words. images, texts: as of `pack`. tokenizer: of the model. path: of the PNG.
        words, rounds: as of `words_from_image`.
    Raises:
        ValueError: as `image_from_words` and `words_from_image`.
    """
    batch = pack_for(model, images, texts, tokenizer).to(next(model.parameters()).device)
    lengths = [words] * len(batch) if texts is None else list(batch.text_lengths.lengths)
    panels, captions = {}, []
    if texts is not None:
        panels["from the caption alone"] = image_from_words(model, batch)
        captions.append(batch.text)
    if images is not None:
        originals = [image.permute(1, 2, 0) for image in batch.whole_images()]
        panels = {"original": originals} | panels
        captions.append(words_from_image(model, batch, words=words, rounds=rounds))
    cards = []
    split = [text.cpu().split(lengths) for text in captions]
    for shown, ids in zip(zip(*panels.values(), strict=True), zip(*split, strict=True), strict=True):
        tokens = zip(*(tokenizer.tokens(each.tolist()) for each in ids), strict=True)
        entries = [(*each, True) if len(each) == 2 else (*each, "", False) for each in tokens]
        cards.append(Card([visible(image.cpu().numpy()) for image in shown], entries))
    notes = ["words are guessed from the image alone"] if images is not None else []
    notes.append(note_of_channels(model.config.channels))
    Cards(cards, tuple(panels), "; ".join(filter(None, notes))).save(path)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast imagine` takes."""
    add_scored(command, "shapes|DIR|FILE.jsonl", '{"image": PATH, "caption": TEXT or [TEXT, ...]}', default=DATA)
    command.add_argument("images", nargs="*", type=path, metavar="IMAGE", help="guess a caption of each, not of --data")
    command.add_argument(
        "--caption", dest="captions", action="append", metavar="TEXT",
        help="rebuild an image from it; may be repeated; beside images, one for each: to compare",
    )  # fmt: skip
    command.add_argument(
        "--words", type=positive, metavar="N", help=f"length of the captions of images alone ({WORDS})"
    )
    command.add_argument(
        "--rounds", type=positive, default=ROUNDS, metavar="N",
        help="in which a caption is filled, the surest words first (%(default)s); 1: all words at once",
    )  # fmt: skip
    command.add_argument(
        "--picture", type=picture, default=Path("imagined.png"), metavar="FILE.png",
        help=f"of the first {SHOWN} pairs, or of what is given (%(default)s)",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast imagine`; returns the exit status."""
    images, captions = args.images or None, args.captions
    if images and captions:
        check_captions(args)
    alone = (images is None) != (captions is None)
    if (images or captions) and args.data != DATA:
        raise ValueError("give images and captions, or --data, not both")
    if args.words and not (images and alone):
        raise ValueError(f"--words must be given with images alone, which have no caption, got {args.words}")
    if args.out and alone:
        raise ValueError(f"--out must be given with images and their captions, or there is no score, got {args.out}")
    run, scored, _ = open_run(args, "reconstruct", words=True)
    if images:
        images = [open_image(file, str(file), run.model.config.channels).decoded() for file in images]
    if not alone:
        if images:
            given = zip(images, captions, args.images, strict=True)
            pairs = [Pair(image, (text,), str(file)) for image, text, file in given]
        else:
            pairs = scored(open_pairs)
        first = [pairs[i] for i in range(min(SHOWN, len(pairs)))]
        images, captions = [pair.image for pair in first], [pair.captions[0] for pair in first]
    options = {"words": args.words or WORDS, "rounds": args.rounds}
    draw_imagined(run.model, images, captions, run.tokenizer, args.picture, **options)
    print(f"picture: {args.picture}, the model after {run.step:,} steps")
    if alone:
        return 0
    results = imagine(run.model, pairs, run.tokenizer, rounds=args.rounds)
    return finish(args, run, results, images=[str(file) for file in args.images])
