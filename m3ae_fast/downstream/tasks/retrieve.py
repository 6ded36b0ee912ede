"""Retrieval: images find their captions and captions their images, ranked by ITC, the best again by ITM."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast._settings import add_options, given, natural
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.files import open_pairs
from m3ae_fast.downstream.commands.arguments import add_scored, add_train
from m3ae_fast.downstream.commands.session import finish, open_run
from m3ae_fast.downstream.pack import chunks, pack_for
from m3ae_fast.downstream.scoring.recall import recalls
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.downstream.training import Training, train
from m3ae_fast.examples import Pair
from m3ae_fast.models import Model
from m3ae_fast.models.encoders import EncodedView, whole

RERANK = 16  # of ITC's best, for each query
BOTH = "ITC + ITM "


class Scores(NamedTuple):
    """How well N images and M captions belong together."""

    captions: list[str]  # M
    truth: Tensor  # [M] int64: the image that each caption belongs to
    images: list[bytes]  # N: equal where two images are
    tables: dict[str, tuple[Tensor, Tensor]]  # by the prefix of their figures: [N, M] to find texts, and to find images


def retrieve(
    model: Model, pairs: Sequence[Pair], tokenizer: Tokenizer, *, rerank: int = RERANK, batch_size: int = 64
) -> list[Result]:
    """R@1, 5 and 10 both ways: "ITC text R@1" and so on. Of a model that offers `match` also after re-ranking, by ITM
    alone ("text R@1", as ALBEF has it) and by both ("ITC + ITM text R@1").

    By both, a pair's score is its similarity / temperature + ITM's log-odds. In training ITM told right pairs from
    wrong ones, drawn in proportion to exp(similarity / temperature), so its odds say how much likelier than ITC thinks
    a pair is: a correction of ITC, not a score by itself (noise-contrastive estimation).

    Pairs with equal texts or equal images count as right for each other.

    Args:
        model: that encodes both. pairs: all candidates. tokenizer: of the model. batch_size: of a pass.
        rerank: how many of ITC's best ITM ranks again, for each query; 0: none.

    Raises:
        ValueError: no pair; a caption without a word.
    """
    scores = score_pairs(model, pairs, tokenizer, rerank=rerank, batch_size=batch_size)
    same, found = {"texts": scores.captions, "images": scores.images}, []
    for prefix, tables in scores.tables.items():
        for way, table in zip(("text", "image"), tables, strict=True):
            found += [named(prefix, r) for r in recalls(table, scores.truth, **same) if r.name.startswith(way)]
    return found


@torch.no_grad()
def score_pairs(
    model: Model, pairs: Sequence[Pair], tokenizer: Tokenizer, *, rerank: int = RERANK, batch_size: int = 64
) -> Scores:
    """All images beside all captions, as `retrieve` ranks them; arguments and errors are its own."""
    if not len(pairs):
        raise ValueError("pairs must hold at least one, got none")
    _checks.integer("rerank", rerank, 0)
    device = next(model.parameters()).device
    again = model.offers("match") and rerank > 0

    def kept(view: EncodedView) -> EncodedView:  # tokens are many, and only ITM reads them
        return view if again else dataclasses.replace(view, tokens=view.tokens[:0])

    images, texts, captions, truth, keys = [], [], [], [], []
    for chunk in chunks(pairs, batch_size):
        start = len(keys)
        batch = pack_for(model, [p.image for p in chunk], None, tokenizer).to(device)
        images.append(kept(model.encode_images(batch.images)))
        keys += [hashlib.sha256(pixels.numpy().tobytes()).digest() for pixels in batch.images.cpu()]
        of = [(start + i, caption) for i, p in enumerate(chunk) for caption in p.captions]
        batch = pack_for(model, None, [caption for _, caption in of], tokenizer).to(device)
        texts.append(kept(model.encode_texts(batch.text, batch.text_lengths)))
        truth += [i for i, _ in of]
        captions += [caption for _, caption in of]
    scores = torch.cat([x.embedding for x in images]) @ torch.cat([x.embedding for x in texts]).T
    tables = {"ITC ": (scores, scores)}
    if again:
        tables[""], tables[BOTH] = _reranked(model, _Store(images), _Store(texts), scores, rerank, batch_size)
    return Scores(captions, torch.tensor(truth, device="cpu"), keys, tables)


def named(prefix: str, result: Result) -> Result:
    """The same result under a longer name."""
    return dataclasses.replace(result, name=prefix + result.name)


class _Store:
    """Encoded views, chunk after chunk; any of them can be had again as one."""

    def __init__(self, chunks: Sequence[EncodedView]):
        self.tokens = [t for c in chunks for t in c.tokens.split(c.views.sequences.lengths)]
        self.device = chunks[0].tokens.device

    def take(self, which: list[int]) -> EncodedView:
        tokens = [self.tokens[i] for i in which]
        views = whole([len(t) - 1 for t in tokens], self.device)
        return EncodedView(torch.cat(tokens), views, tokens[0][:0])


def _reranked(
    model: Model, images: _Store, texts: _Store, scores: Tensor, count: int, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """[N, M] twice: for each image its `count` best texts before all others by ITC, and for each text images; these by
    ITM alone, then by ITC and ITM."""
    found = []
    for table, first, second in ((scores, images, texts), (scores.T, texts, images)):
        k = min(count, table.shape[1])
        best = table.topk(k, dim=1).indices.cpu()
        outs = table.double(), table.double()
        for start in range(0, len(table), max(batch_size // k, 1)):
            asking = list(range(start, min(start + max(batch_size // k, 1), len(table))))
            candidates = sorted(set(best[asking].flatten().tolist()))
            place = {c: i for i, c in enumerate(candidates)}
            one, other = first.take(asking), second.take(candidates)
            of_first = torch.arange(len(asking), device="cpu").repeat_interleave(k)
            of_second = torch.tensor([place[c] for c in best[asking].flatten().tolist()], device="cpu")
            sides = (one, other, of_first, of_second) if first is images else (other, one, of_second, of_first)
            told, at = model.match(*sides).view(len(asking), k).double(), best[asking].to(table.device)
            itc = table[start : start + len(asking)].gather(1, at).double() / model.contrast.temperature
            for out, score in zip(outs, (told, told + itc), strict=True):
                lifted = 3 + score / (1 + score.abs())  # in the same order, above every cosine
                out[start : start + len(asking)].scatter_(1, at, lifted)
        found.append(outs)
    return [(by_image, by_text.T) for by_image, by_text in zip(*found, strict=True)]


def finetune_retrieval(model: Model, pairs: Sequence[Pair], tokenizer: Tokenizer, **settings) -> list[float]:
    """Train a model for retrieval alone, with ITC and ITM; returns the losses. settings: as of `train`."""
    seed = settings.get("seed", Training.seed)
    device = next(model.parameters()).device
    before = model.config
    model.config = before.for_retrieval()

    def loss_of(examples: list[Pair], step: int) -> Tensor:
        captions = [p.captions[(seed + step + i) % len(p.captions)] for i, p in enumerate(examples)]
        batch = pack_for(model, [p.image for p in examples], captions, tokenizer).to(device)
        model.update_target()
        return model(batch, seed=seed, step=step).loss

    try:
        return train(model, pairs, loss_of, **settings)
    finally:
        model.config = before


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast retrieve` takes."""
    add_scored(command, "shapes|DIR|FILE.jsonl", '{"image": PATH, "caption": TEXT or [TEXT, ...]}')
    command.add_argument(
        "--rerank",
        type=natural,
        default=RERANK,
        metavar="K",
        help="how many of ITC's best to rank again by ITM (%(default)s)",
    )
    command.add_argument(
        "--finetune",
        type=natural,
        default=0,
        metavar="STEPS",
        help="fine-tune with ITC and ITM first (default: zero-shot)",
    )
    add_train(command, "fine-tune on")
    add_options(command, Training, "lr")


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast retrieve`; returns the exit status."""
    if args.train and not args.finetune:
        raise ValueError(f"--train must come with --finetune STEPS, got --train {args.train} alone")
    run, scored, trained = open_run(args, "encode_images", "encode_texts")
    pairs = scored(open_pairs)
    if args.finetune:
        settings = given(Training, args) | {"steps": args.finetune}
        finetune_retrieval(run.model, trained(open_pairs), run.tokenizer, **settings)
    return finish(args, run, retrieve(run.model, pairs, run.tokenizer, rerank=args.rerank))
