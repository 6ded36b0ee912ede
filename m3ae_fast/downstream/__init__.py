"""What a trained model is for: retrieval, questions, statements about two images, phrases to point at.

`shapes` draws the examples of each task, with truths that are known; `files` reads those of a user (both need the train
extra, as `pack` does); `retrieval`, `accuracy` and `report` score.
"""

from m3ae_fast.downstream.accuracy import Chance, accuracies, chance
from m3ae_fast.downstream.examples import Pair, Phrase, Question, Statement
from m3ae_fast.downstream.report import Result
from m3ae_fast.downstream.retrieval import recalls

__all__ = ["Chance", "Pair", "Phrase", "Question", "Result", "Statement", "accuracies", "chance", "recalls"]
