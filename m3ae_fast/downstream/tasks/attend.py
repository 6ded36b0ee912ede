"""Where CLS and the words of a caption look: attention weights of an encoder, as numbers and as pictures."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from m3ae_fast._drawing import FAINT, INK, heat, new_figure, note_of_channels, save_figure, visible
from m3ae_fast._settings import natural, path
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.specs import refuse_streamed
from m3ae_fast.data.text import CONTINUES
from m3ae_fast.downstream.commands.arguments import add_captions, add_device, add_picture, add_run, check_captions
from m3ae_fast.downstream.commands.session import open_run
from m3ae_fast.downstream.features import evaluating
from m3ae_fast.models import Model
from m3ae_fast.models.ground import to_pixels
from m3ae_fast.nn import Transformer
from m3ae_fast.train.pictures import batch_of_files, held_out

COLUMNS = 8  # of panels in a picture


@dataclasses.dataclass
class Attention:
    """Of one image, fp32 on the CPU. Rows sum to less than 1: the rest goes to CLS and to words."""

    cls: Tensor  # [P], of CLS for each patch
    words: Tensor  # [W, P], of each word of the caption for each patch; W is 0 where no word is read


@torch.no_grad()
def attend(model: Model, batch: ImageTextBatch, *, layer: int | None = None, rollout: bool = False) -> list[Attention]:
    """Attention of every image, mean over the heads: in the `joint_encoder` over image and words or, without one or
    without a word in any sample, in the `image_encoder` over the image alone.

    Args:
        model: of a run.
        batch: images, with texts or without.
        layer: of which block, counted from 0; None: the last.
        rollout: instead, the product over all blocks of (weights + identity) / 2: how much of each patch has come
            through to each token if it is mixed as the weights say. In MAMO's fusion encoder patches have seen one
            another before it begins.
    Raises:
        ValueError: a sample without an image, images of mixed sizes, no such block, or both a layer and rollout.

    Source: arXiv:2005.00928 (rollout).
    """
    if batch.images is None or not all(batch.has_image):
        raise ValueError("batch must have an image in every sample, got one without")
    if batch.grids is not None:
        raise ValueError("batch must have images of one size, got mixed sizes (a run of --max-patches)")
    transformer = model.joint_encoder() if batch.text_lengths.total else None
    if transformer is None:
        batch, transformer = ImageTextBatch(batch.images), model.image_encoder()[1]
    depth, P = len(transformer.blocks), model.config.patches
    if layer is not None and rollout:
        raise ValueError(f"layer must be None with rollout, which goes through all of them, got {layer}")
    if layer is not None and not 0 <= layer < depth:
        raise ValueError(f"layer must be in [0, {depth}), a block of the encoder, got {layer}")
    with evaluating(model):
        blocks = weights_of(transformer, lambda: model.encode_cls(batch))
    found = []
    for weights in zip(*blocks, strict=True):  # of every block [S, S], for each sequence [CLS; patches; words]
        chosen = _rollout(weights) if rollout else weights[depth - 1 if layer is None else layer]
        found.append(Attention(chosen[0, 1 : 1 + P].cpu(), chosen[1 + P :, 1 : 1 + P].cpu()))
    return found


def weights_of(transformer: Transformer, call: Callable[[], object]) -> list[list[Tensor]]:
    """softmax(q k' / sqrt(head dimension)), mean over the heads, [S, S] fp32, of every block and every sequence of it.

    The kernels never store these; they are made again here, from what every block's attention was given.

    Args:
        transformer: whose blocks are looked at. call: runs it, once.
    """
    found = []

    def look(attn: nn.Module, inputs: tuple) -> None:
        x, seqlens = inputs[:2]
        qkv = attn.qkv(x).float().view(-1, 3, attn.heads, attn.head_dim)
        parts = (part.permute(1, 2, 0, 3) for part in qkv.split(seqlens.lengths))
        found.append([(q @ k.transpose(1, 2) / attn.head_dim**0.5).softmax(-1).mean(0) for q, k, _ in parts])

    hooks = [block.attn.register_forward_pre_hook(look) for block in transformer.blocks]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rollout(weights: tuple[Tensor, ...]) -> Tensor:
    one = torch.eye(len(weights[0]), device=weights[0].device)
    total = one
    for weight in weights:
        total = (weight + one) / 2 @ total
    return total


def draw_attention(model: Model, batch: ImageTextBatch, tokenizer: Tokenizer | None, path: Path, **options) -> None:
    """A picture: every image, where its CLS looks, where each word does, the mean over its pieces: dark blue where
    least, yellow where most.

    Args:
        batch: images as uint8, with texts or without. tokenizer: of the model. path: of the PNG.
        options: of `attend`.
    """
    rows = []
    words = batch.text.cpu().split(batch.text_lengths.lengths)
    images = visible(batch.images.cpu().permute(0, 2, 3, 1).numpy())
    for image, ids, each in zip(images, words, attend(model, batch, **options), strict=True):
        read = by_word(tokenizer.tokens(ids.tolist()), each.words) if len(each.words) else []
        titles, maps = zip(("CLS", each.cls), *read, strict=True)
        shown = (heat(image, map) for map in to_pixels(torch.stack(maps), model.config))
        panels = [("image", image), *zip(titles, shown, strict=True)]
        rows += [
            panels[:COLUMNS],
            *([None, *panels[i : i + COLUMNS - 1]] for i in range(COLUMNS, len(panels), COLUMNS - 1)),
        ]
    columns = max(map(len, rows))
    height, width = model.config.image_shape
    figure = new_figure(1.4 * columns, (1.4 * height / width + 0.2) * len(rows))
    figure.supxlabel(note_of_channels(model.config.channels), fontsize=9, color=FAINT)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for line, panels in zip(grid, rows, strict=True):
        for axes, panel in zip(line, panels, strict=False):
            if panel is not None:
                axes.imshow(panel[1])
                axes.set_title(panel[0], fontsize=9, color=INK, parse_math=False)
    save_figure(figure, path)


def by_word(tokens: Sequence[str], maps: Tensor) -> list[tuple[str, Tensor]]:
    """Each word with the mean of its pieces' maps.

    Args:
        tokens: WordPiece entries, of which those with "##" continue a word. maps: [W, P], one a token.
    """
    words: list[tuple[str, list[Tensor]]] = []
    for token, each in zip(tokens, maps, strict=True):
        if words and token.startswith(CONTINUES) and token != CONTINUES:
            word, pieces = words.pop()
            words.append((word + token.removeprefix(CONTINUES), [*pieces, each]))
        else:
            words.append((token, [each]))
    return [(word, torch.stack(pieces).mean(0)) for word, pieces in words]


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast attend` takes."""
    add_run(command)
    command.add_argument(
        "images", nargs="*", type=path, metavar="IMAGE", help="an image file (none: four images of --data)"
    )
    command.add_argument("--data", metavar="shapes|DIR", help="data to take four images from (default: the run's own)")
    add_captions(command)
    add_picture(command, "attention.png")
    command.add_argument(
        "--layer", type=natural, metavar="N", help="the block whose attention is drawn, from 0 (default: the last)"
    )
    command.add_argument(
        "--rollout", action="store_true", help="attention rollout through all blocks (arXiv:2005.00928)"
    )
    add_device(command)


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast attend`; returns the exit status."""
    check_captions(args)
    run, *_ = open_run(args)
    if args.captions and run.model.joint_encoder() is None:
        kind = type(run.model).__name__
        raise ValueError(f"--caption must not be given: {kind} encodes no image beside its words, got {args.captions}")
    if args.images and args.data:
        raise ValueError("give images or --data, not both")
    if args.images:
        batch = batch_of_files(args.images, args.captions, run.model.config, run.tokenizer)
    else:
        if args.data is None:
            refuse_streamed(run.config.data, args.run, "give images or --data")
        batch = held_out(run.model.config, run.tokenizer, run.config, data=args.data, count=4)
    options = {"layer": args.layer, "rollout": args.rollout}
    draw_attention(run.model, batch.to(args.device), run.tokenizer, args.out, **options)
    print(f"{args.out}: {len(batch)} images, the model after {run.step:,} steps")
    return 0
