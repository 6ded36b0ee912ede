"""Drawn tasks: every truth is checked by a reader of its own, and words alone must not tell it."""

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from m3ae_fast.data import ShapesDataset, Tokenizer
from m3ae_fast.data.examples.shapes import ShapesPairs, ShapesPhrases, ShapesQuestions, ShapesStatements
from m3ae_fast.data.examples.statements import Drawing, state
from m3ae_fast.data.scenes import Scene
from m3ae_fast.data.shapes import BACKGROUNDS, COLORS, SHAPES
from m3ae_fast.downstream import chance

COUNT, SIZE, SEED = 2000, 32, 7
WORDS = ("no", "one", "two", "three", "four", "five")
ALL = (ShapesQuestions, ShapesStatements, ShapesPhrases, ShapesPairs)


@pytest.fixture(scope="module")
def questions():
    data = ShapesQuestions(COUNT, SIZE, SEED)
    return [(data.scene(i), data[i]) for i in range(COUNT)]


@pytest.fixture(scope="module")
def statements():
    data = ShapesStatements(COUNT, SIZE, SEED)
    return [(data.scenes(i), data[i]) for i in range(COUNT)]


def images_of(example):
    return [value for value in vars(example).values() if isinstance(value, np.ndarray)]


def others_of(example):
    return {name: value for name, value in vars(example).items() if not isinstance(value, np.ndarray)}


def scenes_of(data, index):
    return data.scenes(index) if isinstance(data, ShapesStatements) else (data.scene(index),)


def assert_fair(hits, count, share, about):
    """Within four standard errors of what it should be."""
    assert abs(hits / count - share) < 4 * math.sqrt(share * (1 - share) / count), f"{about}: {hits} of {count}"


@pytest.mark.parametrize("kind", ALL)
def test_an_example_depends_on_seed_and_index_alone(kind):
    long, short = kind(COUNT, SIZE, SEED), kind(20, SIZE, SEED)
    examples = [short[i] for i in range(20)]
    for i in reversed(range(20)):
        assert others_of(long[i]) == others_of(examples[i])
        assert all(map(np.array_equal, images_of(long[i]), images_of(examples[i])))
    other = kind(20, SIZE, SEED + 1)
    assert sum(others_of(other[i]) == others_of(examples[i]) for i in range(20)) < 5
    assert len(list(short)) == len(short) == 20, "iteration ends"


@pytest.mark.parametrize("kind", ALL)
def test_the_image_shows_the_scene(kind):
    """Its background in the corner and, in each box, nothing of a color that does not belong there."""
    data = kind(100, 128, SEED)
    for i in range(len(data)):
        for scene, image in zip(scenes_of(data, i), images_of(data[i]), strict=True):
            assert image.shape == (128, 128, 3) and image.dtype == np.uint8
            ground = np.array(BACKGROUNDS[scene.background])
            outside = np.ones((128, 128), bool)
            for item in scene.objects:
                assert item.shape in SHAPES
                x0, y0, x1, y1 = item.box
                inside = image[y0:y1, x0:x1]
                outside[y0:y1, x0:x1] = False
                assert (inside == COLORS[item.color]).all(-1).mean() > 0.2, f"{item} of {scene}"
            assert (image[outside] == ground).all(), scene


def test_questions_have_their_answers(questions):
    answers = set(ShapesQuestions(1).answers())
    for scene, example in questions:
        about = f"{example.question} {example.answer}, {scene}"
        assert example.answer in answers, about
        words = example.question.rstrip("?").split()
        if example.kind == "color":
            (item,) = [item for item in scene.objects if item.shape == words[-1]]
            assert example.answer == item.color, about
        elif example.kind == "shape":
            assert words[:4] == ["what", "shape", "is", "the"] and words[-1] == "thing", about
            (item,) = [item for item in scene.objects if item.color == words[-2]]
            assert example.answer == item.shape, about
        elif example.kind == "count":
            assert WORDS.index(example.answer) == len(scene.objects), about
        elif example.kind == "presence":
            color, shape = words[-2:]
            assert words[2] == ("an" if color[0] in "aeiou" else "a") and color in COLORS, about
            there = any((item.color, item.shape) == (color, shape) for item in scene.objects)
            assert example.answer == ("yes" if there else "no"), about
            assert any(color == item.color or shape == item.shape for item in scene.objects), f"implausible: {about}"
        else:
            assert example.kind == "background" and example.question == "what color is the background?"
            assert example.answer == scene.background, about


def test_questions_are_balanced(questions):
    answers = defaultdict(Counter)
    for _, example in questions:
        answers[example.kind][example.answer] += 1
    sizes = {"color": 7, "shape": 8, "count": 4, "presence": 2, "background": 5}
    assert {kind: len(counts) for kind, counts in answers.items()} == sizes
    for kind, counts in answers.items():
        assert counts.total() > 0.17 * COUNT, kind
        for answer, hits in counts.items():
            assert_fair(hits, counts.total(), 1 / sizes[kind], f"{kind} {answer}")
    data = ShapesQuestions(1)
    assert data.answers() == sorted({answer for counts in answers.values() for answer in counts})
    level = chance(example for _, example in questions)
    assert level.constant < 0.15 and level.by_kind < 0.28


def test_presence_needs_binding(questions):
    """Often enough both words are in the scene, on two objects; and no word alone gives the answer away."""
    mixed, said = 0, defaultdict(Counter)
    asked = [(scene, example) for scene, example in questions if example.kind == "presence"]
    for scene, example in asked:
        color, shape = example.question.rstrip("?").split()[-2:]
        colors, shapes = ({getattr(item, name) for item in scene.objects} for name in ("color", "shape"))
        mixed += example.answer == "no" and color in colors and shape in shapes
        for word in (color, shape):
            said[word][example.answer] += 1
    assert mixed > 0.15 * len(asked)
    for word, counts in said.items():
        assert_fair(counts["yes"], counts.total(), 0.5, word)


def truth_of(sentence, left, right):
    """Reads a statement and looks at the scenes."""
    sides = {"left": left, "right": right}
    if match := re.fullmatch(r"both images contain (an?) (\w+) (\w+)", sentence):
        assert match[1] == ("an" if match[2][0] in "aeiou" else "a")
        return all(any((o.color, o.shape) == (match[2], match[3]) for o in scene.objects) for scene in (left, right))
    if match := re.fullmatch(r"there is a (\w+) in the (left|right) image", sentence):
        return match[1] in {item.shape for item in sides[match[2]].objects}
    if match := re.fullmatch(r"the background of the (left|right) image is (\w+)", sentence):
        return sides[match[1]].background == match[2]
    if match := re.fullmatch(r"the (left|right) image contains more shapes than the (left|right) image", sentence):
        assert match[1] != match[2]
        return len(sides[match[1]].objects) > len(sides[match[2]].objects)
    match = re.fullmatch(r"the images contain (\w+) shapes in total", sentence)
    return len(left.objects) + len(right.objects) == WORDS.index(match[1])


def test_statements_are_true_or_false_as_they_say(statements):
    for (left, right), example in statements:
        assert truth_of(example.sentence, left, right) is example.label, f"{example.sentence}: {left} | {right}"
        assert left.captions == right.captions == ()


def test_statements_are_balanced(statements):
    """Exactly, for each sentence; in an order that does not show."""
    first = 0
    for (_, even), (_, odd) in zip(statements[::2], statements[1::2], strict=True):
        assert even.sentence == odd.sentence and even.kind == odd.kind and even.label is not odd.label
        first += even.label
    assert_fair(first, COUNT // 2, 0.5, "the first of two is true")
    kinds = Counter(example.kind for _, example in statements)
    assert kinds.keys() == {"both", "presence", "background", "more", "total"}
    for kind, hits in kinds.items():
        assert_fair(hits // 2, COUNT // 2, 0.2, kind)
    assert chance(example for _, example in statements) == (0.5, 0.5)


def test_false_statements_are_nearly_true(statements):
    for (left, right), example in statements:
        if example.label:
            continue
        if example.kind == "both":
            color, shape = example.sentence.split()[-2:]
            for scene in (left, right):
                assert any(color == item.color or shape == item.shape for item in scene.objects), example.sentence
        if example.kind == "total":
            total = len(left.objects) + len(right.objects)
            assert abs(total - WORDS.index(example.sentence.split()[3])) == 1


def test_statements_about_scenes_that_are_all_alike():
    """Every object as the sentence says, or the background: where it is to be false, all of it has to go."""
    crowd = next(scene for scene in map(ShapesDataset(SIZE, SEED).scene, range(100)) if len(scene.objects) == 4)

    def painted(background, color, shape):
        items = tuple(dataclasses.replace(item, color=color, shape=shape) for item in crowd.objects)
        return Scene(background, items, ())

    def make(seed, label, scenes):
        drawing = Drawing(label, np.random.default_rng(seed), lambda fits: next(filter(fits, scenes)))
        return state(np.random.default_rng(seed), drawing)

    kinds = Counter()
    for seed, label in itertools.product(range(150), (True, False)):
        sentence, _, kind = make(seed, label, itertools.repeat(crowd))
        said = sentence.split()
        kinds_of_words = (COLORS, SHAPES, BACKGROUNDS)
        color, shape, ground = (next((word for word in words if word in said), None) for words in kinds_of_words)
        scenes = [painted(each, color or "red", shape or "ring") for each in (ground or "pink", "cyan")]
        for drawn in itertools.permutations(scenes):
            again, (left, right), _ = make(seed, label, itertools.cycle(drawn))
            assert again == sentence
            if kind in ("both", "presence", "background"):  # the others count, and there are always four
                kinds[kind, label] += 1
                assert truth_of(sentence, left, right) is label, f"{sentence}: {left} | {right}"
    assert len(kinds) == 6 and min(kinds.values()) > 20


@pytest.mark.parametrize("kind", ["presence", "background"])
def test_the_other_image_tells_nothing(statements, kind):
    """Whether it has what is spoken of does not go with the label, so that one has to know left from right."""
    has = {True: [], False: []}
    for (left, right), example in statements:
        if example.kind == kind:
            turned = re.sub("left|right", lambda m: {"left": "right", "right": "left"}[m[0]], example.sentence)
            has[example.label].append(truth_of(turned, left, right))
    for label, values in has.items():
        assert_fair(sum(values), len(values), 0.5, label)


def test_phrases():
    data = ShapesPhrases(300, 64, SEED)
    sizes = Counter()
    for i in range(len(data)):
        scene, example = data.scene(i), data[i]
        article, color, shape = example.phrase.split()
        assert article == ("an" if color[0] in "aeiou" else "a")
        (item,) = [item for item in scene.objects if (item.color, item.shape) == (color, shape)]
        assert example.box == item.box
        x0, y0, x1, y1 = example.box
        assert (example.image[y0:y1, x0:x1] == COLORS[color]).all(-1).any()
        sizes[len(scene.objects)] += 1
    assert sizes.keys() == {2, 3, 4} and min(sizes.values()) > 60
    large = ShapesPhrases(300, 256, SEED)
    for i in range(20):
        assert large[i].phrase == data[i].phrase
        np.testing.assert_allclose(np.array(large[i].box) / 4, data[i].box, atol=1)


def test_pairs():
    longest, every = ShapesPairs(50, 64, SEED), ShapesPairs(50, 64, SEED, captions="all")
    source = ShapesDataset(64, SEED)
    for i in range(50):
        assert np.array_equal(longest[i].image, source[i].image) and longest[i].name == f"shapes/{i}"
        assert every[i].captions == source[i].captions and longest[i].captions == (source[i].captions[2],)
        for item in source.scene(i).objects:
            assert f"{item.color} {item.shape}" in longest[i].captions[0]


def test_words_can_be_spelt(questions, statements):
    """By the vocabulary that is learned from captions: of all that is asked, the question mark alone is unknown."""
    tokenizer = Tokenizer.train(list(ShapesDataset(32).captions()), 512)
    texts = {example.question.rstrip("?") for _, example in questions}
    texts |= {example.sentence for _, example in statements} | set(ShapesQuestions(1).answers())
    for text in texts:
        assert "[UNK]" not in tokenizer.tokens(tokenizer.encode(text)), text


@pytest.mark.parametrize("kind", ALL)
def test_arguments(kind):
    for index in (-1, 3):
        with pytest.raises(IndexError, match=rf"index must be in \[0, 3\), got {index}"):
            kind(3, SIZE)[index]
    with pytest.raises(ValueError, match="count must be in"):
        kind(0)
    with pytest.raises(TypeError, match="count must be an integer, got float"):
        kind(3.0)
    with pytest.raises(ValueError, match="size must be at least 32, got 31"):
        kind(3, 31)
    with pytest.raises(ValueError, match="seed must be in"):
        kind(3, SIZE, -1)


def test_captions_argument():
    with pytest.raises(ValueError, match="captions must be one of 'longest', 'all', got 'short'"):
        ShapesPairs(3, captions="short")
