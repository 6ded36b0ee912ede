"""Loader: the same stream for any number of workers and after any resume, whatever the files are like."""

import dataclasses
import os
import pickle
import shutil
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import signal_handling

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import BadSample, FolderDataset, Loader, MixedDataset, Sample, ShapesDataset, Tokenizer
from m3ae_fast.data import loader as loader_module
from m3ae_fast.data.images import center_crop, keep_aspect

PHOTOS = Path(__file__).parent.parent / "data" / "photos"
WORDS = [f"{w}{v}" for w in "bcdfghklmn" for v in "aeiou"]
TOKENIZER = Tokenizer.train(["many words make a caption", *WORDS, *ShapesDataset(32).scene(0).captions], 300)


class Marked:
    """`size` samples; image i is filled with i, its caption is word i. Those in `bad` cannot be read."""

    flip_safe = True

    def __init__(self, size=10, bad=()):
        self.size, self.bad = size, frozenset(bad)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise BadSample(f"file{index}.jpg", "it is damaged")
        return Sample(np.full((12, 12, 3), index, np.uint8), (WORDS[index],), f"file{index}.jpg")


def loader(dataset, **options):
    options = {"image_size": 8, "batch_size": 4, "seed": 3, "max_text_length": 16} | options
    return Loader(dataset, TOKENIZER, **options)


def take(stream: Loader, count: int) -> list:
    batches = [next(stream) for _ in range(count)]
    stream.close()
    return batches


def indices(batches) -> list[int]:
    return [int(i) for _, batch in batches for i in batch.images[:, 0, 0, 0]]


def assert_same(first, second):
    assert len(first) == len(second)
    for (step_a, a), (step_b, b) in zip(first, second, strict=True):
        assert step_a == step_b and a.has_image == b.has_image and a.text_lengths == b.text_lengths
        assert torch.equal(a.text, b.text) and torch.equal(a.sample_ids, b.sample_ids)
        assert (a.images is None) == (b.images is None)
        assert a.images is None or torch.equal(a.images, b.images)


def test_batch():
    step, batch = next(loader(ShapesDataset(32), image_size=32))
    assert step == 0 and len(batch) == 4 and batch.has_image == (True,) * 4
    assert batch.images.shape == (4, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.text.dtype == torch.int32 and batch.text.shape == (batch.text_lengths.total,)
    assert batch.sample_ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_on_the_host_under_any_default_device(workers):
    expected = take(loader(Marked(), workers=workers), 2)
    torch.set_default_device("meta")
    try:
        found = take(loader(Marked(), workers=workers), 2)
    finally:
        torch.set_default_device(None)
    assert_same(found, expected)


def test_shapes_are_neither_cropped_nor_mirrored():
    dataset = ShapesDataset(32)
    stream = loader(dataset, image_size=32, max_text_length=512)
    for step, batch in take(stream, 3):
        start = 0
        for i, length in enumerate(batch.text_lengths.lengths):
            sample = dataset[4 * step + i]
            assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), sample.image)
            assert batch.text[start : start + length].tolist() in [TOKENIZER.encode(c) for c in sample.captions]
            start += length


def test_epochs_are_permutations():
    stream = loader(Marked(10), batch_size=5)
    seen = indices(take(stream, 8))
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4, "each in an order of its own"
    assert indices(take(loader(Marked(10), batch_size=5, seed=4), 8)) != seen


def test_batches_larger_than_the_data_set():
    seen = indices(take(loader(Marked(3), batch_size=7), 3))
    assert [sorted(seen[i : i + 3]) for i in range(0, 21, 3)] == [[0, 1, 2]] * 7


def test_grouping_changes_no_sample():
    by_four, by_six = (take(loader(Marked(10), batch_size=n), 12 // n * 5) for n in (4, 6))
    images = [torch.cat([batch.images for _, batch in batches]) for batches in (by_four, by_six)]
    texts = [torch.cat([batch.text for _, batch in batches]) for batches in (by_four, by_six)]
    ids = [torch.cat([batch.sample_ids for _, batch in batches]) for batches in (by_four, by_six)]
    assert torch.equal(images[0][:60], images[1][:60])
    assert torch.equal(texts[0], texts[1]) and torch.equal(ids[0], ids[1])


class Planned:
    """A plan that says what it was made of."""

    def __init__(self, batch, step):
        self.ids, self.step, self.pinned = batch.sample_ids.tolist(), step, False

    def pin_memory(self):
        self.pinned = True
        return self


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_plans_and_pinned_batches(workers, pin_memory, pinned):
    options = {"start_step": 3, "rank": 1, "world_size": 2}
    expected = loader(Marked(10, bad=(4,)), **options)
    stream = loader(Marked(10, bad=(4,)), workers=workers, pin_memory=pin_memory, plan=Planned, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", M3AEFastWarning)
        for step in range(3, 7):
            one, (number, batch, plan) = next(expected), next(stream)
            assert_same([(number, batch)], [one])
            assert (plan.ids, plan.step, plan.pinned) == (batch.sample_ids.tolist(), step, pin_memory)
            assert all(pinned(x) == pin_memory for x in (batch.images, batch.text, batch.text_lengths.cu))
            assert stream.counters == expected.counters and stream.skipped == expected.skipped, "of what was given out"
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("pin_memory", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_plan_that_fails_is_no_death_of_a_worker(workers, pin_memory, pinned):
    def plan(batch, step):
        if step == 1:
            raise RuntimeError("no plan")
        return Planned(batch, step)

    stream = loader(Marked(), workers=workers, pin_memory=pin_memory, plan=plan)
    next(stream)
    with pytest.raises(RuntimeError, match="no plan"):
        next(stream)
    assert stream.workers_died == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_the_batches_of_one_process(workers):
    whole = take(loader(Marked(10), batch_size=6, start_step=1), 4)
    shares = [
        take(loader(Marked(10), batch_size=2, start_step=1, workers=workers, rank=rank, world_size=3), 4)
        for rank in range(3)
    ]
    for (step, batch), *ranks in zip(whole, *shares, strict=True):
        assert [each for each, _ in ranks] == [step] * 3
        assert torch.equal(batch.sample_ids, torch.cat([share.sample_ids for _, share in ranks]))
        assert torch.equal(batch.images, torch.cat([share.images for _, share in ranks]))
        assert torch.equal(batch.text, torch.cat([share.text for _, share in ranks]))


def test_a_rank_is_one_of_the_world():
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        loader(Marked(), rank=2, world_size=2)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        loader(Marked(), world_size=0)


def test_sample_ids_are_unique_and_small():
    with pytest.warns(M3AEFastWarning, match=r"file1\.jpg"):
        ids = torch.cat([batch.sample_ids for _, batch in take(loader(Marked(3, bad=[1])), 10)])
    assert ids.tolist() == list(range(40))
    far = 2**50
    _, batch = next(loader(ShapesDataset(32), start_step=far))
    assert batch.sample_ids.tolist() == [4 * far + i for i in range(4)] and batch.sample_ids.max() < 2**56


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Photos, one without a caption, a caption without a photo, a damaged one, an empty caption file."""
    folder = tmp_path_factory.mktemp("mixed")
    for file in PHOTOS.glob("*.*"):
        shutil.copy(file, folder)
    shutil.copy(PHOTOS / "coffee.jpg", folder / "silent.jpg")
    shutil.copy(PHOTOS / "camera.jpg", folder / "blank.jpg")
    (folder / "blank.txt").write_text("\n\n")
    (folder / "alone.txt").write_text("a small circle\nten words that will have to be cut somewhere, surely")
    (folder / "damaged.jpg").write_bytes((PHOTOS / "coffee.jpg").read_bytes()[:900])
    (folder / "empty.png").touch()
    return folder


@pytest.mark.filterwarnings("ignore::m3ae_fast.M3AEFastWarning")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["shapes", "mixed"])
def test_workers_change_nothing(mixed, kind, workers):
    dataset = ShapesDataset(32) if kind == "shapes" else FolderDataset(mixed)
    alone, helped = loader(dataset), loader(dataset, workers=workers)
    assert_same(take(alone, 6), take(helped, 6))
    assert alone.counters == helped.counters
    assert alone.counters["seen"] == 24 and (kind == "shapes" or alone.counters["images_skipped"] > 0)


@pytest.mark.filterwarnings("ignore::m3ae_fast.M3AEFastWarning")
@pytest.mark.parametrize("start", [1, 5, 7])
@pytest.mark.parametrize("kind", ["shapes", "mixed"])
def test_resume(mixed, kind, start):
    dataset = ShapesDataset(32) if kind == "shapes" else FolderDataset(mixed)
    assert_same(take(loader(dataset), 9)[start:], take(loader(dataset, start_step=start), 9 - start))


def test_pickled_for_spawned_workers(mixed):
    """What a worker process gets and sends back survives pickling, whatever the start method."""
    batches = loader(FolderDataset(mixed))._loader.dataset
    copy = pickle.loads(pickle.dumps(batches))
    for number in range(3):
        here, there = batches[number], pickle.loads(pickle.dumps(copy[number]))
        assert_same([(here.number, here.batch)], [(there.number, there.batch)])
        assert here.counters == there.counters and list(map(str, here.skipped)) == list(map(str, there.skipped))


def test_random_state_is_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(loader(Marked()), 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_augmentation_differs_by_epoch():
    dataset = FolderDataset(PHOTOS)
    stream = take(loader(dataset, batch_size=3, image_size=24), 6)
    crops = {}
    for (_, batch), order in zip(stream, orders(dataset, 6), strict=True):
        for index, image in zip(order, batch.images, strict=True):
            crops.setdefault(index, set()).add(image.numpy().tobytes())
    assert [len(crops[index]) for index in range(3)] == [6, 6, 6]


def test_no_augmentation():
    dataset = FolderDataset(PHOTOS)
    stream = take(loader(dataset, batch_size=3, image_size=24, augment=False), 2)
    for (_, batch), order in zip(stream, orders(dataset, 2), strict=True):
        for index, image in zip(order, batch.images, strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), center_crop(dataset[index].image, 24))


@pytest.mark.parametrize("augment", [True, False])
def test_images_may_be_rectangles(augment):
    dataset = FolderDataset(PHOTOS)
    _, batch = next(loader(dataset, batch_size=3, image_size=[16, 40], augment=augment))
    assert batch.images.shape == (3, 3, 16, 40)
    if not augment:
        index = orders(dataset, 1)[0][0]
        assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), center_crop(dataset[index].image, (16, 40)))


def orders(dataset, epochs):
    """Which index each place of an epoch holds, for the seed that `loader` sets."""
    seen = indices(take(loader(Marked(len(dataset)), batch_size=len(dataset)), epochs))
    return [seen[i : i + len(dataset)] for i in range(0, len(seen), len(dataset))]


def test_every_caption_is_drawn():
    sample = Sample(None, tuple(WORDS[:4]), "x.txt")
    drawn = {int(i) for _, batch in take(loader([sample], max_text_length=64), 16) for i in batch.text}
    assert {TOKENIZER.decode([i]) for i in drawn} == set(WORDS[:4])


def test_mixed_modalities(mixed):
    with pytest.warns(M3AEFastWarning):
        batches = take(loader(FolderDataset(mixed), batch_size=8), 4)
    has = {
        (image, length > 0)
        for _, b in batches
        for image, length in zip(b.has_image, b.text_lengths.lengths, strict=True)
    }
    assert has == {(True, True), (True, False), (False, True)}
    for _, batch in batches:
        assert batch.images.shape[0] == sum(batch.has_image)


def test_texts_alone():
    stream = loader([Sample(None, ("many words",), "x.txt")])
    (_, batch) = next(stream)
    assert batch.images is None and batch.text_lengths.lengths == (2,) * 4
    assert TOKENIZER.decode(batch.text[:2].tolist()) == "many words"


def test_no_tokenizer_means_images_alone():
    stream = Loader(Marked(), None, image_size=8, batch_size=4)
    batch = next(stream)[1]
    assert batch.images.shape[0] == 4 and batch.text_lengths.lengths == (0,) * 4
    assert stream.counters == {"seen": 4, "images_skipped": 0, "texts_cut": 0, "captions_empty": 0}


def test_long_texts_are_cut_and_counted():
    long, short = ("many words make a caption", "many words")
    stream = loader([Sample(None, (long,), "x"), Sample(None, (short,), "y")], max_text_length=3)
    batch = next(stream)[1]
    assert sorted(batch.text_lengths.lengths) == [2, 2, 3, 3]
    assert stream.counters["texts_cut"] == 2
    first = batch.text[: batch.text_lengths.lengths[0]].tolist()
    assert TOKENIZER.decode(first) in ("many words make", "many words")


def test_empty_captions_are_counted():
    image = np.zeros((8, 8, 3), np.uint8)
    stream = loader([Sample(image, (" \t",), "x"), Sample(image, (), "y")])
    batch = next(stream)[1]
    assert batch.text_lengths.lengths == (0,) * 4 and batch.text.numel() == 0 and batch.images.shape[0] == 4
    assert stream.counters == {"seen": 4, "images_skipped": 0, "texts_cut": 0, "captions_empty": 2}


def test_a_text_without_a_word_and_an_image_is_bad():
    dataset = [Sample(None, ("  ",), "blank.txt"), Sample(None, ("words",), "good.txt")]
    with pytest.warns(M3AEFastWarning, match=r"blank\.txt: there is neither an image nor a word in it; skipped"):
        batch = next(loader(dataset))[1]
    assert batch.text_lengths.lengths == (1,) * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_by_the_next_good_one(workers):
    good = indices(take(loader(Marked(10), augment=False), 5))
    bad = {2, 5}
    stream = loader(Marked(10, bad), augment=False, workers=workers)
    with pytest.warns(M3AEFastWarning) as caught:
        got = indices(take(stream, 5))
    expected = []
    for epoch in (good[:10], good[10:]):
        for place in range(10):
            expected.append(next(i for i in epoch[place:] + epoch[:place] if i not in bad))
    assert got == expected
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2, "once for each file"
    assert {m.split(":")[0] for m in messages} == {"file2.jpg", "file5.jpg"}
    assert messages[1].endswith("it is damaged; skipped (bad files so far: 2)")
    assert stream.counters["images_skipped"] >= 4 and stream.counters["seen"] == 20


def test_neighboring_bad_samples_count_each_time():
    stream = loader(Marked(4, bad=[0, 1, 2]), batch_size=4)
    with pytest.warns(M3AEFastWarning):
        assert indices(take(stream, 2)) == [3] * 8
    assert stream.counters["images_skipped"] == 2 * (1 + 2 + 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_strict(workers):
    stream = loader(Marked(10, bad=[2]), workers=workers, strict=True)
    with pytest.raises(BadSample, match=r"^file2\.jpg: it is damaged$"):
        take(stream, 5)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_can_be_read(workers):
    stream = loader(Marked(5, bad=range(5)), workers=workers)
    with pytest.raises(
        ValueError, match=r"dataset must hold samples that can be read, none of 5 could be used; file\d\.jpg: it"
    ):
        next(stream)


def test_a_huge_unreadable_data_set_is_not_read_to_its_end():
    class Unreadable(Marked):
        endless = True

        def __getitem__(self, index):
            raise BadSample(str(index), "the disk went away")

    with pytest.raises(ValueError, match="none of 1000 could be used; 999: the disk went away"):
        next(loader(Unreadable(2**31)))


class Telling(Marked):
    """Image i is even or odd; each caption says so, or nothing that is known."""

    def __getitem__(self, index):
        kind = frozenset([("even", "odd")[index % 2]])
        return dataclasses.replace(super().__getitem__(index), facts=kind, says=(kind if index < 6 else frozenset(),))


def right(batch):
    """[image][text]: whether the image has all facts that the text says, and that says some."""
    facts, says = ([{*row} - {0} for row in numbers.tolist()] for numbers in (batch.facts, batch.says))
    return [[bool(theirs) and theirs <= ours for theirs in says] for ours in facts]


def test_a_batch_says_which_texts_are_right_for_which_images():
    ((_, unknown),) = take(loader(Marked()), 1)
    ((_, batch),) = take(loader(Telling(), batch_size=8), 1)
    assert unknown.facts is None and unknown.says is None
    numbers = indices([(0, batch)])
    assert right(batch) == [[j < 6 and i % 2 == j % 2 for j in numbers] for i in numbers]


def test_what_one_data_set_says_is_not_known_of_the_images_of_another():
    mixture = MixedDataset([Telling(6), Telling(6)], [1, 1])
    _, batch = next(loader(mixture, batch_size=12))
    numbers, sources = indices([(0, batch)]), [mixture.at(position, 3)[0] for position in range(12)]
    kinds = [(source, number % 2) for source, number in zip(sources, numbers, strict=True)]
    assert set(sources) == {0, 1} and right(batch) == [[a == b for b in kinds] for a in kinds]


class Unlike(Marked):
    """Most have no caption and no label; their images are not to be decoded."""

    classes = ("a",)

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == 7:
            return dataclasses.replace(sample, labels=(0,))
        return Sample("cannot be decoded", (), sample.name)


@pytest.mark.parametrize("option, kind", [("pairs_only", "unpaired"), ("labeled_only", "unlabeled")])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_not_wanted_is_left_out(monkeypatch, option, kind, workers):
    monkeypatch.setattr(loader_module, "MAX_TRIES", 2)
    stream = loader(Unlike(), strict=True, workers=workers, **{option: True})
    with pytest.warns(M3AEFastWarning, match="are wanted, there is no.*; left out, as all such") as caught:
        assert indices(take(stream, 5)) == [7] * 20
    assert len(caught) == 1 and set(stream.skipped) == {kind} and stream.skipped[kind] > 20
    assert stream.counters["images_skipped"] == 0 and stream.bad == {}
    with pytest.raises(ValueError, match="dataset must hold samples of the kind wanted, none of 5 could be used; file"):
        next(loader(Unlike(5), **{option: True}))


def test_names_of_many_classes_are_numbered_at_once():
    class Many(Marked):
        classes = tuple(map(str, range(50_000)))

    start = time.perf_counter()
    loader(Many())
    assert time.perf_counter() - start < 2, "seconds; a minute where each is searched for"


class Dies(Marked):
    def __getitem__(self, index):
        if get_worker_info() is not None:
            os._exit(1)
        return super().__getitem__(index)


class Fails(Marked):
    def __getitem__(self, index):
        raise KeyError("a mistake in the data set")


def test_workers_that_die_every_time_are_given_up(monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_DEATHS", 2)  # each takes torch five seconds to notice
    stream = loader(Dies(), workers=1, start_step=5)
    warned = pytest.warns(M3AEFastWarning, match=r"DataLoader worker .*exited unexpectedly.*started again at batch 5")
    with warned, pytest.raises(ChildProcessError, match=r"workers died 2 times at batch 5, the last: DataLoader"):
        next(stream)
    assert stream.workers_died == 2


def other_loader_used():
    """torch's handler for workers that die is there, as after any DataLoader."""
    next(iter(DataLoader([0], num_workers=1)))
    signal_handling._SIGCHLD_handler_set = False
    signal_handling._set_SIGCHLD_handler()


@pytest.mark.parametrize("other", [None, other_loader_used])
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 3)])
def test_a_worker_that_is_killed_costs_no_batch(other, rank, world_size):
    options = {"batch_size": 2, "rank": rank, "world_size": world_size}
    whole = loader(Marked(10, bad=[4]), **options)
    stream = loader(Marked(10, bad=[4]), workers=2, **options)
    if other:
        other()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", M3AEFastWarning)
        expected = take(whole, 13)
        batches = [next(stream) for _ in range(4)]
        for worker in stream._batches._workers:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()  # its death is known here: no error comes before the next batch is asked for
        batches += [next(stream) for _ in range(2)]
        os.kill(stream._batches._workers[0].pid, signal.SIGKILL)
        batches += [next(stream) for _ in range(7)]  # more than have been read ahead
    stream.close()
    assert_same(expected, batches)
    assert stream.counters == whole.counters and stream.workers_died == 2
    assert sum("started again at batch" in str(w.message) for w in caught) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_pass_through(workers):
    with pytest.raises(KeyError, match="a mistake in the data set"):
        next(loader(Fails(), workers=workers))


def test_ctrl_c_leaves_the_workers_to_the_main_process():
    stream = loader(Marked(), workers=1)
    next(stream)
    (worker,) = stream._batches._workers
    os.kill(worker.pid, signal.SIGINT)
    assert [step for step, _ in take(stream, 8)] == list(range(1, 9))


def test_no_worker_outlives_close():
    stream = loader(Marked(), workers=1)
    next(stream)
    (worker,) = stream._batches._workers
    assert worker.is_alive()
    stream.close()
    assert not worker.is_alive()
    with pytest.raises(StopIteration):
        next(stream)


def test_wait_is_measured():
    stream = loader(Marked())
    assert stream.wait_seconds == 0 and iter(stream) is stream
    next(stream)
    first = stream.wait_seconds
    next(stream)
    assert 0 < first < stream.wait_seconds


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": (8, 8, 3)}, r"image_size must be pixels a side or \(height, width\), got \(8, 8, 3\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_text_length": 0}, "max_text_length must be at least 1, got 0"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"seed": -1}, r"seed must be in \[0, "),
        ({"max_patches": 0, "patch_size": 4}, "max_patches must be at least 1, got 0"),
        ({"max_patches": 4, "patch_size": 0}, "patch_size must be at least 1, got 0"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        loader(Marked(), **options)
    with pytest.raises(TypeError, match="must be an integer, got str"):
        loader(Marked(), **dict.fromkeys(options, "1"))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_mixed_sizes_keep_their_aspect(workers):
    """Each is whole, whatever the batch; mirrored, half of the time, in training alone."""
    folder, options = FolderDataset(PHOTOS), {"max_patches": 20, "patch_size": 4, "workers": workers}
    whole = [keep_aspect(folder[i].image, 4, 20).astype(int) for i in range(len(folder))]
    assert len({image.shape for image in whole}) > 1
    seen = set()
    for augment in (False, True):
        for _, batch in take(loader(folder, augment=augment, **options), 6):
            assert batch.images.shape[2:] == (4, 4) and batch.text_lengths.total
            for image in batch.whole_images():
                pixels = image.permute(1, 2, 0).numpy()
                for number, each in enumerate(whole):
                    for mirrored in (False, True):
                        if each.shape == pixels.shape and abs(each[:, :: -1 if mirrored else 1] - pixels).mean() < 8:
                            seen.add((number, augment, mirrored))
    numbers = range(len(folder))
    assert seen == {(i, *how) for i in numbers for how in ((False, False), (True, False), (True, True))}


def test_mixed_sizes_of_texts_alone_are_none():
    texts = [Sample(None, (WORDS[i],), str(i)) for i in range(4)]
    ((_, batch),) = take(loader(texts, max_patches=20, patch_size=4), 1)
    assert batch.images is None and batch.grids is None and batch.text_lengths.lengths == (1,) * 4


def test_an_empty_data_set():
    with pytest.raises(ValueError, match="dataset must hold at least one sample, got an empty one"):
        loader([])


def test_nothing_warns_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(loader(FolderDataset(PHOTOS), workers=1), 3)
