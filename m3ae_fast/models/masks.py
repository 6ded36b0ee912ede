"""Ways to mask beside the uniform one: blocks, a ratio for each sample, budgets over modalities, scores.

Each returns [B, columns] bool on the CPU, True = masked, False past a sample's length (`multi_block_mask`: uint8):
what `M3AE.forward` takes as `image_mask` and `text_mask`. Random numbers are functions of (seed, step, sample id,
stream) alone, so that a sample's mask is the same on every device and however samples are grouped into batches or
ranks. Of two tokens or more at least one is kept and one masked; a single token is masked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast.models.config import M3AEConfig
from m3ae_fast.models.masking import KEPT, PREDICTED, SKIPPED, STREAMS, MaskSource, count_kept, draw_kept

ATTEMPTS = 10  # to place a block, as in BEiT's public code


def with_masks(
    source: MaskSource,
    config: M3AEConfig,
    grids: Sequence[tuple[int, int]],
    words: Sequence[int],
    sample_ids: Tensor,
) -> MaskSource:
    """The same source with the masks that `config.masking` makes here; those that a caller gave stay.

    Args:
        grids: [B] rows and columns of patches of each sample's image; (0, 0) without one.
        words: [B] of each sample.
    """
    if source.seed is None:
        return source
    patches = [rows * columns for rows, columns in grids]
    keys = {"seed": source.seed, "step": source.step, "sample_ids": sample_ids}
    image = text = None
    if config.masking == "block":
        image = _by_grid(functools.partial(block_mask, ratio=config.image_mask_ratio), grids, **keys)
    elif config.masking == "multi_block":
        image = _by_grid(multi_block_mask, grids, **keys)
    elif config.masking == "ratio_range":
        image = random_mask(patches, config.mask_ratio_range, stream=STREAMS["image"], **keys)
        text = random_mask(words, config.mask_ratio_range, stream=STREAMS["text"], **keys)
    elif config.masking == "dirichlet":
        ratios = config.image_mask_ratio, config.text_mask_ratio
        num_keep = [sum(map(count_kept, tokens, ratios)) for tokens in zip(patches, words, strict=True)]
        image, text = dirichlet_masks((patches, words), num_keep, alpha=config.dirichlet_alpha, **keys)
    given = source.image_mask, source.text_mask
    image, text = (mask if own is None else own for own, mask in zip(given, (image, text), strict=True))
    return dataclasses.replace(source, image_mask=image, text_mask=text)


def _by_grid(make: Callable[..., Tensor], grids: Sequence[tuple[int, int]], *, sample_ids: Tensor, **keys) -> Tensor:
    """[B, most patches] bool or uint8: the masks that make(grid, ...) makes of the images of each grid."""
    out = torch.zeros(len(grids), max((math.prod(grid) for grid in grids), default=0), dtype=torch.bool, device="cpu")
    for grid in set(grids) - {(0, 0)}:
        of = torch.tensor([each == grid for each in grids], device="cpu")
        masks = make(grid, sample_ids=sample_ids[of], **keys)
        out = out.to(masks.dtype)
        out[of, : math.prod(grid)] = masks
    return out


def random_mask(
    lengths: Sequence[int],
    ratio_range: tuple[float, float],
    *,
    seed: int,
    step: int = 0,
    sample_ids: Sequence[int] | Tensor,
    stream: int = 0,
) -> Tensor:
    """Uniformly random tokens, a share of them that is drawn for each sample. [B, longest] bool.

    Args:
        lengths: [B] tokens of each sample.
        ratio_range: (low, high) in [0, 1): the masked share is uniform between them; int(length * (1 - share)) tokens
            are kept.
        seed, step, sample_ids, stream: the key, as of `sample_mask`.

    Raises:
        ValueError: a number outside its range, an empty range. TypeError: not a number.
    """
    _checks.interval("ratio_range", ratio_range, "[0, 1)")
    _entries("lengths", lengths, sample_ids)
    draws = _draws(seed, step, sample_ids, stream)
    keep = [count_kept(n, each.uniform(*ratio_range)) for n, each in zip(lengths, draws, strict=True)]
    keys = {"seed": seed, "step": step, "sample_ids": sample_ids, "stream": stream}
    return draw_kept(lengths, keep, **keys).as_bool(max(lengths, default=0))


def block_mask(
    grid: tuple[int, int],
    ratio: float,
    *,
    seed: int,
    step: int = 0,
    sample_ids: Sequence[int] | Tensor,
    stream: int = 0,
    min_patches: int = 16,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Tensor:
    """Rectangles of patches, which may overlap, until a share of the image is masked. [B, rows * columns] bool.

    A block's area is uniform between min_patches and the number of patches still to be masked. Once ten blocks in a row
    do not fit into the grid, mask nothing new or mask too much, single patches fill up the count, which is that of
    uniform masks.

    Args:
        grid: (rows, columns) of patches. ratio: share to mask, in [0, 1).
        seed, step, sample_ids, stream: the key, as of `sample_mask`.
        min_patches: least area of a block. aspect: (low, high) of height / width, uniform in its logarithm.

    Raises:
        ValueError: a number outside its range, an empty range. TypeError: not a number.

    Source: BEiT, arXiv:2106.08254, algorithm 1, which stops where blocks do.
    """
    patches = _patches(grid)
    _checks.real("ratio", ratio, "[0, 1)")
    _checks.integer("min_patches", min_patches, 1)
    _checks.interval("aspect", aspect, "(0, inf)")
    draws = _draws(seed, step, sample_ids, stream)
    out = np.zeros((len(draws), *grid), bool)
    for mask, each in zip(out, draws, strict=True):
        left = patches - count_kept(patches, ratio)
        while left and (found := _add_block(mask, left, each, min_patches, aspect)):
            left -= found
        free = np.flatnonzero(~mask).tolist()
        for _ in range(left):
            mask[divmod(free.pop(each.integer(len(free))), grid[1])] = True
    return torch.from_numpy(out.reshape(len(draws), patches))


def _add_block(mask: np.ndarray, most: int, draws: _Draws, min_patches: int, aspect: tuple[float, float]) -> int:
    """Mask a block with at most so many new patches; returns their number, 0 where none was found."""
    for _ in range(ATTEMPTS):
        area = draws.uniform(min(min_patches, most), most)
        height, width = _sides(area, math.exp(draws.uniform(*map(math.log, aspect))))
        if height > mask.shape[0] or width > mask.shape[1]:
            continue
        block = draws.place(mask, height, width)
        new = block.size - np.count_nonzero(block)
        if 0 < new <= most:
            block[:] = True
            return new
    return 0


def multi_block_mask(
    grid: tuple[int, int],
    *,
    seed: int,
    step: int = 0,
    sample_ids: Sequence[int] | Tensor,
    stream: int = 0,
    blocks: int = 4,
    scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    context: tuple[float, float] = (0.85, 1.0),
) -> Tensor:
    """I-JEPA's masks: a few large rectangles of one size in each image, which may overlap, are to be predicted from
    what they leave of one larger square. [B, rows * columns] uint8: 0 = kept, 1 = to be predicted, 2 = neither.

    A block that would leave no patch is left out; where blocks leave nothing of the square, all other patches are kept.

    Args:
        grid: (rows, columns) of patches.
        seed, step, sample_ids, stream: the key, as of `sample_mask`.
        blocks: how many. scale: (low, high) of a block's share of the image. aspect: (low, high) of height / width.
        context: (low, high) of the square's share of the image. It is cut to one row and one column less than the grid,
            as blocks are.

    Raises:
        ValueError: a number outside its range, an empty range. TypeError: not a number.

    Source: I-JEPA, arXiv:2301.08243, section 3; its public code draws the sizes for each batch.
    """
    patches = _patches(grid)
    _checks.integer("blocks", blocks, 1)
    _checks.interval("scale", scale, "(0, 1)")
    _checks.interval("aspect", aspect, "(0, inf)")
    _checks.interval("context", context, "(0, 1]")
    draws = _draws(seed, step, sample_ids, stream)
    out = np.full((len(draws), *grid), SKIPPED, np.uint8)
    for states, each in zip(out, draws, strict=True):
        mask, square = np.zeros((2, *grid), bool)
        sides = _within(_sides(each.uniform(*scale) * patches, each.uniform(*aspect)), grid)
        for _ in range(blocks):
            block = each.place(mask, *sides)
            before = block.copy()
            block[:] = True
            if mask.all() and patches > 1:
                block[:] = before
        each.place(square, *_within(_sides(each.uniform(*context) * patches, 1.0), grid))[:] = True
        states[square & ~mask if (square & ~mask).any() else ~mask] = KEPT
        states[mask] = PREDICTED
    return torch.from_numpy(out.reshape(len(draws), patches))


def _within(sides: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a block, less than the grid's."""
    height, width = (min(side, max(most - 1, 1)) for side, most in zip(sides, grid, strict=True))
    return height, width


def dirichlet_masks(
    lengths: Sequence[Sequence[int]],
    num_keep: Sequence[int],
    *,
    alpha: float | Sequence[float] = 1.0,
    seed: int,
    step: int = 0,
    sample_ids: Sequence[int] | Tensor,
) -> list[Tensor]:
    """Random tokens of several modalities: each sample's budget of kept tokens is divided by Dirichlet shares.

    A modality keeps int(share * budget) of its tokens, or all where it has fewer. What is left of the budget goes to
    the modality with the largest share, as far as it has tokens, then to the next.

    Args:
        lengths: of each of M modalities, the tokens of the B samples.
        num_keep: [B] tokens to keep in each sample, of all modalities together; at least one is kept and, before that,
            one masked.
        alpha: of the Dirichlet distribution, in [0.001, 1000], a number for all modalities or M numbers. With 1 for
            all, all shares are equally likely; below 1 one modality tends to get most of the budget, above 1 the shares
            are similar.
        seed, step, sample_ids: the key, as of `sample_mask`; the stream of modality m is m.

    Returns:
        M masks, [B, longest of the modality] bool.

    Raises:
        ValueError: a number outside its range, sizes that disagree. TypeError: not a number.

    Source: MultiMAE, arXiv:2204.01678, section 3.3; 4M, arXiv:2312.06647.
    """
    alphas = alpha if isinstance(alpha, Sequence) else [alpha] * len(lengths)
    _entries("alpha", alphas, lengths, "lengths")
    for each in alphas:
        _checks.real("alpha", each, "[0.001, 1000]")
    for each in lengths:
        _entries("lengths", each, sample_ids)
    _entries("num_keep", num_keep, sample_ids)
    draws = _draws(seed, step, sample_ids, len(lengths))  # a stream that no modality has
    keep = [_deal(*each, alphas) for each in zip(draws, zip(*lengths, strict=True), num_keep, strict=True)]
    keys, masks = {"seed": seed, "step": step, "sample_ids": sample_ids}, []
    for m, own in enumerate(lengths):
        masked = draw_kept(own, [each[m] for each in keep], stream=m, **keys)
        masks.append(masked.as_bool(max(own, default=0)))
    return masks


def _deal(draws: _Draws, lengths: Sequence[int], budget: int, alphas: Sequence[float]) -> list[int]:
    """How many tokens of each modality a sample keeps."""
    _checks.integer("num_keep", budget, 0)
    budget = max(0, min(max(budget, 1), sum(lengths) - 1))
    logs = [draws.log_gamma(alpha) for alpha in alphas]
    weights = [math.exp(each - max(logs)) for each in logs]
    keep = [min(int(weight / sum(weights) * budget), n) for weight, n in zip(weights, lengths, strict=True)]
    for m in sorted(range(len(lengths)), key=lambda m: -weights[m]):
        keep[m] += min(lengths[m] - keep[m], budget - sum(keep))
    return keep


def stand_ins(
    counts: Sequence[int],
    vocab_size: int,
    *,
    random: float,
    kept: float,
    seed: int,
    step: int = 0,
    sample_ids: Sequence[int] | Tensor,
) -> Tensor:
    """What is shown in the place of each masked word: [sum of counts] int64, a word of the vocabulary, vocab_size for
    [MASK], or -1 for the word itself.

    Args:
        counts: [B] masked words of each sample. vocab_size: of words.
        random, kept: probabilities of a random word and of the word itself; the rest is [MASK].
        seed, step, sample_ids: the key, as of `sample_mask`.

    Raises:
        ValueError: a number outside its range, sizes that disagree. TypeError: not a number.

    Source: BERT, arXiv:1810.04805, section 3.1, as ALBEF has it: any word of the vocabulary may stand in.
    """
    _entries("counts", counts, sample_ids)
    shown = []
    for count, draws in zip(counts, _draws(seed, step, sample_ids, 2), strict=True):  # a stream that no modality has
        for _ in range(count):
            share, word = draws.uniform(), draws.integer(vocab_size)
            shown.append(-1 if share < kept else word if share < kept + random else vocab_size)
    return torch.tensor(shown, dtype=torch.int64, device="cpu")


def score_mask(scores: Tensor, ratio: float, *, highest: bool = True, lengths: Sequence[int] | None = None) -> Tensor:
    """The tokens with the highest scores, or the lowest: what a model attends to, for instance. [B, P] bool.

    Args:
        scores: [B, P] numbers of any dtype but complex; on a GPU they are copied to the host: a sync. Of equal ones the
            first are masked.
        ratio: share to mask, in [0, 1): int(length * (1 - ratio)) tokens are kept.
        highest: mask the highest, else the lowest.
        lengths: [B] tokens of each sample; None: P.

    Raises:
        ValueError: a score of a token is NaN; a number outside its range, sizes that disagree. TypeError: no numbers.

    Source: AttMask, arXiv:2203.12719, section 3.2: masks what the teacher's CLS token attends to most.
    """
    _checks.shape("scores", scores, (None, None))
    if scores.is_complex():
        raise TypeError(f"scores must be of a real dtype, got {scores.dtype}")
    _checks.real("ratio", ratio, "[0, 1)")
    samples, columns = scores.shape
    lengths = [columns] * samples if lengths is None else list(lengths)
    _entries("lengths", lengths, scores, "scores")
    for n in lengths:
        _checks.integer("lengths", n, 0, columns + 1)
    scores, place = scores.detach().cpu(), torch.arange(columns, device="cpu")
    past = place >= torch.tensor(lengths, dtype=torch.int64, device="cpu")[:, None]
    if (scores.isnan() & ~past).any():
        raise ValueError("scores must be numbers, got NaN")
    order = scores.argsort(dim=1, descending=highest, stable=True)
    order = order.gather(1, past.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
    masked = torch.tensor([n - count_kept(n, ratio) for n in lengths], dtype=torch.int64, device="cpu")
    return torch.zeros_like(past).scatter_(1, order, place < masked[:, None])


class _Draws:
    """The random numbers of a sample: numpy's Philox4x64-10, keyed by (seed, sample id, stream), from a counter of the
    step. Made of its words alone, whose order no version of numpy changes."""

    def __init__(self, seed: int, step: int, sample: int, stream: int):
        self._words = np.random.Philox(key=seed | (sample | stream << 56) << 64, counter=step << 192)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """In [low, high)."""
        return low + (high - low) * (self._words.random_raw() >> 11) * 2.0**-53

    def integer(self, below: int) -> int:
        """In [0, below)."""
        return int(self.uniform(0, below))

    def place(self, mask: np.ndarray, height: int, width: int) -> np.ndarray:
        """A view of a block of the mask, anywhere within it."""
        top, left = (self.integer(most - side + 1) for most, side in zip(mask.shape, (height, width), strict=True))
        return mask[top : top + height, left : left + width]

    def log_gamma(self, shape: float) -> float:
        """The logarithm of a gamma variate (Marsaglia and Tsang, ACM TOMS 26, 2000)."""
        if shape < 1:
            return self.log_gamma(shape + 1) + math.log(1 - self.uniform()) / shape
        d = shape - 1 / 3
        while True:
            x = math.sqrt(-2 * math.log(1 - self.uniform())) * math.cos(2 * math.pi * self.uniform())
            v = (1 + x / math.sqrt(9 * d)) ** 3
            if v > 0 and math.log(1 - self.uniform()) < x * x / 2 + d - d * v + d * math.log(v):
                return math.log(d * v)


def _draws(seed: int, step: int, sample_ids: Sequence[int] | Tensor, stream: int) -> list[_Draws]:
    """One for each sample."""
    _checks.integer("seed", seed, 0, 2**64)
    _checks.integer("step", step, 0, 2**32)
    _checks.integer("stream", stream, 0, 2**8)
    if isinstance(sample_ids, Tensor):
        _checks.shape("sample_ids", sample_ids, (None,))
        sample_ids = sample_ids.tolist()
    for each in sample_ids:
        _checks.integer("sample_ids", each, 0, 2**56)
    return [_Draws(seed, step, each, stream) for each in sample_ids]


def _entries(name: str, value: Sequence[int], like: Sequence[int] | Tensor, like_name: str = "sample_ids") -> None:
    if len(value) != len(like):
        raise ValueError(f"{name} must have {len(like)} entries, as {like_name} has, got {len(value)}")


def _patches(grid: tuple[int, int]) -> int:
    """How many there are."""
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        raise ValueError(f"grid must be (rows, columns) of patches, got {grid!r}")
    for side in grid:
        _checks.integer("grid", side, 1)
    return grid[0] * grid[1]


def _sides(area: float, aspect: float) -> tuple[int, int]:
    """(height, width) of a block."""
    return max(round(math.sqrt(area * aspect)), 1), max(round(math.sqrt(area / aspect)), 1)
