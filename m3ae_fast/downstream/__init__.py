"""What a trained model is for: retrieval, questions, statements about two images, phrases to point at.

`shapes` draws the examples of each task, with truths that are known; `files` reads those of a user (both need the train
extra, as `pack` does); `recall`, `accuracy` and `report` score; `retrieve`, `vqa`, `reason` and `ground` are the tasks.
`features` are CLS tokens and their classes; `probe` and `ood` judge them.
"""

from m3ae_fast.downstream.accuracy import Chance, accuracies, chance
from m3ae_fast.downstream.examples import Pair, Phrase, Question, Statement
from m3ae_fast.downstream.recall import recalls
from m3ae_fast.downstream.report import Result

__all__ = ["Chance", "Pair", "Phrase", "Question", "Result", "Statement", "accuracies", "chance", "recalls"]
