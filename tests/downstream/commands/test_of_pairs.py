"""m3ae-fast retrieve, vqa, reason, ground: what they print and write, and how they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from m3ae_fast.models.vqa import VQA
from m3ae_fast.train import load_run

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def runs(pretrained):
    """The folders of runs of two steps, by objective."""
    return pretrained("mamo", "clip")


@pytest.fixture
def command(command_line, tmp_path, monkeypatch, runs):
    """command(*arguments): (status, stdout, stderr), in a folder with data; runs/mamo and runs/clip are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(runs)
    for name, color in COLORS.items():
        Image.new("RGB", (40, 32), color).save(f"{name}.png")
    write("pairs", *({"image": f"{name}.png", "caption": f"a {name} image"} for name in COLORS))
    write("questions", *({"image": f"{name}.png", "question": "what color?", "answer": name} for name in COLORS))
    write("statements", {"left": "red.png", "right": "blue.png", "sentence": "both are red", "label": False})
    write("phrases", {"image": "red.png", "phrase": "a red circle", "box": [0, 0, 40, 32]})
    return command_line


def write(name, *rows):
    with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def results(path):
    """(about, the names of the results) of a file; every value is a share."""
    with open(path, encoding="utf-8") as file:
        written = json.load(file)
    assert all(0 <= r["value"] <= 1 and 0 < r["chance"] <= 1 and r["count"] > 0 for r in written["results"])
    return written["about"], [r["name"] for r in written["results"]]


BOTH_WAYS = [f"{way} R@{k}" for way in ("text", "image") for k in (1, 5, 10)]
ITC = [f"ITC {name}" for name in BOTH_WAYS]
RERANKED = [*ITC, *BOTH_WAYS, *(f"ITC + ITM {name}" for name in BOTH_WAYS)]


def test_retrieve(command):
    status, out, _ = command("retrieve", "runs/mamo", "--samples", 5, "--rerank", 3, "--seed", 7, "--out", "r.json")
    assert status == 0 and out.splitlines()[0].split() == ["result", "+/-", "chance", "examples"]
    assert [line.split("   ")[0].strip() for line in out.splitlines()[1:19]] == RERANKED
    assert out.endswith("results: r.json\n")
    about = {"command": "retrieve", "run": "runs/mamo", "step": 2, "data": "shapes", "seed": 7}
    about |= {"samples": 5, "rerank": 3, "finetune": 0, "train": None, "lr": 5e-4, "device": "cpu", "image_size": None}
    assert results("r.json") == (about, RERANKED)


@pytest.mark.parametrize("arguments", [["runs/mamo", "--rerank", 0], ["runs/clip"]])
def test_retrieve_by_itc_alone(command, arguments):
    status, *_ = command("retrieve", *arguments, "--data", "pairs.jsonl", "--out", "r.json")
    assert status == 0 and results("r.json")[1] == ITC


@pytest.mark.parametrize("objective", ["mamo", "clip"])
def test_retrieve_after_fine_tuning(command, objective):
    options = ("--data", "pairs.jsonl", "--finetune", 2, "--train", "pairs.jsonl")
    status, out, err = command("retrieve", f"runs/{objective}/checkpoints/step-00000002.safetensors", *options)
    assert status == 0 and "ITC text R@1" in out and "fine-tuning" in err
    assert command("retrieve", f"runs/{objective}", "--samples", 5, "--finetune", 1)[0] == 0, "on new shapes"


def test_vqa(command):
    options = ("--steps", 2, "--batch-size", 4, "--samples", 20, "--out", "v.json", "--save", "vqa.safetensors")
    status, out, _ = command("vqa", "runs/mamo", *options)
    assert status == 0 and "accuracy, color" in out and "model: vqa.safetensors\n" in out
    about, names = results("v.json")
    assert about["command"] == "vqa" and names[0] == "accuracy" and len(names) == 6
    saved = load_file("vqa.safetensors")
    before = load_run("runs/mamo").model.state_dict()
    assert saved.keys() == VQA(load_run("runs/mamo").model).state_dict().keys()
    assert not torch.equal(saved["mamo.online.image.cls_token"], before["online.image.cls_token"]), "trained along"


def test_vqa_with_what_was_saved(command):
    """The same figures without training; from the list that it learned, or another."""
    of = ("vqa", "runs/mamo", "--samples", 20)
    assert command(*of, "--steps", 2, "--save", "vqa.safetensors", "--out", "before.json")[0] == 0
    status, _, err = command(*of, "--load", "vqa.safetensors", "--out", "after.json")
    figures = [json.loads(Path(name).read_text())["results"] for name in ("before.json", "after.json")]
    assert status == 0 and "fine-tuning" not in err and figures[0] == figures[1]
    options = ("--data", "questions.jsonl", "--load", "vqa.safetensors", "--seed", 3)
    assert command("vqa", "runs/mamo", *options)[0] == 0, "no data to train on are asked for"
    Path("answers.txt").write_text("blue\nred\ngreen\n")
    assert command("vqa", "runs/mamo", *options, "--answers", "answers.txt")[0] == 0


def test_vqa_on_data_of_ones_own(command, tmp_path):
    options = ("--data", "questions.jsonl", "--train", "questions.jsonl", "--steps", 2, "--out", "v.json")
    assert command("vqa", "runs/mamo", *options)[0] == 0 and results("v.json")[1] == ["accuracy"]
    (tmp_path / "answers.txt").write_text("blue\nred\ngreen\nyellow\n")
    assert command("vqa", "runs/mamo", *options, "--answers", "answers.txt")[0] == 0
    (tmp_path / "answers.txt").write_text("red\nred\n")
    status, _, err = command("vqa", "runs/mamo", *options, "--answers", "answers.txt")
    assert status == 2 and "answers.txt, line 2: each answer must be there once" in err


def test_reason(command):
    status, out, _ = command("reason", "runs/mamo", "--steps", 2, "--samples", 12, "--out", "r.json")
    assert status == 0 and "accuracy" in out and results("r.json")[1][0] == "accuracy"
    options = ("--data", "statements.jsonl", "--train", "statements.jsonl", "--steps", 1)
    assert command("reason", "runs/mamo", *options)[0] == 0


def test_ground(command):
    status, out, _ = command("ground", "runs/mamo", "--samples", 8, "--picture", "p.png", "--out", "g.json")
    assert status == 0 and out.startswith("picture: p.png\n") and "pointing accuracy" in out
    assert results("g.json")[1] == ["pointing accuracy", "a random object"]
    drawn = np.asarray(Image.open("p.png"))
    assert min(drawn.shape[:2]) > 500 and drawn.std() > 10
    assert command("ground", "runs/mamo", "--data", "phrases.jsonl", "--block", 1)[0] == 0


def test_phrases_without_boxes_are_drawn(command, tmp_path):
    write("phrases", {"image": "red.png", "phrase": "a red circle"}, {"image": "blue.png", "phrase": "the sea"})
    options = ("--data", "phrases.jsonl", "--picture", "p.png", "--out", "g.json")
    status, out, _ = command("ground", "runs/mamo", *options)
    assert status == 0 and out == "picture: p.png\nno phrase has a box: nothing to score, g.json is not written\n"
    assert (tmp_path / "p.png").is_file() and not (tmp_path / "g.json").exists()


QUESTIONS, SAVED = ["--data", "questions.jsonl"], ["--steps", "1", "--save"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vqa", "runs/clip"], "runs/clip must be a run of the objective mamo, got clip"),
        (["reason", "runs/clip"], "runs/clip must be a run of the objective mamo, got clip"),
        (["ground", "runs/clip"], "runs/clip must be a run of the objective mamo, got clip"),
        (["reconstruct", "runs/mamo"], "runs/mamo must be a run of the objective m3ae or mae, got mamo"),
        (["retrieve", "nowhere"], "nowhere is not a checkpoint: no such file"),
        (
            ["vqa", "runs/mamo", *QUESTIONS],
            "--train must name data to train on, beside --data questions.jsonl, got none",
        ),
        (["reason", "runs/mamo", "--data", "statements.jsonl"], "--train must name data to train on"),
        (["retrieve", "runs/mamo", "--data", "pairs.jsonl", "--finetune", "1"], "--train must name data to train on"),
        (["retrieve", "runs/mamo", "--train", "shapes"], "--train must come with --finetune STEPS"),
        (["retrieve", "runs/mamo", *QUESTIONS], "questions.jsonl, line 1: caption must be given, got image"),
        (["vqa", "runs/mamo", "--load", "none"], "path must name a file, there is no none"),
        (["vqa", "runs/mamo", "--load", "red.png"], "red.png must be a VQA model trained from a model like this one: "),
        (["vqa", "runs/mamo", "--load", "x", "--save", "y"], "--save must not be given with --load, which trains noth"),
        (
            ["vqa", "runs/mamo", "--load", "x", "--steps", "9"],
            "--steps must not be given with --load, which trains nothing, got 9",
        ),
        (["vqa", "runs/mamo", *QUESTIONS, "--train", "bad.jsonl"], "bad.jsonl, line 2 must be a JSON object"),
        (["ground", "runs/mamo", "--data", "bad.jsonl"], "bad.jsonl, line 1: phrase must be given, got image"),
        (["ground", "runs/mamo", "--data", "none.jsonl"], "path must name a file, there is no none.jsonl"),
        (["ground", "runs/mamo", "--block", "2"], "block must be in [0, 2), a block of the fusion encoder, got 2"),
        (["ground", "runs/mamo", "--lr", "1"], "unrecognized arguments: --lr 1"),
        (
            ["ground", "runs/mamo", "--picture", "no/p.png"],
            "--picture must name a file in a folder that exists, got no",
        ),
        (["retrieve", "runs/mamo", "--out", "."], "--out must name a file in a folder that exists, got ."),
        (["reason", "runs/mamo", *SAVED, "no/x"], "--save must name a file in a folder that exists, got no/x"),
        (["vqa", "runs/mamo", "--seed", "-1"], "argument --seed: must be a whole number, at least 0, got '-1'"),
        (["vqa", "runs/mamo", "--lr", "nan"], "lr must be finite and positive, got nan"),
        (["vqa", "runs/mamo", "--lr", "1e38"], "of fine-tuning is not finite"),
        (["vqa", "runs/mamo", "--device", "abacus"], "device must be one that torch can use, got 'abacus'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(mistake, tmp_path, arguments, message):
    (tmp_path / "bad.jsonl").write_text('{"image": "red.png", "question": "what?", "answer": "red"}\n{\n')
    mistake(message, *arguments)


@pytest.mark.parametrize("name", ["retrieve", "vqa", "reason", "ground"])
def test_help(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0 and f"usage: m3ae-fast {name}" in out
