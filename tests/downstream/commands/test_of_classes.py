"""m3ae-fast probe, finetune, ood, attend, project: what they print and write, and how they refuse."""

import json
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from m3ae_fast.downstream import features
from m3ae_fast.downstream.commands import session
from m3ae_fast.downstream.tasks import probe
from m3ae_fast.downstream.tasks.finetune import Classifier
from m3ae_fast.train import RunConfig, load_run

COLORS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
OBJECTIVES = ("m3ae", "mae", "mamo", "clip", "supervised")
DATA = ("--data", "test", "--train", "train")
FIT = (*DATA, "--out-data", "other")


@pytest.fixture(scope="module")
def runs(pretrained):
    """A folder with runs of two steps, by objective, and images: train and test (three colors), other, flat."""
    folder = pretrained(*OBJECTIVES)
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 5)):
        for name, color in COLORS.items():
            paint(folder / part / name, color, count, rng, caption=f"a {name} image")
    for name in ("sea", "sky"):
        paint(folder / "other" / name, (128, 128, 128), 4, rng, noise=120)
    paint(folder / "flat", (1, 2, 3), 2, rng)
    return folder


def paint(folder, color, count, rng, caption=None, noise=20):
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.clip(color + rng.normal(0, noise, (36, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption)


@pytest.fixture
def command(command_line, tmp_path, monkeypatch, runs):
    """command(*arguments): (status, stdout, stderr), in a folder where the runs and images are."""
    monkeypatch.chdir(tmp_path)
    for path in runs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return command_line


def results(path):
    """(about, {name: result}) of a file."""
    with open(path, encoding="utf-8") as file:
        written = json.load(file)
    return written["about"], {r["name"]: r for r in written["results"]}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_probe(command, objective):
    status, out, _ = command("probe", objective, *DATA, "--out", "p.json", "--seed", 3)
    assert status == 0 and out.splitlines()[1].startswith("accuracy") and out.endswith("results: p.json\n")
    about, found = results("p.json")
    given = {"command": "probe", "run": objective, "step": 2, "data": "test", "seed": 3, "samples": None}
    given["image_size"] = None
    given |= {"train": "train", "train_samples": 36, "crops": None, "text": False, "device": "cpu"}
    assert about == given | {"method": "ridge", "epochs": 90, "batch_size": 256, "lr": 0.1}
    assert found["accuracy"]["value"] > 0.9 and found["accuracy"]["chance"] == pytest.approx(1 / 3)
    assert found["accuracy"]["count"] == 15


@pytest.mark.parametrize("method", ["lars", "sgd"])
def test_probe_by_descent(command, method):
    options = ("--train-samples", 9, "--epochs", 9, "--batch-size", 4, "--lr", 0.5, "--crops", 3)
    status, *_ = command("probe", "m3ae", *DATA, "--method", method, *options, "--out", "p.json")
    wanted = {"method": method, "train_samples": 9, "epochs": 9, "batch_size": 4, "lr": 0.5, "crops": 3}
    assert status == 0 and wanted.items() <= results("p.json")[0].items()


def test_probe_of_crops_sees_them(command, monkeypatch):
    seen = []
    monkeypatch.setattr(features, "_label", lambda sample, _: seen.append(sample.image.shape) or 0)
    status, *_ = command("probe", "m3ae", *DATA, "--train-samples", 4, "--crops", 3, "--samples", 5)
    assert status == 0 and seen == [(36, 40, 3)] * 5 + [(32, 32, 3)] * 12


@pytest.mark.parametrize("options, crops", [((), 1), (("--crops", 2), 2)])
def test_crops_of_an_image_are_left_out_together(command, monkeypatch, options, crops):
    seen, fit = [], probe.fit_probe
    monkeypatch.setattr(
        probe, "fit_probe", lambda *args, **options: seen.append(options["crops"]) or fit(*args, **options)
    )
    assert command("probe", "m3ae", *DATA, *options)[0] == 0
    assert command("ood", "m3ae", *FIT, *options)[0] == 0 and seen == [crops] * 2


def test_no_seed_trains_on_what_another_scores(monkeypatch):
    """Of other runs neither: `ood --classifier` takes a classifier of any of them."""

    def seeds(of_run, given):
        model = SimpleNamespace(config=SimpleNamespace(images={"image_size": 32}))
        run = SimpleNamespace(model=model, config=RunConfig(seed=of_run))
        monkeypatch.setattr(session, "load_run", lambda *_, **__: run)
        _, *openers = session.open_run(
            Namespace(run="r", device="cpu", data="cluttered", train=None, samples=1, seed=given, image_size=None)
        )
        return [each(lambda spec, *, seed, **_: seed) for each in openers]

    found = [seeds(of_run, given) for of_run in range(4) for given in range(4)]
    scored, trained = map(set, zip(*found, strict=True))
    assert not scored & trained and len(scored) == len(trained) == 7
    assert seeds(0, 0) == [1, 2]


@pytest.mark.parametrize("objective", ["m3ae", "mamo"])
def test_probe_with_text(command, objective):
    assert command("probe", objective, *DATA, "--text", "--samples", 6, "--out", "p.json")[0] == 0
    about, found = results("p.json")
    assert about["text"] and found["accuracy"]["count"] == 6 and found["accuracy"]["chance"] == pytest.approx(1 / 3)


def test_finetune_and_what_it_saves(command):
    options = ("--steps", 30, "--batch-size", 12, "--lr", 0.02, "--save", "c.safetensors", "--out", "f.json")
    status, out, err = command("finetune", "m3ae", *DATA, *options)
    assert status == 0 and "accuracy" in out and "model: c.safetensors\n" in out and "fine-tuning" in err
    about, found = results("f.json")
    assert about["layer_decay"] == 0.75 and about["steps"] == 30 and found["accuracy"]["value"] > 0.8
    saved, before = load_file("c.safetensors"), load_run("m3ae").model.state_dict()
    assert saved["head.weight"].shape == (3, 128)
    assert not torch.equal(saved["model.cls_token"], before["cls_token"]), "trained along"
    assert torch.equal(saved["model.decoder_embed.weight"], before["decoder_embed.weight"])

    status, *_ = command("ood", "m3ae", *FIT, "--classifier", "c.safetensors", "--out", "o.json")
    assert status == 0
    about, after = results("o.json")
    assert about["classifier"] == "c.safetensors" and after["accuracy"] == found["accuracy"], "the same model"


def test_ood(command):
    status, out, _ = command("ood", "m3ae", *FIT, "--out", "o.json")
    assert status == 0 and "AUROC, Mahalanobis" in out
    about, found = results("o.json")
    given = {"out_data": "other", "method": "ridge", "classifier": None, "train": "train", "train_samples": 36}
    assert (given | {"crops": None}).items() <= about.items()
    assert list(found) == ["accuracy", "AUROC, max softmax", "AUROC, Mahalanobis"]
    for name in ("AUROC, max softmax", "AUROC, Mahalanobis"):
        assert found[name]["chance"] == 0.5 and found[name]["count"] == 15 + 8 and found[name]["error"] is not None
    assert found["AUROC, Mahalanobis"]["value"] > 0.9, "noise is far from plain colors"
    assert command("ood", "mamo", *DATA, "--out-data", "shapes", "--text", "--samples", 5)[0] == 0, "labels are unread"


@pytest.mark.parametrize("options", [[], ["--layer", 0], ["--rollout"]])
def test_attend(command, options):
    files = ("train/red/0.png", "train/blue/1.png")
    status, out, _ = command("attend", "m3ae", *files, *options, "--out", "a.png")
    assert status == 0 and out == "a.png: 2 images, the model after 2 steps\n"
    assert np.asarray(Image.open("a.png")).std() > 20
    status, *_ = command(
        "attend", "mamo", *files, "--caption", "red", "--caption", "a small blue thing", "--out", "b.png"
    )
    assert status == 0 and Image.open("b.png").size != Image.open("a.png").size, "more words"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_attend_without_files(command, objective):
    for data in ([], ["--data", "test"]):
        status, out, _ = command("attend", objective, *data)
        assert status == 0 and out == "attention.png: 4 images, the model after 2 steps\n"


def test_project(command):
    pytest.importorskip("sklearn", reason="scikit-learn, of the train extra, is missing")
    status, out, _ = command("project", "m3ae", "--data", "test", "--perplexity", 4, "--out", "t.png")
    assert status == 0 and out == "t.png: 15 images of 3 classes, the model after 2 steps\n"
    assert Image.open("t.png").size == (880, 660)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["probe", "m3ae", "--data", "flat"], "flat must have classes, a subfolder for each of two or more, got none"),
        (["probe", "m3ae", "--data", "test"], "--train must name data to train on, beside --data test, got none"),
        (["probe", "m3ae", "--data", "shapes", "--samples", "9"], "samples must have one label each, got"),
        (["finetune", "m3ae", "--data", "shapes"], "samples must have one label each"),
        (["probe", "m3ae", "--data", "test", "--train", "other"], "of --data, blue, green, red, got sea, sky"),
        (["probe", "mae", *DATA, "--text"], "text must be False: MAE encodes no image beside its words"),
        (["probe", "m3ae", "--data", "other", "--train", "other", "--text"], "samples must have a caption each"),
        (["probe", "m3ae", *DATA, "--method", "magic"], "argument --method: invalid choice: 'magic'"),
        (["probe", "m3ae", *DATA, "--out", "no/p.json"], "--out must name a file in a folder that exists, got no"),
        (["finetune", "m3ae", *DATA, "--layer-decay", "2"], "layer_decay must be in (0, 1], got 2.0"),
        (["finetune", "m3ae", *DATA, "--drop-path", "1"], "drop_path must be in [0, 1), got 1.0"),
        (["finetune", "m3ae", *DATA, "--lr", "-1"], "lr must be finite and positive, got -1.0"),
        (["probe", "m3ae", *DATA, "--method", "sgd", "--lr", "nan"], "lr must be finite and positive, got nan"),
        (["finetune", "m3ae", *DATA, "--save", "no/x"], "--save must name a file in a folder that exists, got no/x"),
        (["finetune", "m3ae", *DATA, "--steps", "3", "--lr", "1e38"], "of fine-tuning is not finite"),
        (["ood", "m3ae", *DATA], "the following arguments are required: --out-data"),
        (["ood", "m3ae", *FIT, "--classifier", "none"], "path must name a file, there is no none"),
        (["ood", "m3ae", *FIT, "--classifier", "bad.safetensors"], "bad.safetensors must be a classifier fine-tuned"),
        (["ood", "m3ae", *FIT, "--classifier", "two.safetensors"], "two.safetensors must be a classifier fine-tuned"),
        (["ood", "m3ae", *FIT, "--classifier", "named.safetensors"], "of --data, blue, green, red, got a, b, c"),
        (["ood", "m3ae", *FIT, "--classifier", "x", "--text"], "--text must not be given with --classifier"),
        (["ood", "m3ae", *DATA, "--out-data", "nowhere"], "there is no nowhere"),
        (["attend", "m3ae", "test/red/0.png", "--layer", "2"], "layer must be in [0, 2), a block of the encoder"),
        (["attend", "m3ae", "--layer", "0", "--rollout"], "layer must be None with rollout"),
        (["attend", "m3ae", "x.png"], "x.png"),
        (["attend", "m3ae", "x.png", "--data", "test"], "give images or --data, not both"),
        (["attend", "m3ae", "--data", "nowhere"], "there is no nowhere"),
        (["attend", "m3ae", "--caption", "a"], "--caption must be given once for each image, got 1 for 0"),
        (["attend", "mae", "test/red/0.png", "--caption", "a"], "--caption must not be given: MAE encodes no image"),
        (["attend", "m3ae", "--out", "."], "argument --out: must name a .png file, got '.'"),
        (["attend", "m3ae", "--out", "none/a.png"], "--out must name a file in a folder that exists, got none/a.png"),
        (["project", "m3ae", "--data", "test"], "perplexity must be in (0, 15), below the number of features, got 30"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(mistake, tmp_path, arguments, message):
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    save_file({"head.weight": torch.ones(2, 128)}, tmp_path / "two.safetensors", {"classes": '["a", "b"]'})
    if "named.safetensors" in arguments:
        state = Classifier(load_run("m3ae").model, 3).state_dict()
        save_file(state, tmp_path / "named.safetensors", {"classes": '["a", "b", "c"]'})
    mistake(message, *arguments)


@pytest.mark.parametrize("name", ["probe", "finetune", "ood", "attend", "project"])
def test_help(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0 and f"usage: m3ae-fast {name}" in out
