"""The tasks on files: what was written comes back, and what is wrong is named with its file, line and field."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import BadSample, EncodedImage
from m3ae_fast.data.examples import shapes
from m3ae_fast.data.examples.files import open_pairs, open_phrases, open_questions, open_statements, read_answers

PHOTOS = Path(__file__).parents[2] / "data" / "photos"
PHOTO = {name: EncodedImage(PHOTOS / f"{name}.jpg", name).decoded() for name in ("astronaut", "camera", "coffee")}
PAIR = {"image": "camera.jpg", "caption": "a man"}
QUESTION = {"image": "camera.jpg", "question": "who?", "answer": "a man"}
STATEMENT = {"left": "camera.jpg", "right": "sub/coffee.jpg", "sentence": "both are gray", "label": False}
PHRASE = {"image": "camera.jpg", "phrase": "a man", "box": [10, 20, 30, 96]}
TASKS = {
    "pairs": (open_pairs, PAIR),
    "questions": (open_questions, QUESTION),
    "statements": (open_statements, STATEMENT),
    "phrases": (open_phrases, PHRASE),
}


@pytest.fixture
def write(tmp_path):
    """write(*rows): a JSON-lines file beside the photographs; a row may be a line already."""
    (tmp_path / "sub").mkdir()
    shutil.copy(PHOTOS / "coffee.jpg", tmp_path / "sub")
    for name in ("astronaut", "camera"):
        shutil.copy(PHOTOS / f"{name}.jpg", tmp_path)

    def make(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return make


def test_pairs(write):
    path = write({"image": "sub/coffee.jpg", "caption": ["ein Fuß", " an espresso "]}, "", PAIR)
    first, second = open_pairs(path, image_size=32)
    assert np.array_equal(first.image, PHOTO["coffee"]) and first.captions == ("ein Fuß", "an espresso")
    assert np.array_equal(second.image, PHOTO["camera"]) and second.captions == ("a man",)
    assert (first.name, second.name) == (f"{path}, line 1", f"{path}, line 3"), "a blank line counts as a line"


def test_questions(write):
    data = open_questions(write(QUESTION | {"kind": "who"}, QUESTION, QUESTION | {"answer": "a coat"}), image_size=32)
    assert [(q.question, q.answer, q.kind) for q in data] == [
        ("who?", "a man", "who"),
        ("who?", "a man", ""),
        ("who?", "a coat", ""),
    ]
    assert np.array_equal(data[2].image, PHOTO["camera"]) and data.answers() == ["a coat", "a man"]


def test_statements(write):
    data = open_statements(write(STATEMENT, STATEMENT | {"label": True, "kind": "color"}), image_size=32)
    assert [(s.sentence, s.label, s.kind) for s in data] == [
        ("both are gray", False, ""),
        ("both are gray", True, "color"),
    ]
    assert np.array_equal(data[0].left, PHOTO["camera"]) and np.array_equal(data[0].right, PHOTO["coffee"])


def test_phrases(write):
    unknown = {"image": "astronaut.jpg", "phrase": "a helmet"}
    data = open_phrases(write(PHRASE, unknown, unknown | {"box": None}), image_size=32)
    assert [(p.phrase, p.box) for p in data] == [("a man", (10, 20, 30, 96)), ("a helmet", None), ("a helmet", None)]
    assert np.array_equal(data[1].image, PHOTO["astronaut"])


def test_drawn_examples_round_trip(tmp_path):
    """Written as files, scenes come back: boxes, labels and words, and every pixel (PNG)."""
    from PIL import Image

    drawn = shapes.ShapesPhrases(5, 48, 3)
    rows = []
    for i, example in enumerate(drawn):
        Image.fromarray(example.image).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "phrase": example.phrase, "box": list(example.box)})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for read, example in zip(open_phrases(str(tmp_path / "x.jsonl"), image_size=48), drawn, strict=True):
        assert (read.phrase, read.box) == (example.phrase, example.box) and np.array_equal(read.image, example.image)


def test_a_folder_of_pairs():
    pairs = open_pairs(str(PHOTOS), image_size=32)
    assert [pair.name for pair in pairs] == ["astronaut.jpg", "camera.jpg", "coffee.jpg"]
    assert pairs[2].captions == ("a cup of black coffee on a saucer with a spoon", "an espresso on a wooden table")
    assert all(np.array_equal(pair.image, PHOTO[pair.name[:-4]]) for pair in pairs)
    assert len(open_pairs(str(PHOTOS), image_size=32, count=2)) == 2


def test_what_is_no_pair_is_left_out_and_counted(tmp_path):
    for name in ("camera.jpg", "camera.txt", "coffee.jpg"):
        shutil.copy(PHOTOS / name, tmp_path)
    (tmp_path / "alone.txt").write_text("words")
    with pytest.warns(M3AEFastWarning, match=r": 2 of 3 are no pair of image and caption, left out: alone\.txt"):
        (pair,) = open_pairs(str(tmp_path), image_size=32)
    assert pair.name == "camera.jpg"
    (tmp_path / "camera.txt").unlink()
    with pytest.raises(ValueError, match="must hold images with captions, got none among 3 files"):
        open_pairs(str(tmp_path), image_size=32)


@pytest.mark.parametrize("task", TASKS)
def test_shapes(task):
    kind = getattr(shapes, f"Shapes{task.title()}")
    data = TASKS[task][0]("shapes", image_size=40, seed=4, count=6)
    assert type(data) is kind and (len(data), data.size, data.seed) == (6, 40, 4)
    assert len(TASKS[task][0]("shapes", image_size=40)) == 1000


@pytest.mark.parametrize("task", TASKS)
def test_count(write, task):
    """Of a file the first rows; what follows is not looked at."""
    open_task, row = TASKS[task]
    path = write(row, row, "no JSON")
    assert len(open_task(path, image_size=32, count=2)) == 2
    with pytest.raises(ValueError, match="line 3"):
        open_task(path, image_size=32, count=3)
    for count in (0, -1):
        with pytest.raises(ValueError, match=rf"count must be at least 1, got {count}"):
            open_task(path, image_size=32, count=count)


@pytest.mark.parametrize("task", TASKS)
def test_no_file(write, task, tmp_path):
    open_task, _ = TASKS[task]
    with pytest.raises(FileNotFoundError, match=r"path must name a file, there is no .*missing\.jsonl"):
        open_task(str(tmp_path / "missing.jsonl"), image_size=32)
    with pytest.raises(ValueError, match=r"empty\.jsonl must hold a JSON object a line, got none"):
        open_task(write("", " ", name="empty.jsonl"), image_size=32)
    if task != "pairs":
        with pytest.raises(IsADirectoryError, match=r"path must name a file, .* is a folder"):
            open_task(str(tmp_path), image_size=32)


@pytest.mark.parametrize("task", TASKS)
def test_every_field_is_needed(write, task):
    open_task, row = TASKS[task]
    for field in row.keys() - {"box"}:
        rest = {name: value for name, value in row.items() if name != field}
        with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: {field} must be given, got {', '.join(rest)}"):
            open_task(write(row, rest), image_size=32)


WORD, PATH = "a string with a word in it", "the path of an image file"
BOX, ORDER = r"\[x0, y0, x1, y1\] in whole pixels", r"\[x0, y0, x1, y1\] with 0 <= x0 < x1 and 0 <= y0 < y1"
WRONG = [
    *[("pairs", "image", value, PATH) for value in (7, "", "missing.jpg", "sub", None)],
    *[("pairs", "caption", value, f"{WORD}, or a list of such") for value in ("", " \t", 7, [], ["a", ""], [7], None)],
    *[("questions", "question", value, WORD) for value in ("", " ", 7, None, ["who?"])],
    *[("questions", "answer", value, WORD) for value in ("", 7, True)],
    *[("questions", "kind", value, WORD) for value in ("", 7)],
    *[("statements", side, "missing.jpg", PATH) for side in ("left", "right")],
    *[("statements", "sentence", value, WORD) for value in ("", None)],
    *[("statements", "label", value, "true or false") for value in (1, 0, "true", None)],
    ("phrases", "phrase", "", WORD),
    *[("phrases", "box", value, BOX) for value in ("0 0 1 1", [1, 2, 3], [0, 0, 1.5, 2], [0, 0, True, 2], {})],
    *[("phrases", "box", value, ORDER) for value in ([5, 0, 5, 9], [0, 9, 5, 9], [-1, 0, 5, 9], [9, 0, 5, 9])],
]


@pytest.mark.parametrize("task, field, value, wanted", WRONG, ids=lambda value: str(value)[:20])
def test_wrong_values(write, task, field, value, wanted):
    open_task, row = TASKS[task]
    got = re.escape(json.dumps(value))
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: {field} must be {wanted}, got {got}$"):
        open_task(write(row, "", row | {field: value}), image_size=32)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"image": ', r"line 2 must be a JSON object, got '\{\"image\":': Expecting value"),
        ("a red circle", "line 2 must be a JSON object, got 'a red circle': Expecting value"),
        ('["camera.jpg", "a man"]', "line 2 must be a JSON object, got list"),
        ("{}", "line 2: image must be given, got no field"),
    ],
)
def test_bad_json(write, line, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {message}"):
        open_pairs(write(PAIR, line), image_size=32)


def test_bad_encoding(write):
    path = Path(write(PAIR))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(open_pairs(str(path), image_size=32)) == 1, "a byte order mark is none of the text"
    path.write_bytes(path.read_bytes() + '{"image": "ß"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 must be UTF-8"):
        open_pairs(str(path), image_size=32)


def test_fields_that_are_not_read_are_named(write):
    row = {"image": "camera.jpg", "phrase": "a man", "bbox": [1, 2, 3, 4], "id": 7}
    with pytest.warns(M3AEFastWarning, match="fields that are not read: bbox, id; read are image, phrase, box"):
        assert open_phrases(write(row, row), image_size=32)[0].box is None


def test_a_box_outside_of_its_image(write):
    data = open_phrases(write(PHRASE, PHRASE | {"box": [10, 20, 97, 96]}), image_size=32)
    assert data[0].box == (10, 20, 30, 96)
    with pytest.raises(ValueError, match=r"line 2: box must lie within the image of 96 x 96 pixels, got \[10, 20, 97"):
        data[1]


@pytest.mark.parametrize("task", TASKS)
def test_an_image_that_cannot_be_read(write, task):
    open_task, row = TASKS[task]
    path = write(row)
    data = open_task(path, image_size=32)
    (Path(path).parent / "camera.jpg").write_bytes(b"this is no image")
    with pytest.raises(BadSample, match=r"rows\.jsonl, line 1: (image|left) .*camera\.jpg: cannot identify"):
        data[0]


def test_answers(tmp_path):
    path = tmp_path / "answers.txt"
    path.write_bytes("\ufeffyes\r\n\n no \r\nein Fuß\n".encode())
    assert read_answers(path) == read_answers(os.fspath(path)) == ["yes", "no", "ein Fuß"]
    path.write_text("yes\nno\n\nyes\n")
    with pytest.raises(
        ValueError, match=r"answers\.txt, line 4: each answer must be there once, got 'yes' as on line 1"
    ):
        read_answers(path)
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"answers\.txt must hold an answer a line, got none"):
        read_answers(path)
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing\.txt"):
        read_answers(tmp_path / "missing.txt")
