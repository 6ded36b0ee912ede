"""Validation: losses on what is held out."""

import json

import pytest
import torch
from PIL import Image

from m3ae_fast.data import open_dataset
from m3ae_fast.train import (
    Trainer,
    checkpoint,
    load_run,
    metrics,
    pictures,
    pretrain,
    run,
    trainer,
    validation,
)
from m3ae_fast.train.summary import print_summary


@pytest.fixture
def folder(make_photos):
    """Twenty images with captions."""
    return str(make_photos("twenty", 20))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Samples to validate on."""
    monkeypatch.setattr(validation, "SAMPLES", 6)


@pytest.fixture
def logged(config, tmp_path, monkeypatch):
    """logged(out, **settings): the rows of metrics.jsonl without the rate, unrounded."""
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)

    def of(out, *, resume=False, stop_after=None, **settings):
        pretrain(config(**settings), tmp_path / out, resume=resume, stop_after=stop_after, progress=False)
        rows = metrics.read(tmp_path / out / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]

    return of


def without(rows):
    return [{name: value for name, value in row.items() if not name.startswith("val_")} for row in rows]


def validated(rows):
    return [row["step"] for row in rows if "val_loss" in row]


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.5, "precision": "bf16"}, {"objective": "mamo", "options": {"queue_size": 8}}, {"objective": "clip"}],
    ids=lambda changes: changes.get("objective", "m3ae") + " ema" * ("ema" in changes),
)
def test_training_is_the_same_beside_it(logged, tmp_path, changes):
    """The weights, too: queues, averages and random numbers are as if it were not there."""
    expected = logged("off", steps=5, **changes)
    rows = logged("on", steps=5, val_data="shapes", val_every=2, **changes)
    assert without(rows) == expected and validated(rows) == [2, 4, 5]
    off, on = (checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints")) for name in ("off", "on"))
    for saved, other in ((off.model, on.model), (off.average, on.average)):
        assert all(torch.equal(value, other[name]) for name, value in saved.items())


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_losses_are_those_of_the_model_that_the_run_leaves(logged, folder, tmp_path, ema):
    rows = logged("run", data=folder, val_share=0.3, ema=ema, steps=3)
    found = load_run(tmp_path / "run")
    held_out = open_dataset(folder, image_size=32, seed=0, val_share=0.3).held_out
    loader = run.make_loader(
        held_out, found.tokenizer, found.model, found.config, batch_size=2, seed=validation.SEED, augment=False
    )
    batches = [next(loader)[1] for _ in range(min(len(held_out), 6) // 2)]
    with torch.no_grad():
        outputs = [found.model(batch, seed=validation.SEED) for batch in batches]
    for name in found.model.METRICS:
        expected = torch.stack([getattr(output, name) for output in outputs]).mean().item()
        assert rows[-1][f"val_{name}"] == pytest.approx(expected, rel=1e-6)


def test_a_resumed_run_holds_out_the_same(logged, folder):
    settings = {"data": folder, "val_share": 0.3, "val_every": 2, "steps": 6}
    whole = logged("whole", **settings)
    logged("run", stop_after=3, **settings)
    assert logged("run", resume=True, **settings) == whole
    assert len({row["val_loss"] for row in whole if "val_loss" in row}) == 3
    with pytest.raises(ValueError, match=r"val_share: 0.3 there, 0.5 asked for"):
        logged("run", resume=True, **settings | {"val_share": 0.5})


def test_what_is_held_out_does_not_depend_on_the_seed(config, folder, tmp_path):
    """Nor do order and masks: the losses of two runs compare."""
    first, second = (Trainer(config(data=folder, val_share=0.3, seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    second.model.load_state_dict(first.model.state_dict())
    with first, second:
        assert first._validation.losses(first.model, None) == second._validation.losses(second.model, None)
    names = [{each[i].name for i in range(len(each))} for each in (first.dataset, first.held_out)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 20


def test_only_at_the_end(logged):
    assert validated(logged("run", steps=3, val_data="shapes", val_every=0)) == [3]


def test_a_loss_that_is_not_finite_is_none(config, tmp_path):
    with Trainer(config(val_data="shapes"), tmp_path / "run") as opened:
        with torch.no_grad():
            opened.model.image_head.bias.fill_(float("inf"))
        losses = opened._validation.losses(opened.model, None)
    assert losses["val_loss"] is None and losses["val_text_loss"] is not None


def test_the_summary_and_the_bar_show_it(config, tmp_path, capfd):
    summary = pretrain(config(steps=2, val_data="shapes", val_every=1, picture_every=0), tmp_path / "run")
    print_summary(summary)
    output = capfd.readouterr()
    assert ", val_loss " in output.out and ", validation " in output.err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"val_share": 0.5, "val_data": "shapes"}, "val_share must be 0 beside val_data, got 0.5"),
        ({"val_share": 0.5}, "val_share must be 0 for data without an end, such as shapes"),
        ({"val_data": "pipe:cat x.tar"}, "val_data must not be streamed, got pipe:cat x.tar"),
        ({"val_data": "nowhere"}, "there is no .*nowhere"),
    ],
)
def test_what_cannot_be_held_out_is_refused_before_a_folder_is_made(config, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain(config(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_other_classes_are_refused(config, tmp_path):
    for name in ("data", "other"):
        rows = [{"image": "a.jpg", "label": f"{name} {i}"} for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    settings = {"data": str(tmp_path / "data.jsonl"), "objective": "supervised"}
    Trainer(config(**settings, val_data=settings["data"]), tmp_path / "run")
    with pytest.raises(ValueError, match=r"val_data must have the classes of data, \('data 0', 'data 1'\), got"):
        Trainer(config(**settings, val_data=str(tmp_path / "other.jsonl")), tmp_path / "run")


@pytest.mark.parametrize(
    "changes, labels",
    [
        ({}, ["unseen"] * 6),
        ({"data": "folder"}, ["seen"] * 6),
        ({"data": "folder", "val_share": 0.3}, ["seen"] * 3 + ["unseen"] * 3),
        ({"val_data": "folder"}, ["seen"] * 3 + ["unseen"] * 3),
    ],
)
def test_pictures_say_what_is_seen(config, folder, tmp_path, monkeypatch, changes, labels):
    drawn = []
    draw = pictures.Cards
    monkeypatch.setattr(pictures, "Cards", lambda cards, *rest: (drawn.append(cards), draw(cards, *rest))[1])
    changes = {name: folder if value == "folder" else value for name, value in changes.items()}
    pretrain(config(steps=1, **changes), tmp_path / "run", progress=False)
    assert [card.label for card in drawn[0]] == labels
