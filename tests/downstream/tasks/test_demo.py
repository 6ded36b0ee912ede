"""demo: what is drawn of one run, what is said of it, and which runs are refused."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast._drawing import Cards
from m3ae_fast.downstream.tasks import demo as module
from m3ae_fast.downstream.tasks.demo import demo
from m3ae_fast.downstream.tasks.retrieve import Scores
from m3ae_fast.models import M3AE
from m3ae_fast.train import load_run


@pytest.fixture(scope="module")
def runs(pretrained):
    return pretrained("m3ae", "mamo", "clip")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(module, "AMONG", 8)


@pytest.fixture
def drawn(monkeypatch):
    """The words of every card of every picture that is saved."""
    found = []
    monkeypatch.setattr(Cards, "save", lambda self, path: found.append(path))
    made = Cards.__init__

    def init(self, cards, *arguments):
        found.extend(card.words for card in cards)
        made(self, cards, *arguments)

    monkeypatch.setattr(Cards, "__init__", init)
    return found


def text(words):
    return " ".join(word for word, _, _ in words)


def picture(path):
    drawn = np.asarray(Image.open(path))
    assert min(drawn.shape[:2]) > 500 and drawn.std() > 10
    return drawn


def test_m3ae(runs, command_line, tmp_path):
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for seed, path in enumerate(paths):
        status, out, _ = command_line("demo", runs / "m3ae", "--out", path, "--seed", seed)
        said = re.fullmatch(r"(.*): 6 unseen scenes, (\d+) of (\d+) masked words guessed\n", out)
        assert status == 0 and said[1] == str(path) and int(said[2]) <= int(said[3]) > 0
    first, second = map(picture, paths)
    assert first.shape != second.shape or (first != second).any(), "other scenes"


def test_guesses_are_counted_as_they_are_drawn(runs, drawn, monkeypatch, tmp_path):
    """Every other word is guessed right, whether it is masked or not."""
    reconstruct = M3AE.reconstruct

    def half_right(self, batch, **options):
        result = reconstruct(self, batch, **options)
        guesses = torch.where(torch.arange(len(batch.text)) % 2 == 0, batch.text, 0)
        result.text_logits = torch.nn.functional.one_hot(guesses.long(), result.text_logits.shape[1]).float()
        return result

    monkeypatch.setattr(M3AE, "reconstruct", half_right)
    said = demo(load_run(runs / "m3ae"), tmp_path / "p.png")
    masked = [word == guess for words in drawn[:-1] for word, guess, hidden in words if hidden]
    assert 0 < sum(masked) < len(masked)
    assert said == f"6 unseen scenes, {sum(masked)} of {len(masked)} masked words guessed"


def test_mamo(runs, command_line, tmp_path):
    status, out, _ = command_line("demo", runs / "mamo", "--out", tmp_path / "p.png")
    said = r"4 unseen scenes, [0-4] of 4 phrases pointed at; of 8 scenes [0-8] find their own caption first\n"
    assert status == 0 and re.fullmatch(f"{re.escape(str(tmp_path / 'p.png'))}: {said}", out)
    picture(tmp_path / "p.png")


def test_answers_of_a_saved_vqa_model(runs, command_line, tmp_path):
    file = tmp_path / "vqa.safetensors"
    assert command_line("vqa", runs / "mamo", "--steps", 2, "--samples", 4, "--save", file)[0] == 0
    without, path = tmp_path / "without.png", tmp_path / "p.png"
    assert command_line("demo", runs / "mamo", "--out", without)[0] == 0
    status, out, _ = command_line("demo", runs / "mamo", "--vqa", file, "--out", path)
    said = re.search(r"pointed at, (\d+) of (\d+) questions answered; of 8", out)
    assert status == 0 and int(said[1]) <= int(said[2]) >= 8
    assert picture(path).shape[0] > picture(without).shape[0], "questions take lines"


def test_what_a_perfect_mamo_would_show(runs, drawn, monkeypatch, tmp_path):
    """The best caption is the scene's own; the answers are right; the run's model is left as it was."""
    run = load_run(runs / "mamo")
    before = {name: value.clone() for name, value in run.model.state_dict().items()}

    def score_pairs(model, pairs, tokenizer, *, rerank):
        table = torch.eye(len(pairs))
        images = [pair.image.tobytes() for pair in pairs]
        tables = {module.BOTH: (table, table)}
        return Scores([pair.captions[0] for pair in pairs], torch.arange(len(pairs)), images, tables)

    def load_vqa(path, model):
        assert model is not run.model
        return model, ["yes"]

    monkeypatch.setattr(module, "score_pairs", score_pairs)
    monkeypatch.setattr(module, "load_vqa", load_vqa)
    monkeypatch.setattr(module, "answer", lambda model, questions, *_: [question.answer for question in questions])
    said = demo(run, tmp_path / "p.png", vqa=tmp_path / "vqa")
    answers, answered = re.search(r"(\d+) of (\d+) questions answered; of 8 scenes 8 find", said).groups()
    cards = drawn[:-1]
    assert answers == answered == str(sum(hidden for words in cards for *_, hidden in words))
    shown = re.compile(r"where is a \w+ \w+\? \n best of 8 captions: .* \(right\) \n ")
    assert all(shown.match(text(words)) for words in cards)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["clip"], "run must be of the objective m3ae or mamo, got clip"),
        (["m3ae", "--vqa", "x"], "vqa must not be given for a run of m3ae, which answers no questions, got x"),
        (["mamo", "--vqa", "x"], "path must name a file, there is no x"),
        (["m3ae", "--out", "no/p.png"], "--out must name a file in a folder that exists, got no/p.png"),
        (["m3ae", "--out", "p.jpg"], "argument --out: must name a .png file, got 'p.jpg'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(runs, command_line, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = command_line("demo", runs / arguments[0], *arguments[1:])
    assert status == 2 and out == "" and message in err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_help(command_line):
    status, out, _ = command_line("demo", "--help")
    assert status == 0 and "usage: m3ae-fast demo" in out and "m3ae-fast demo runs/mamo --vqa" in out
