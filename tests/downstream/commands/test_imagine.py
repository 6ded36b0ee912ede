"""m3ae-fast imagine: what it prints, draws and writes, and how it refuses."""

import json

import pytest
from PIL import Image

COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
PAIR = ["red.png", "--caption", "a red image"]


@pytest.fixture(scope="module")
def runs(pretrained):
    """The folders of runs of two steps, by objective."""
    return pretrained("m3ae", "mae", "clip")


@pytest.fixture
def command(command_line, tmp_path, monkeypatch, runs):
    """command(*arguments): (status, stdout, stderr), in a folder with data; m3ae, mae and clip are there."""
    monkeypatch.chdir(tmp_path)
    for path in runs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    for name, color in COLORS.items():
        Image.new("RGB", (40, 32), color).save(f"{name}.png")
    rows = [json.dumps({"image": f"{name}.png", "caption": f"a {name} image"}) for name in COLORS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    return command_line


def test_of_data(command):
    status, out, _ = command("imagine", "m3ae", "--data", "pairs.jsonl", "--rounds", 2, "--out", "i.json")
    assert status == 0 and out.startswith("picture: imagined.png, the model after 2 steps\n")
    assert out.endswith("results: i.json\n") and "words right, from nothing" in out
    with open("i.json", encoding="utf-8") as file:
        written = json.load(file)
    assert written["about"]["rounds"] == 2 and written["about"]["step"] == 2
    assert [r["count"] for r in written["results"]] == [3] * 5 and Image.open("imagined.png").size[0] > 500


def test_of_scenes(command):
    status, out, _ = command("imagine", "m3ae", "--samples", 8, "--rounds", 1, "--picture", "six.png")
    assert status == 0 and out.splitlines()[-1].split()[-1] == "8"
    assert Image.open("six.png").size[1] > 3 * 192, "six of them are drawn, in three lines"


@pytest.mark.parametrize(
    "given, scored", [(PAIR, True), (["red.png", "blue.png", "--words", 4], False), (["--caption", "a red one"], False)]
)
def test_of_what_is_given(command, given, scored):
    status, out, _ = command("imagine", "m3ae", *given, "--picture", "p.png")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "picture: p.png, the model after 2 steps"
    assert len(lines) == (7 if scored else 1) and Image.open("p.png").size[0] > 200


def test_scores_of_a_pair_name_its_image(command):
    status, *_ = command("imagine", "m3ae", *PAIR, "--out", "i.json")
    with open("i.json", encoding="utf-8") as file:
        about = json.load(file)["about"]
    assert status == 0 and about["images"] == ["red.png"] and about["captions"] == ["a red image"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mae"], "mae must be a run of the objective m3ae, got mae"),
        (["clip"], "clip must be a run of the objective m3ae, got clip"),
        (["m3ae", *PAIR, "--caption", "b"], "--caption must be given once for each image, got 2 for 1"),
        (["m3ae", *PAIR, "--data", "pairs.jsonl"], "give images and captions, or --data, not both"),
        (["m3ae", "--words", "3"], "--words must be given with images alone, which have no caption, got 3"),
        (["m3ae", *PAIR, "--words", "3"], "--words must be given with images alone, which have no caption, got 3"),
        (["m3ae", "red.png", "--words", "99"], "words must be in [1, 41), got 99"),
        (["m3ae", "red.png", "--out", "i.json"], "--out must be given with images and their captions"),
        (["m3ae", "--caption", "a", "--out", "i.json"], "--out must be given with images and their captions"),
        (["m3ae", "--caption", " "], "texts[0] must hold a word, got ' '"),
        (["m3ae", "none.png"], "none.png"),
        (["m3ae", "--rounds", "0"], "argument --rounds: must be a whole number, at least 1, got '0'"),
        (["m3ae", "--picture", "no/p.png"], "--picture must name a file in a folder that exists, got no"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(mistake, arguments, message):
    mistake(message, "imagine", *arguments)
