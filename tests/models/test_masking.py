"""Masks and layouts of mixed batches, against loops; the buckets that ragged batches fall into."""

import pytest
import torch

from m3ae_fast import SeqLens
from m3ae_fast.models import masking


def loop_layout(image, text, patches):
    """The same answer, token by token; what is skipped has no row."""
    rows, slots, kept_row, image_rows, text_rows = [], [], 0, [], []
    image_keep = iter(image.ids_keep.tolist())
    image_mask = iter(image.ids_mask.tolist())
    text_keep = iter(text.ids_keep.tolist())
    text_mask = iter(text.ids_mask.tolist())
    for b in range(len(image.keep)):
        start = len(rows)
        rows.append(kept_row)
        slots.append(-1)
        kept_row += 1
        for first, masked, keep, mask, out in (
            (0, image, image_keep, image_mask, image_rows),
            (patches, text, text_keep, text_mask, text_rows),
        ):
            start = len(rows)
            kept = [next(keep) for _ in range(masked.keep.lengths[b])]
            gone = [next(mask) for _ in range(masked.mask.lengths[b])]
            there = [position for position in range(masked.lengths[b]) if position in kept or position in gone]
            for position in there:
                rows.append(kept_row + kept.index(position) if position in kept else -1)
                slots.append(first + position)
            kept_row += len(kept)
            out += [start + there.index(position) for position in gone]
    return rows, slots, image_rows, text_rows


@pytest.mark.parametrize("part", [1.0, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_layout_against_a_loop(seed, part):
    patches, lengths = 16, [3, 0, 9, 2, 1]
    images = [patches, patches, 0, patches, 0]
    ids = torch.arange(5) + 5 * seed
    image = masking.draw(images, 0.75, seed=seed, step=3, sample_ids=ids, stream=0, shared=None)
    text = masking.draw(lengths, 0.5, seed=seed, step=3, sample_ids=ids, stream=1, shared=None)
    if part < 1:
        source = masking.MaskSource(seed=seed, step=3)
        image = masking.drawn_part("image", image, part, source, sample_ids=ids)
        text = masking.drawn_part("text", text, part, source, sample_ids=ids)
    layout = masking.TokenLayout.make(image, text, patches, [n > 0 for n in images], torch.device("cpu"))
    rows, slots, image_rows, text_rows = loop_layout(image, text, patches)
    assert layout.rows.tolist() == rows
    assert layout.slots.tolist() == slots
    assert layout.masked_rows.tolist() == sorted(image_rows + text_rows)
    assert layout.masked_slots.tolist() == [slots[row] for row in sorted(image_rows + text_rows)]
    assert layout.masked_rows[layout.image_rows].tolist() == image_rows
    assert layout.masked_rows[layout.text_rows].tolist() == text_rows
    assert layout.masked.lengths == tuple(i + t for i, t in zip(image.mask.lengths, text.mask.lengths, strict=True))
    skipped = [sum(each.skip.lengths[b] for each in (image, text) if each.skip) for b in range(5)]
    assert layout.full.lengths == tuple(1 + i + t - s for i, t, s in zip(images, lengths, skipped, strict=True))
    assert sum(skipped) == (0 if part == 1 else image.skipped + text.skipped) and (part == 1) == (not sum(skipped))
    for found, first, count in ((layout.all_image_rows, 0, images), (layout.all_text_rows, patches, lengths)):
        numbers = [number for n in count for number in range(n)]
        assert len(found) == len(numbers)
        for row, number in zip(found.tolist(), numbers, strict=True):
            assert row == -1 or slots[row] == first + number
        assert found[found >= 0].tolist() == [row for row, slot in enumerate(slots) if slot >= 0 and
                                              (slot < patches) == (first == 0)]  # fmt: skip
    assert layout.kept.total == sum(row >= 0 for row in rows)
    starts = SeqLens(lengths).cu.tolist()
    words = [starts[b] + i for b, i in zip(masking.sample_of(text.mask).tolist(), text.ids_mask.tolist(), strict=True)]
    assert layout.words_mask.tolist() == words


def test_a_text_keeps_and_masks_at_least_one_word():
    lengths = list(range(1, 65)) * 4
    for ratio in (0.01, 0.5, 0.75, 0.99):
        masked = masking.draw(
            lengths, ratio, seed=1, step=0, sample_ids=torch.arange(len(lengths)), stream=1, shared=None
        )
        for length, keep, mask in zip(lengths, masked.keep.lengths, masked.mask.lengths, strict=True):
            assert keep + mask == length and mask >= 1
            assert keep >= 1 or length == 1
            if 1 <= int(length * (1 - ratio)) < length:
                assert keep == int(length * (1 - ratio))


def test_shared_masks_are_one_draw_over_every_slot():
    masked = masking.draw([16, 16, 5], 0.75, seed=3, step=2, sample_ids=torch.arange(3), stream=0, shared=16)
    rows = masked.as_bool(16)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0, :5], rows[2, :5]) and not rows[2, 5:].any()
    assert rows[0].sum() == 12
    assert not torch.equal(
        rows,
        masking.draw([16, 16, 5], 0.75, seed=3, step=3, sample_ids=torch.arange(3), stream=0, shared=16).as_bool(16),
    )


def test_masks_given_as_bool_round_trip():
    mask = torch.rand(4, 9) < 0.5
    lengths = [9, 4, 0, 7]
    masked = masking.from_mask("text_mask", mask, lengths)
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    assert torch.equal(masked.as_bool(9), mask & real)
    assert masked.lengths == lengths
    with pytest.raises(TypeError, match="text_mask must be of dtype bool"):
        masking.from_mask("text_mask", mask.float(), lengths)
    with pytest.raises(ValueError, match="text_mask must have at least 9 columns"):
        masking.from_mask("text_mask", mask[:, :8], lengths)
    with pytest.raises(ValueError, match=r"text_mask must have shape \(3, any\)"):
        masking.from_mask("text_mask", mask, lengths[:3])


@pytest.mark.parametrize("columns", [8, 10])
def test_an_image_mask_of_another_grid_is_refused(columns):
    source = masking.MaskSource(image_mask=torch.zeros(3, columns, dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"image_mask must have shape \(3, 9\), got \(3, {columns}\)"):
        masking.given_or_drawn("image", source, [9, 0, 9], 0.5, sample_ids=torch.arange(3))


def drawn(lengths, images, patches=16, seed=3):
    """(image, text) masks."""
    keys = {"seed": seed, "step": 0, "sample_ids": torch.arange(len(lengths)), "shared": None}
    image = masking.draw([patches if has else 0 for has in images], 0.75, stream=0, **keys)
    return image, masking.draw(lengths, 0.5, stream=1, **keys)


@pytest.mark.parametrize("images", [[True] * 5, [True, True, False, True, False]])
def test_a_bucket_has_the_layout_and_room_behind_it(images):
    image, text = drawn([3, 0, 9, 2, 1], images)
    exact, roomy = (
        masking.TokenLayout.make(image, text, 16, images, torch.device("cpu"), bucket) for bucket in (False, True)
    )
    assert sum(roomy.sizes) > sum(exact.sizes)
    for name, value in vars(exact).items():
        ours = getattr(roomy, name)
        if isinstance(value, SeqLens):
            assert ours.max >= value.max and ours.lengths[: len(value)] == value.lengths and ours.total == value.total
            assert ours.cu[: len(value) + 1].tolist() == value.cu.tolist()
        elif name != "index":
            rest = 0 if "ids" in name or "words" in name else -1
            assert ours.tolist() == value.tolist() + [rest] * (len(ours) - len(value)), name
        assert name == "index" or (ours.cu if isinstance(value, SeqLens) else ours).data_ptr() % 16 == 0


def test_a_layout_is_of_the_memory_it_is_put_into():
    image, text = drawn([3, 0, 9, 2, 1], [True] * 5)
    layout = masking.TokenLayout.make(image, text, 16, [True] * 5, torch.device("cpu"))
    index = torch.zeros_like(layout.index)
    moved = layout.at(index)
    index.copy_(layout.index)
    assert moved.index is index and moved.sizes == layout.sizes
    assert torch.equal(moved.rows, layout.rows) and torch.equal(moved.full.cu, layout.full.cu)
    assert index.data_ptr() <= moved.rows.data_ptr() < index.data_ptr() + index.nbytes


def test_sizes_are_rounded_to_few_that_pass_no_power_of_two():
    for parts in (8, 64):
        for count in range(3000):
            size = masking.rounded(count, parts)
            power = max(1 << max(count - 1, 0).bit_length(), 8)
            assert count <= size <= power and size - count < max(power // parts, 8) and size % 8 == 0
    assert len({masking.rounded(count, 64) for count in range(8193, 16385)}) == 32


def test_ragged_batches_fall_into_few_buckets():
    """10,000 batches of 64 pairs, captions of any lengths: nothing is drawn, the lengths say the sizes."""
    generator, samples, patches = torch.Generator().manual_seed(0), 64, 256
    found, rows, room = set(), 0, 0
    image = masking.Masked(None, None, SeqLens([64] * samples), SeqLens([192] * samples))
    for _ in range(10_000):
        lengths = torch.randint(3, 65, (samples,), generator=generator)
        keep = (lengths // 4).clamp(min=1)
        text = masking.Masked(None, None, SeqLens(keep), SeqLens(lengths - keep))
        longest = 65 + text.keep.max, 1 + patches + int(lengths.max()), 192 + text.mask.max
        size = masking.Room.of(image, text, samples, longest, True)
        found.add(size)
        rows += samples * (1 + patches) + int(lengths.sum())
        room += samples + size.image_keep + size.image_mask + size.text_keep + size.text_mask
    assert len(found) <= 8
    assert rows <= room <= 1.03 * rows


@pytest.mark.parametrize("least", [26, 52])
def test_images_that_keep_different_numbers_of_patches_fall_into_few_buckets(least):
    """10,000 batches of 64 images of 256 patches, `least` to 128 of them kept."""
    generator, samples = torch.Generator().manual_seed(0), 64
    text = masking.keep_all([0] * samples)
    found, rows, room = set(), 0, 0
    for _ in range(10_000):
        keep = torch.randint(least, 129, (samples,), generator=generator)
        image = masking.Masked(None, None, SeqLens(keep), SeqLens(256 - keep))
        size = masking.Room.of(image, text, samples, (1 + image.keep.max, 257, image.mask.max), True)
        assert size.images == samples and size.image_keep >= image.keep.total and size.image_mask >= image.mask.total
        found.add(size)
        rows += int(keep.sum())
        room += size.image_keep
    assert len(found) <= 20 and room <= 1.1 * rows
