"""What a trained model is for: retrieval, questions, statements about two images, phrases to point at.

`m3ae_fast.data.examples` draws or reads the examples of each task; `recall`, `accuracy` and `report` score; `retrieve`,
`vqa`, `reason` and `ground` are the tasks. `features` are CLS tokens and their classes; `probe` and `ood` judge them.
"""

from m3ae_fast.downstream.accuracy import Chance, accuracies, chance
from m3ae_fast.downstream.recall import recalls
from m3ae_fast.downstream.report import Result
from m3ae_fast.examples import Pair, Phrase, Question, Statement

__all__ = ["Chance", "Pair", "Phrase", "Question", "Result", "Statement", "accuracies", "chance", "recalls"]
