"""pretrain() on data of every format: mixed, damaged in the middle of an epoch, slow."""

import io
import json
import re
import shutil
import tarfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import BadSample, ShapesDataset
from m3ae_fast.train import RunConfig, Summary, load_run, pretrain, trainer, watch
from m3ae_fast.train.summary import print_data


def image(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def hdf5(path, jpgs, captions):
    with h5py.File(path, "w") as file:
        column = file.create_dataset("jpg", len(jpgs), h5py.vlen_dtype(np.uint8))
        for i, jpg in enumerate(jpgs):
            column[i] = np.frombuffer(jpg, np.uint8)
        file["caption"] = captions
    return str(path)


def tar(path, jpgs, captions):
    with tarfile.open(path, "w") as shard:
        for i, (jpg, caption) in enumerate(zip(jpgs, captions, strict=True)):
            for name, data in ((f"{i}.jpg", jpg), (f"{i}.txt", caption)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return str(path)


def jsonl(path, jpgs, captions):
    with open(path, "wb") as file:
        for i, (jpg, caption) in enumerate(zip(jpgs, captions, strict=True)):
            (path.parent / f"{i}.jpg").write_bytes(jpg)
            file.write(b'{"image": "%d.jpg", "caption": "%s"}\n' % (i, caption))
    return str(path)


SAVED = Path(__file__).parent.parent / "data" / "hf_pairs"
FORMATS = {"pairs.h5": hdf5, "pairs.tar": tar, "pairs.jsonl": jsonl}


@pytest.fixture
def pairs(tmp_path):
    """pairs("pairs.h5", damaged=False): eight pairs in that format, perhaps with an image and a caption damaged."""

    def make(name, damaged=False):
        jpgs = [image(i) for i in range(8)]
        captions = [f"noise number {i} with all its colors".encode() for i in range(8)]
        if damaged:
            jpgs[2], captions[5] = jpgs[2][:200], b"Fu\xdf"
        return FORMATS[name](tmp_path / name, jpgs, captions)

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_in_the_middle_of_an_epoch(pairs, config, tmp_path, capsys, name):
    """Counted, replaced by others, reported at the end; with strict, an error that names it."""
    data = pairs(name, damaged=True)
    with pytest.warns(M3AEFastWarning, match=f"{name}.*; skipped") as caught:
        summary = pretrain(config(data=data, steps=8, picture_every=0), tmp_path / "run", progress=False)
    assert summary.step == 8 and summary.counters["seen"] == 16, "two epochs"
    caption = "row" if name == "pairs.jsonl" else "caption"
    assert set(summary.skipped) == {"image", caption} and sum(summary.skipped.values()) >= 4
    assert summary.counters["images_skipped"] == sum(summary.skipped.values())
    assert len(summary.bad) == 2 and sum("skipped" in str(w.message) for w in caught) == 2
    print_data(summary)
    out = capsys.readouterr().out
    counts = ", ".join(f"{kind} {summary.skipped[kind]}" for kind in sorted(("image", caption)))
    assert f"replaced by other samples, for something was damaged: {counts}\n  {summary.bad[0]}\n" in out
    assert "images: " in out and "/s is what this process can load" in out
    with pytest.raises(BadSample, match=name):
        pretrain(config(data=data, steps=8, strict=True), tmp_path / "strict", progress=False)


def test_a_damaged_shard(pairs, config, tmp_path):
    path = pairs("pairs.tar")
    data = (tmp_path / "pairs.tar").read_bytes()
    (tmp_path / "pairs.tar").write_bytes(data[: len(data) // 2])
    with pytest.warns(M3AEFastWarning, match=r"pairs\.tar: bytes .* cannot be read"):
        summary = pretrain(config(data=path, steps=2, picture_every=0), tmp_path / "run", progress=False)
    assert len(summary.bad) == 1 and "pairs.tar: bytes" in summary.bad[0] and summary.skipped == {}
    with pytest.raises(BadSample, match=r"pairs\.tar: bytes"):
        pretrain(config(data=path, steps=2, strict=True), tmp_path / "strict", progress=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_is_resumed_to_the_bit(pairs, train, tmp_path, workers):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"words {i}"}) + "\n" for i in range(5)))
    data = [pairs("pairs.h5"), f"{pairs('pairs.tar')}=2", f"{tmp_path}/texts.jsonl=1.5", "shapes"]
    whole = train("whole", data=data, workers=workers, steps=9)
    assert train("stopped", data=data, steps=9, stop_after=5) == whole[:5]
    assert train("stopped", resume=True, data=data, steps=9, workers=workers) == whole
    with pytest.raises(ValueError, match="is of another configuration: data: "):
        train("stopped", resume=True, data=data[:2], steps=9)


def test_a_dataset_that_datasets_saved(train, tmp_path):
    """tests/data/hf_pairs, moved between two halves of a run."""
    for name in ("old", "new"):
        shutil.copytree(SAVED, tmp_path / name / "pairs")
    whole = train("whole", data=f"hf:{tmp_path}/old/pairs", steps=4)
    train("moved", data=f"hf:{tmp_path}/old/pairs", steps=4, stop_after=2)
    shutil.rmtree(tmp_path / "old")
    assert train("moved", data=f"hf:{tmp_path}/new/pairs", steps=4, resume=True) == whole


@pytest.mark.parametrize("kind", ["pairs.jsonl", "mixed", "pipe"])
def test_data_that_moved_are_named_at_resume(pairs, train, tmp_path, kind):
    def at(folder):
        kinds = {"mixed": [f"{folder}/pairs.tar=2", f"{folder}/pairs.h5"], "pipe": f"pipe:cat {folder}/pairs.tar"}
        return kinds.get(kind, f"{folder}/{kind}")

    (tmp_path / "old").mkdir()
    for name in FORMATS:
        pairs(name)
    for path in [*tmp_path.glob("pairs.*"), *tmp_path.glob("*.jpg")]:
        shutil.move(path, tmp_path / "old")
    whole = train("whole", data=at(tmp_path / "old"), steps=4)
    train("moved", data=at(tmp_path / "old"), steps=4, stop_after=2)
    shutil.move(tmp_path / "old", tmp_path / "new")
    assert train("moved", data=at(tmp_path / "new"), steps=4, stop_after=3, resume=True) == whole[:3]
    assert RunConfig.load(tmp_path / "moved").data == at(tmp_path / "new")
    assert train("moved", data=at(tmp_path / "new"), steps=4, resume=True) == whole
    assert load_run(tmp_path / "moved").config.data == at(tmp_path / "new")


def test_other_data_of_the_same_name_are_refused(pairs, train, tmp_path):
    path = pairs("pairs.tar")
    train("run", data=path, steps=4, stop_after=2)
    (tmp_path / "new").mkdir()
    other = tar(tmp_path / "new" / "pairs.tar", [image(i) for i in range(8)], [b"other words"] * 8)
    message = r"data must be those of .*run in another place, got .*new/pairs\.tar: their captions make another vocabul"
    with pytest.raises(ValueError, match=message):
        train("run", data=other, steps=4, resume=True)
    for spec, shown in ((pairs("pairs.h5"), ".../pairs.h5"), ("shapes", "shapes"), (f"{path}=2", ".../pairs.tar=2")):
        with pytest.raises(ValueError, match=re.escape(f"data: '.../pairs.tar' there, '{shown}' asked for")):
            train("run", data=spec, steps=4, resume=True)


def test_data_move_whose_words_are_those_of_init(pairs, train, tmp_path):
    train("first", steps=1)
    old = pairs("pairs.tar")
    options = {"init": str(tmp_path / "first"), "steps": 4}
    with pytest.warns(M3AEFastWarning, match="of the words of the first 8 captions are not in the vocabulary"):
        train("run", data=old, stop_after=2, **options)
    (tmp_path / "new").mkdir()
    new = shutil.move(old, tmp_path / "new")
    assert len(train("run", data=str(new), resume=True, **options)) == 4


def test_data_of_the_same_name_with_other_classes_are_refused(config, tmp_path):
    for place, names in (("old", "abc"), ("new", "ab"), ("moved", "abc")):
        for i, name in enumerate(names):
            folder = tmp_path / place / "photos" / name
            folder.mkdir(parents=True)
            (folder / "x.jpg").write_bytes(image(i))

    def train(place, **options):
        data = f"{tmp_path}/{place}/photos"
        run = config(objective="supervised", data=data, steps=4)
        return pretrain(run, tmp_path / "run", progress=False, **options).step

    assert train("old", stop_after=2) == 2
    saved = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(ValueError, match=r"in another place, got .*new/photos: they have 2 classes, the model has 3"):
        train("new", resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == saved
    assert train("moved", resume=True) == 4


@pytest.fixture
def slow(monkeypatch):
    """slow(seconds): what each sample of `shapes` takes."""
    read = ShapesDataset.__getitem__

    def make(seconds):
        monkeypatch.setattr(ShapesDataset, "__getitem__", lambda *args: (time.sleep(seconds), read(*args))[1])

    return make


def test_waiting_for_data_is_told_once(train, slow, monkeypatch):
    monkeypatch.setattr(watch, "WAIT_STEPS", 3)
    slow(0.2)
    message = r"data is the bottleneck: \d+% of the last 3 steps went by waiting for it; more workers may help"
    with pytest.warns(M3AEFastWarning, match=message) as caught:
        train(steps=9)
    assert len(caught) == 1


def test_no_word_where_the_model_is_slower(train, monkeypatch):
    monkeypatch.setattr(watch, "WAIT_STEPS", 3)
    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda *args: (time.sleep(0.3), step(*args))[1])
    train(steps=7)


def test_more_workers_than_shards_are_refused_before_a_folder_is_made(pairs, config, tmp_path):
    with pytest.raises(ValueError, match="pattern must name a shard for each reader, ranks x workers = 2, got 1"):
        pretrain(config(data=f"pipe:cat {pairs('pairs.tar')}", workers=2), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_stream_dealt_out_to_other_workers_is_told_of(pairs, config, tmp_path):
    settings = {"text_vocab": str(vocabulary(tmp_path)), "steps": 3, "picture_every": 0}
    settings["data"] = f"pipe:cat {pairs('pairs.tar')} #{{0..1}}"
    pretrain(config(**settings), tmp_path / "run", stop_after=1, progress=False)
    pretrain(config(**settings, workers=1), tmp_path / "run", resume=True, stop_after=2, progress=False)  # as itself
    with pytest.warns(M3AEFastWarning, match="workers: 1 there, 2 asked for: streamed shards are dealt out to them"):
        pretrain(config(**settings, workers=2), tmp_path / "run", resume=True, progress=False)


def test_the_rate_of_several_processes_is_said_to_be_theirs(tmp_path, capsys):
    for workers, said in ((2, "3 x 2 workers"), (1, "3 x 1 worker"), (0, "these 3 processes")):
        print_data(Summary(tmp_path, images=60, read_seconds=1.0, seconds=2.0, workers=workers, processes=3))
        assert f"images: {60 * max(1, workers)}/s is what {said} can load, 30/s what" in capsys.readouterr().out


def test_a_stream_is_opened_once_for_all_pictures(pairs, config, tmp_path):
    opened = tmp_path / "opened"
    stream = f"pipe:echo >> {opened}; cat {pairs('pairs.tar')}"
    settings = {"text_vocab": str(vocabulary(tmp_path)), "objective": "m3ae", "steps": 3}
    pretrain(config(data=stream, picture_every=0, **settings), tmp_path / "one", progress=False)
    once = len(opened.read_text())
    pretrain(config(data=stream, picture_every=1, **settings), tmp_path / "three", progress=False)
    assert len(list((tmp_path / "three" / "pictures").glob("reconstruction-*"))) == 3
    assert len(opened.read_text()) == 2 * once


def vocabulary(folder):
    words = ["[UNK]", "noise", "number", "with", "all", "its", "colors", *"01234567"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return folder / "vocab.txt"


def test_what_has_no_label_does_not_train_a_supervised_model(config, tmp_path, capsys):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(image(i))
    fields = ('"label": "a"', '"label": "b"', '"caption": "c"', '"label": null')
    (tmp_path / "x.jsonl").write_text("".join(f'{{"image": "{i}.jpg", {x}}}\n' for i, x in enumerate(fields)))
    settings = {"data": str(tmp_path / "x.jsonl"), "objective": "supervised", "steps": 4, "strict": True}
    with pytest.warns(M3AEFastWarning, match="labels are wanted, there is none; left out"):
        summary = pretrain(config(**settings), tmp_path / "run", progress=False)
    assert set(summary.skipped) == {"unlabeled"} and summary.bad == [] and summary.counters["images_skipped"] == 0
    print_data(summary)
    out = capsys.readouterr().out
    assert "not of the kind wanted: unlabeled" in out and "damaged" not in out
