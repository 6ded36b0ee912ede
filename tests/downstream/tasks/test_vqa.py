"""Questions about images: what is reported, and that answers are learned."""

import pytest
import torch

from m3ae_fast import M3AEFastWarning
from m3ae_fast.downstream import Question
from m3ae_fast.downstream.tasks.vqa import answer, train_vqa
from m3ae_fast.downstream.tasks.vqa import vqa as score_vqa
from m3ae_fast.models.vqa import VQA
from tests.downstream.tasks.tiny import COLORS, TOKENIZER, make, plain, values

QUESTIONS = [
    *(Question(plain(color), "what color is it?", color, color, "color") for color in COLORS),
    Question(plain("red"), "are both the same?", "a red circle", "words", "words"),
]
ANSWERS = [*COLORS, "a red circle"]


@pytest.fixture(scope="module")
def vqa():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = VQA(make())
    losses = train_vqa(model, QUESTIONS, TOKENIZER, steps=60, lr=1e-2, progress=False)
    torch.set_num_threads(before)
    return model, losses


def test_questions_are_learned(vqa):
    model, losses = vqa
    assert losses[-1] < 0.1 * losses[0]
    assert answer(model, QUESTIONS, ANSWERS, TOKENIZER) == [q.answer for q in QUESTIONS]
    assert values(score_vqa(model, QUESTIONS, ANSWERS, TOKENIZER, batch_size=2)) == {
        "accuracy": 1, "accuracy, color": 1, "accuracy, words": 1,
    }  # fmt: skip
    assert answer(model, QUESTIONS, ANSWERS[::-1], TOKENIZER, batch_size=2) == [q.answer for q in QUESTIONS]


def test_an_answer_that_is_not_in_the_list_counts_as_wrong(vqa):
    with pytest.warns(M3AEFastWarning, match="2 of 5 questions have an answer that is not in the list"):
        results = score_vqa(vqa[0], QUESTIONS, ["red", "green", "white"], TOKENIZER)
    assert values(results) == {"accuracy": 3 / 5, "accuracy, color": 3 / 4, "accuracy, words": 0}


def test_a_list_of_answers_must_hold_words(vqa):
    with pytest.raises(ValueError, match="answers must hold at least one, got none"):
        answer(vqa[0], QUESTIONS, [], TOKENIZER)
    with pytest.raises(ValueError, match="answers must hold words, got ' '"):
        score_vqa(vqa[0], QUESTIONS, ["red", " "], TOKENIZER)
