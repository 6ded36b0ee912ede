"""Tasks that a trained model is used for. Each of `TASKS` is a function here, a module in `tasks`, and a command of
m3ae-fast.

The examples are drawn or read by `m3ae_fast.data.examples`, images of one class each by `m3ae_fast.data.samples`.
`scoring` is what results are made of, `features` are the CLS tokens that some tasks read, `training` is how others
learn, and `commands` is what their commands share. Tasks need the train extra; examples and scores do not.
"""

import importlib

from m3ae_fast.downstream.scoring.accuracy import Chance, accuracies, chance
from m3ae_fast.downstream.scoring.recall import recalls
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.examples import Pair, Phrase, Question, Statement

TASKS = {  # what the command of each does
    "retrieve": "Find captions for images and images for captions: recall at 1, 5 and 10.",
    "vqa": "Learn to answer questions about images, from a fixed list of answers.",
    "reason": "Learn to tell whether a sentence is true of two images.",
    "ground": "Find phrases in images, by Grad-CAM: no box is ever learned from.",
    "imagine": "Rebuild images from their captions alone, and captions from their images alone.",
    "probe": "Classify images by a linear probe on frozen features.",
    "finetune": "Fine-tune the image encoder to classify images.",
    "ood": "Tell images of unknown kinds from those of the training classes: AUROC of two scores.",
    "attend": "Draw where in an image CLS and each word of its caption look.",
    "project": "Draw features in two dimensions (t-SNE), colored by class.",
    "demo": "Draw what an M3AE or a MAMO makes of synthetic scenes that it has not seen.",
}
__all__ = ["TASKS", "Chance", "Pair", "Phrase", "Question", "Result", "Statement", "accuracies", "chance", "recalls"]


def __getattr__(name: str):
    """A task, imported when it is first asked for."""
    if name not in TASKS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.tasks.{name}"), name)
