"""The tasks on synthetic scenes: every truth is known, and words alone do not tell it.

Example `index` of a seed is the same whenever and in whatever order it is asked for. Take a seed that the model was not
trained with, or the scenes are those it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from m3ae_fast import _checks
from m3ae_fast.data.captions import named
from m3ae_fast.data.examples.questions import ANSWERS, ask, only
from m3ae_fast.data.examples.statements import Drawing, state
from m3ae_fast.data.scenes import Scene, SceneObject
from m3ae_fast.data.seeds import PHRASE, QUESTION, STATEMENT, choose, generator
from m3ae_fast.data.shapes import ShapesDataset, draw
from m3ae_fast.examples import Pair, Phrase, Question, Statement

SEARCH = 1000  # scenes in a row, among which one that is wanted is found for certain


class _Examples(Sequence):
    """Args of all data sets here:
    count: of examples, below 2**30.
    size: pixels a side of the images, or (height, width), at least 32.
    seed: in [0, 2**63).
    """

    def __init__(self, count: int, size: int | tuple[int, int] = 256, seed: int = 0):
        _checks.integer("count", count, 1, 2**30)
        self._scenes = ShapesDataset(size, seed)
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def _check(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(f"index must be in [0, {self.count}), got {index}")
        return index

    def _find(self, rng: np.random.Generator, fits: Callable[[Scene], object]) -> Scene:
        """The first scene that fits, from a random one on."""
        start = int(rng.integers(len(self._scenes) - SEARCH))
        return next(filter(fits, map(self._scenes.scene, range(start, start + SEARCH))))


class ShapesQuestions(_Examples):
    """A question about each scene, of one of five kinds, drawn evenly from those that it has an answer to.

    color "what color is the star?" (of the only star), shape "what shape is the red thing?" (the only red one), count
    "how many shapes are there?", presence "is there a red circle?" (as often yes as no; if no, it is one word away from
    an object of the scene), background "what color is the background?". Within a kind all answers are equally likely.

    Args:
        count: of examples, below 2**30.
        size: pixels a side of the images, or (height, width), at least 32.
        seed: in [0, 2**63).
    """

    def __getitem__(self, index: int) -> Question:
        scene = self.scene(index)
        question, answer, kind = ask(scene, generator(self.seed, QUESTION, index=index))
        return Question(draw(scene, self.size), question, answer, f"shapes/{index}", kind)

    def scene(self, index: int) -> Scene:
        """What the image of example `index` shows."""
        return self._scenes.scene(self._check(index))

    def answers(self) -> list[str]:
        """All that any question can have, sorted."""
        return list(ANSWERS)


class ShapesStatements(_Examples):
    """A sentence about two scenes. Examples 2n and 2n + 1 share it, one true and one false, in random order.

    So words alone tell nothing. Kinds, evenly drawn: both "both images contain a red circle", presence "there is a star
    in the right image", background "the background of the left image is blue", more "the left image contains more
    shapes than the right image", total "the images contain four shapes in total". What is false is so by little: the
    color or the shape is another, there is one shape more or less, and half of the time a star is in the other image.

    Args: as of ShapesQuestions.
    """

    def __getitem__(self, index: int) -> Statement:
        (left, right), sentence, label, kind = self._make(index)
        return Statement(draw(left, self.size), draw(right, self.size), sentence, label, f"shapes/{index}", kind)

    def scenes(self, index: int) -> tuple[Scene, Scene]:
        """What the left and the right image of example `index` show; they have no captions."""
        return self._make(index)[0]

    def _make(self, index: int) -> tuple[tuple[Scene, Scene], str, bool, str]:
        words = generator(self.seed, STATEMENT, epoch=1, index=self._check(index) // 2)
        label = bool((index + words.integers(2)) % 2)
        rng = generator(self.seed, STATEMENT, index=index)
        sentence, scenes, kind = state(words, Drawing(label, rng, lambda fits: self._find(rng, fits)))
        return scenes, sentence, label, kind


class ShapesPhrases(_Examples):
    """A phrase for each scene, "a red circle", that fits exactly one of its two to four objects, and that one's box.

    Args: as of ShapesQuestions.
    """

    def __getitem__(self, index: int) -> Phrase:
        scene, target = self._choose(index)
        phrase, count = named(target.color, target.shape), len(scene.objects)
        return Phrase(draw(scene, self.size), phrase, target.box, f"shapes/{index}", count)

    def scene(self, index: int) -> Scene:
        """What the image of example `index` shows."""
        return self._choose(index)[0]

    def _choose(self, index: int) -> tuple[Scene, SceneObject]:
        rng = generator(self.seed, PHRASE, index=self._check(index))
        # of two or more: where one object is alone, whatever strikes the eye is the answer
        scene = self._find(rng, lambda scene: len(scene.objects) > 1 and only(scene, "color", "shape"))
        return scene, choose(rng, only(scene, "color", "shape"))


class ShapesPairs(_Examples):
    """Each scene with its longest caption, which names every object, or with all three.

    A caption may happen to be true of another scene too; of equal ones alone it is known.

    Args:
        captions: "longest" or "all"; the others as of ShapesQuestions.
    """

    def __init__(self, count: int, size: int | tuple[int, int] = 256, seed: int = 0, *, captions: str = "longest"):
        super().__init__(count, size, seed)
        _checks.choice("captions", captions, ("longest", "all"))
        self.captions = captions

    def __getitem__(self, index: int) -> Pair:
        scene = self.scene(index)
        captions = scene.captions if self.captions == "all" else scene.captions[-1:]
        return Pair(draw(scene, self.size), captions, f"shapes/{index}")

    def scene(self, index: int) -> Scene:
        """What the image of example `index` shows."""
        return self._scenes.scene(self._check(index))
