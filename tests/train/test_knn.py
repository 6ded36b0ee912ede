"""The k-NN probe of a run: what it computes, and that training is the same beside it."""

import json
import math

import pytest
import torch
from PIL import Image

from m3ae_fast.data import open_dataset
from m3ae_fast.downstream.features import extract
from m3ae_fast.models import MAE, M3AEConfig
from m3ae_fast.train import Trainer, checkpoint, distributed, load_run, metrics, pretrain, trainer
from m3ae_fast.train.knn import KNNProbe, knn_classify
from m3ae_fast.train.precision import DTYPES
from m3ae_fast.train.summary import print_summary

CLASSES = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture
def folder(tmp_path):
    """folder(name, count): plain images, a subfolder for each of three colors."""

    def make(name, count):
        for number, (color, value) in enumerate(CLASSES.items()):
            (tmp_path / name / color).mkdir(parents=True)
            for i in range(count + number):  # the last class is the commonest
                Image.new("RGB", (32, 32), tuple(max(v - 3 * i, 0) for v in value)).save(
                    tmp_path / name / color / f"{i}.png"
                )
        return str(tmp_path / name)

    return make


@pytest.fixture
def logged(config, tmp_path, monkeypatch):
    """logged(out, **settings): the rows of metrics.jsonl without the rate."""
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)

    def of(out, *, resume=False, stop_after=None, **settings):
        given = config(**({"data": "cluttered", "val_data": "cluttered", "val_every": 0, "knn_samples": 8} | settings))
        pretrain(given, tmp_path / out, resume=resume, stop_after=stop_after, progress=False)
        rows = metrics.read(tmp_path / out / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]

    return of


def without(rows):
    return [{name: value for name, value in row.items() if not name.startswith("knn_")} for row in rows]


def probed(rows):
    return [row["step"] for row in rows if "knn_accuracy" in row]


def test_the_vote_against_a_loop():
    torch.manual_seed(0)
    train, test, labels = torch.randn(30, 5), torch.randn(7, 5), torch.randint(0, 4, (30,))
    for neighbors in (1, 3, 20, 99):
        expected = []
        for x in test:
            cosines = [float(x @ y / (x.norm() * y.norm())) for y in train]
            nearest = sorted(range(30), key=lambda i: -cosines[i])[:neighbors]
            votes = [sum(math.exp(cosines[i] / 0.07) for i in nearest if labels[i] == c) for c in range(4)]
            expected.append(max(range(4), key=lambda c: votes[c]))
        assert knn_classify(train, labels, test, 4, neighbors=neighbors).tolist() == expected


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.5, "precision": "bf16"}, {"objective": "mamo", "options": {"queue_size": 8}}, {"objective": "mae"}],
    ids=lambda changes: changes.get("objective", "m3ae") + " ema" * ("ema" in changes),
)
def test_training_is_the_same_beside_it(logged, tmp_path, changes):
    expected = logged("off", steps=5, **changes)
    rows = logged("on", steps=5, knn_every=2, **changes)
    assert without(rows) == expected and probed(rows) == [2, 4, 5]
    off, on = (checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints")) for name in ("off", "on"))
    for saved, other in ((off.model, on.model), (off.average, on.average)):
        assert all(torch.equal(value, other[name]) for name, value in saved.items())


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_scores_are_those_of_the_model_that_the_run_leaves(logged, folder, tmp_path, ema):
    settings = {"data": folder("train", 6), "val_data": folder("val", 3), "knn_samples": 99, "batch_size": 1}
    rows = logged("run", knn_every=9, ema=ema, steps=3, **settings)
    found = load_run(tmp_path / "run")
    train, test = (extract(found.model, open_dataset(settings[n], image_size=32, seed=0)) for n in ("data", "val_data"))
    guesses = knn_classify(train.cls, train.labels, test.cls, 3)
    assert rows[-1]["knn_accuracy"] == pytest.approx((guesses == test.labels).double().mean().item(), abs=1e-9)
    assert rows[-1]["knn_chance"] == pytest.approx(5 / 12)


def test_plain_colors_are_told_apart(logged, folder):
    """Whatever the weights are."""
    rows = logged("run", data=folder("train", 6), val_share=0.3, val_data=None, knn_every=1, knn_samples=99, steps=1)
    assert rows[-1]["knn_accuracy"] == 1 and rows[-1]["knn_chance"] < 0.7


def test_a_resumed_run_has_the_same(logged):
    whole = logged("whole", steps=6, knn_every=2)
    logged("run", steps=6, knn_every=2, stop_after=3)
    assert logged("run", steps=6, knn_every=2, resume=True) == whole


def test_without_a_label_samples_are_left_out(logged, tmp_path):
    rows = [{"image": "a.jpg", "label": i % 2} for i in range(8)] + [{"image": "a.jpg", "caption": "c"}] * 8
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {"data": str(tmp_path / "data.jsonl"), "val_share": 0.5, "val_data": None, "objective": "mae"}
    with pytest.warns(UserWarning, match="labels are wanted, there is none; left out"):
        found = logged("run", steps=1, knn_every=1, **settings)
    assert 0 <= found[-1]["knn_accuracy"] <= 1


def test_a_feature_that_is_not_finite_has_no_accuracy(config, tmp_path):
    with Trainer(
        config(data="cluttered", val_data="cluttered", knn_every=1, knn_samples=4), tmp_path / "run"
    ) as opened:
        with torch.no_grad():
            opened.model.cls_token.fill_(float("inf"))
        scores = opened._knn.scores(opened.model, None)
    assert scores["knn_accuracy"] is None and scores["knn_chance"] >= 0.25


def test_the_summary_and_the_bar_show_it(config, tmp_path, capfd):
    settings = {"data": "cluttered", "val_data": "cluttered", "knn_every": 1, "knn_samples": 4, "picture_every": 0}
    print_summary(pretrain(config(steps=2, **settings), tmp_path / "run"))
    output = capfd.readouterr()
    assert ", knn_accuracy " in output.out and ", knn_chance " in output.out
    assert ", k-NN " in output.err and "(chance 0." in output.err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "cluttered"}, "knn_every must be 0 without val_share or val_data"),
        ({"val_data": "shapes"}, "knn_every must be 0 for images of several classes, for a vote names one, got "),
        ({"data": "photos", "val_data": "photos"}, "knn_every must be 0 for data without classes, got 2 for .*photos"),
        ({"data": "cluttered", "val_data": "shapes"}, r"val_data must have the classes of data, \('red', "),
    ],
)
def test_what_cannot_be_probed_is_refused_before_a_folder_is_made(config, photos, tmp_path, changes, message):
    changes = {name: str(photos) if value == "photos" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        pretrain(config(knn_every=2, **changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_features_are_computed_in_the_precision_of_the_run(config, folder, monkeypatch, name, dtype):
    model, found = MAE(M3AEConfig.tiny(image_size=32, vocab_size=0, depth=1)), []
    data = [open_dataset(folder("train", 1), image_size=32, seed=0)] * 2
    probe = KNNProbe(*data, config(batch_size=4, objective="mae", precision=name), model.config, torch.device("cpu"))

    def encode_cls(batch):
        found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return torch.ones(len(batch), 2)

    monkeypatch.setattr(model, "encode_cls", encode_cls)
    probe.scores(model, None)
    assert set(found) == {dtype}


def test_processes_share_the_samples(config, folder, monkeypatch):
    """Each computes features of its own, which are together those of one process."""
    settings = {"data": folder("train", 6), "val_data": folder("val", 3), "knn_every": 1, "knn_samples": 8}
    data = [open_dataset(settings[name], image_size=32, seed=0) for name in ("data", "val_data")]
    model = MAE(M3AEConfig.tiny(image_size=32, vocab_size=0)).eval()

    def features():
        probe = KNNProbe(*data, config(batch_size=4, objective="mae", **settings), model.config, torch.device("cpu"))
        with torch.no_grad():
            return [probe._features(model, each) for each in (probe._train, probe._test)]

    expected, halves = features(), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        halves.append(features())
    for (cls, labels), parts in zip(expected, zip(*halves, strict=True), strict=True):
        together, of_both = (torch.cat(each) for each in zip(*parts, strict=True))
        assert [len(part[1]) for part in parts] == [4, 4]
        order, other = cls[:, 0].argsort(), together[:, 0].argsort()
        torch.testing.assert_close(together[other], cls[order], rtol=1e-5, atol=1e-6)
        assert torch.equal(of_both[other], labels[order])
