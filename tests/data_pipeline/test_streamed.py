"""StreamedDataset: which reader gets what, and what a resume goes on with."""

import functools
import http.server
import io
import itertools
import os
import signal
import sys
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import BadSample, Loader, MixedDataset, Sample, StreamedDataset, Tokenizer, streamed

WORDS = [f"{w}{v}" for w in "bcdfghklmnprst" for v in "aeiou"]
TOKENIZER = Tokenizer.train(WORDS, 300)
SHARDS, EACH = 6, 5  # 30 samples, sample i with word i


def image(i: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (i, i, i)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Six shards of five pairs; returns the pattern of pipe: URLs."""
    for s in range(SHARDS):
        with tarfile.open(tmp_path / f"x-{s}.tar", "w") as shard:
            for i in range(s * EACH, (s + 1) * EACH):
                for name, data in ((f"{i:03}.png", image(i)), (f"{i:03}.txt", WORDS[i].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    shard.addfile(member, io.BytesIO(data))
    return f"pipe:cat {tmp_path}/x-{{0..{SHARDS - 1}}}.tar"


def loader(dataset, **options):
    return Loader(dataset, TOKENIZER, **({"image_size": 8, "batch_size": 4, "seed": 3, "augment": False} | options))


def batches(stream: Loader, count: int) -> list[tuple]:
    """Of each batch (step, sample ids, image numbers, word numbers)."""
    found = []
    for _ in range(count):
        step, batch = next(stream)
        images = [] if batch.images is None else batch.images[:, 0, 0, 0].tolist()
        words = [WORDS.index(TOKENIZER.decode([i])) for i in batch.text.tolist()]
        found.append((step, batch.sample_ids.tolist(), images, words))
    stream.close()
    return found


def entries(dataset, readers=1, reader=0, count=30, seed=0):
    return [int(e.name[-3:]) for e in itertools.islice(dataset.stream(seed, reader, readers), count)]


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_an_epoch_holds_every_sample_once(shards, buffer):
    dataset = StreamedDataset(shards, buffer=buffer)
    two = entries(dataset, count=60)
    assert sorted(two[:30]) == sorted(two[30:]) == list(range(30)) and two[:30] != two[30:]
    runs = sum(b == a + 1 for a, b in itertools.pairwise(two[:30]))
    assert runs == 24 if buffer == 1 else runs < 12
    assert two == entries(StreamedDataset(shards, buffer=buffer), count=60) != entries(dataset, count=60, seed=1)


@pytest.mark.parametrize("buffer", [7, 1000])
def test_a_buffer_is_bounded_by_bytes(shards, monkeypatch, buffer):
    """Where they are few all waits as ever; else no more waits than fits, and each sample still comes once."""
    dataset = StreamedDataset(shards, buffer=buffer)
    sizes = [entry.size for entry in itertools.islice(StreamedDataset(shards, buffer=1).stream(0, 0, 1), 30)]
    unbounded = entries(dataset)
    monkeypatch.setattr(streamed, "MAX_HELD", sum(sizes))
    assert entries(dataset) == unbounded
    found, read, limit, read_all = [], [], 4 * max(sizes), streamed._read
    monkeypatch.setattr(streamed, "MAX_HELD", limit)
    monkeypatch.setattr(streamed, "_read", lambda *args: (read.append(entry) or entry for entry in read_all(*args)))
    for entry in itertools.islice(dataset.stream(0, 0, 1), 30):
        found.append(entry)
        assert sum(e.size for e in read) - sum(e.size for e in found) <= limit and len(read) - len(found) < buffer
    assert sorted(int(e.name[-3:]) for e in found) == list(range(30))
    assert found != read[:30]
    monkeypatch.setattr(streamed, "MAX_HELD", 0)
    assert entries(dataset) == entries(StreamedDataset(shards, buffer=1)), "one at a time, in the shards' own order"


@pytest.mark.parametrize("readers", [1, 2, 3, 6])
def test_readers_share_an_epoch(shards, readers):
    dataset = StreamedDataset(shards, buffer=4)
    shares = [entries(dataset, readers, reader, 30 // readers) for reader in range(readers)]
    assert sorted(i for share in shares for i in share) == list(range(30))


@pytest.mark.parametrize("workers, world", [(0, 1), (2, 1), (3, 1), (1, 2), (3, 2)])
def test_workers_and_ranks_share_an_epoch(shards, workers, world):
    """Each sample once, its caption beside it, the ids those of the positions."""
    count = 30 // (2 * world)
    ranks = [
        batches(loader(StreamedDataset(shards), batch_size=2, workers=workers, rank=r, world_size=world), count)
        for r in range(world)
    ]
    seen = Counter(i for rank in ranks for _, _, images, words in rank for i in images if images == words)
    readers = world * max(1, workers)
    if 30 % (2 * readers) == 0:
        assert seen == Counter(range(30))
    ids = sorted(i for rank in ranks for _, ids, *_ in rank for i in ids)
    assert ids == list(range(2 * world * count))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mixed", [False, True])
def test_resume(shards, workers, mixed):
    dataset = StreamedDataset(shards, buffer=5)
    if mixed:
        words = [Sample(None, (word,), word) for word in WORDS]
        dataset = MixedDataset([words, dataset], [1, 2])
    whole = batches(loader(dataset, workers=workers), 24)
    assert mixed == any(len(images) < 4 for *_, images, _ in whole)
    for start in (1, 2, 7, 13):
        assert batches(loader(dataset, workers=workers, start_step=start), 24 - start) == whole[start:]


def test_a_reader_that_dies_goes_on_where_it_was(shards):
    dataset = StreamedDataset(shards, buffer=5)
    whole = batches(loader(dataset, workers=2), 12)
    stream = loader(dataset, workers=2)
    found = [next(stream)[1].images[:, 0, 0, 0].tolist() for _ in range(5)]
    os.kill(stream._batches._workers[0].pid, signal.SIGKILL)
    with pytest.warns(M3AEFastWarning, match=r"started again at batch \d+"):
        found += [next(stream)[1].images[:, 0, 0, 0].tolist() for _ in range(7)]
    stream.close()
    assert found == [images for _, _, images, _ in whole]


def test_over_http(shards, tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x-{{0..5}}.tar"
        assert batches(loader(StreamedDataset(url)), 5) == batches(loader(StreamedDataset(shards)), 5)
        with pytest.warns(M3AEFastWarning, match=r"none\.tar: .*skipped"):
            url = f"http://127.0.0.1:{server.server_port}/{{x-0,none,x-1}}.tar"
            stream = loader(StreamedDataset(url))
            seen = [i for *_, images, _ in batches(stream, 5) for i in images]
        assert set(seen) == set(range(10)) and stream.skipped["shard"] > 0
        server.shutdown()


# after two samples, in the header of a third one, in its image
@pytest.mark.parametrize("cut, whole", [(4096, 1), (4300, 1), (4650, 2)])
def test_a_damaged_shard_in_mid_epoch(shards, tmp_path, cut, whole):
    """What comes before the damage is used but for the last sample, the rest is counted; or is an error (strict)."""
    data = (tmp_path / "x-2.tar").read_bytes()
    (tmp_path / "x-2.tar").write_bytes(data[:cut])
    stream = loader(StreamedDataset(shards), batch_size=1)
    with pytest.warns(M3AEFastWarning, match=r"x-2\.tar: .*; skipped \(bad files so far: 1\)$") as caught:
        seen = Counter(i for *_, images, _ in batches(stream, 26 + whole) for i in images)
    assert set(range(30)) - set(seen) == set(range(10 + whole, 15)) and len(caught) == 1
    assert stream.skipped == {"shard": 1} and [bad.kind for bad in stream.bad.values()] == ["shard"]
    with pytest.raises(BadSample, match=r"x-2\.tar"):
        batches(loader(StreamedDataset(shards), batch_size=3, strict=True), 9)


def test_a_damaged_image_and_caption(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, data in (("0.png", image(0)[:40]), ("1.png", image(1)), ("1.txt", b"\xff"), ("2.png", image(2))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    stream = loader(StreamedDataset(f"pipe:cat {tmp_path}/a.tar"))
    with pytest.warns(M3AEFastWarning):
        assert [images for *_, images, _ in batches(stream, 2)] == [[2] * 4] * 2
    assert set(stream.skipped) == {"image", "caption"}


def test_what_is_wrong_with_a_shard_is_said_in_words(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    (entry,) = itertools.islice(StreamedDataset(f"pipe:cat {tmp_path}/a.tar").stream(0, 0, 1), 1)
    assert entry.damage == "invalid header"


def test_captions(shards):
    assert list(StreamedDataset(shards).captions()) == WORDS[:30]
    assert np.isfinite(len(StreamedDataset(shards)))


def test_wrong_patterns(shards, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"pattern must begin with one of .*http.*, got s3://a/b\.tar; pipe:COMMAND"):
        StreamedDataset("s3://a/b.tar")
    with pytest.raises(ValueError, match="buffer must be at least 1, got 0"):
        StreamedDataset(shards, buffer=0)
    with pytest.raises(ValueError, match="pattern must name a shard for each reader, ranks x workers = 8, got 6"):
        loader(StreamedDataset(shards), rank=1, world_size=8)
    with pytest.raises(ConnectionError, match=r"3 shards in a row could not be read, .*: pipe:cat .*none\.tar.*: .*"):
        next(loader(StreamedDataset(f"pipe:cat {tmp_path}/none.tar 2> /dev/null")))
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "webdataset.gopen")
    with pytest.raises(ModuleNotFoundError, match="shards behind URLs need webdataset"):
        StreamedDataset(shards)
