"""Retrieval, VQA, reasoning and grounding: what the functions of each task report, and that they learn."""

import numpy as np
import pytest
import torch
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.examples.shapes import ShapesPairs
from m3ae_fast.downstream import Pair, Phrase, Question, Statement
from m3ae_fast.downstream import ground as grounding
from m3ae_fast.downstream.finetune import finetune
from m3ae_fast.downstream.ground import draw_ground, score_ground
from m3ae_fast.downstream.pack import pack_for
from m3ae_fast.downstream.reason import score_reason, train_reason
from m3ae_fast.downstream.retrieve import finetune_retrieval, retrieve
from m3ae_fast.downstream.vqa import answer, score_vqa, train_vqa
from m3ae_fast.models import CLIP, MAMO, EncodersConfig, MAMOConfig
from m3ae_fast.models.reason import Reason
from m3ae_fast.models.vqa import VQA

DRAWN = [ShapesPairs(5, 32, captions="all" if i < 2 else "longest")[i] for i in range(5)]
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "white": (230, 230, 230)}
TOKENIZER = Tokenizer.train(
    [c for p in DRAWN for c in p.captions] + ["what color is it? both are the same", " ".join(COLORS)], 400
)
SIZES = {
    "image_size": 32, "patch_size": 8, "vocab_size": TOKENIZER.vocab_size, "max_text_length": 40, "width": 32,
    "heads": 4, "depth": 1, "text_depth": 1, "projection": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(threads):
    threads(1)


def make(kind=MAMO, *, spread=None, **changes):
    """A model with its initial weights, or with ones of that spread: lively scores."""
    torch.manual_seed(0)
    options = {"fusion_depth": 2} if kind is MAMO else {}
    model = kind((MAMOConfig if kind is MAMO else EncodersConfig)(**SIZES, **options, **changes)).eval()
    for parameter in model.parameters() if spread else ():
        if parameter.dim():
            torch.nn.init.normal_(parameter, std=spread)
    return model


def plain(color):
    return np.full((32, 32, 3), COLORS[color], np.uint8)


# -- retrieval ---------------------------------------------------------------------------------------------------------


def brute_force(model, pairs, k):
    """Every image beside every text, one pair at a time; {name: share of queries}."""
    texts = [(i, caption) for i, p in enumerate(pairs) for caption in p.captions]
    images = [model.encode_images(pack_for(model, [p.image], None, None).images) for p in pairs]
    batches = [pack_for(model, None, [caption], TOKENIZER) for _, caption in texts]
    words = [model.encode_texts(batch.text, batch.text_lengths) for batch in batches]
    itc, itm = (torch.zeros(len(pairs), len(texts), dtype=torch.float64) for _ in range(2))
    one = torch.tensor([0])
    for i, image in enumerate(images):
        for j, text in enumerate(words):
            itc[i, j] = image.embedding[0] @ text.embedding[0]
            if k:
                itm[i, j] = model.match(image, text, one, one)

    def right(i, j):  # its own text, or that of the same image; or the same words
        owners = {o for o, _ in texts if np.array_equal(pairs[o].image, pairs[i].image)}
        return texts[j][1] in {caption for o, caption in texts if o in owners}

    def share(table, found, top):
        best = table.argsort(descending=True)[:, :top].tolist()
        return np.mean([any(found(query, c) for c in row) for query, row in enumerate(best)])

    def reranked(first, second):
        out = first.clone()
        for row, best in enumerate(first.argsort(descending=True)[:, :k]):
            out[row, best] = 10 + second[row, best].argsort().argsort().double()
        return out

    tables = {"ITC ": (itc, itc.T)}
    if k:
        tables[""] = (reranked(itc, itm), reranked(itc.T, itm.T))
    found = {}
    for prefix, (by_image, by_text) in tables.items():
        for top in (1, 5, 10):
            found[f"{prefix}text R@{top}"] = share(by_image, right, top)
            found[f"{prefix}image R@{top}"] = share(by_text, lambda j, i: right(i, j), top)
    return found


def values(results):
    return {result.name: result.value for result in results}


PAIRS = [
    *DRAWN,
    Pair(DRAWN[2].image, ("a caption of its own",), "the third image again"),
    Pair(plain("red"), DRAWN[0].captions[:1], "a caption of the first"),
]


@pytest.mark.parametrize("k", [100, 3, 0])
def test_retrieval_is_a_loop_over_all_pairs(k):
    model = make(spread=0.3)
    with torch.no_grad():
        wanted = brute_force(model, PAIRS, k)
    found = values(retrieve(model, PAIRS, TOKENIZER, rerank=k))
    assert found == pytest.approx(wanted) and len(found) == (12 if k else 6)
    assert 0 < found["ITC text R@5"] < 1 and 0 < found["ITC image R@5"] < 1


def test_reranking_ranks_again():
    """Of all candidates it is ITM's order, of fewer ITC's choice: the test above would not tell, were they alike."""
    model = make(spread=0.3)
    ranked = [values(retrieve(model, PAIRS, TOKENIZER, rerank=k)) for k in (1, 3, 100)]
    itc = {name.removeprefix("ITC "): value for name, value in ranked[0].items() if name.startswith("ITC")}
    again = [{name: value for name, value in each.items() if not name.startswith("ITC")} for each in ranked]
    assert again[0] == itc and again[1] != itc and again[2] not in (itc, again[1])


def test_chunks_change_nothing():
    model = make(spread=0.3)
    whole = retrieve(model, PAIRS, TOKENIZER, rerank=4)
    for size in (1, 3, 5):
        assert retrieve(model, PAIRS, TOKENIZER, rerank=4, batch_size=size) == whole


def test_duplicates_are_right_for_one_another():
    red, blue = plain("red"), plain("blue")
    alike = [
        [Pair(red, ("a circle",), ""), Pair(red.copy(), ("two rings",), "")],
        [Pair(red, ("a circle",), ""), Pair(blue, ("a circle",), "")],
    ]
    for pairs in alike:
        assert all(r.value == r.chance == 1 for r in retrieve(make(spread=0.3), pairs, TOKENIZER))
    other = retrieve(make(spread=0.3), [alike[0][0], Pair(blue, ("two rings",), "")], TOKENIZER)
    assert all(r.chance == 0.5 for r in other if r.name.endswith("@1"))


def test_a_clip_is_ranked_by_itc_alone():
    model = make(CLIP, spread=0.3)
    with torch.no_grad():
        wanted = brute_force(model, PAIRS, 0)
    assert values(retrieve(model, PAIRS, TOKENIZER)) == pytest.approx(wanted) and len(wanted) == 6


def test_retrieval_refuses():
    model = make()
    with pytest.raises(ValueError, match="pairs must hold at least one, got none"):
        retrieve(model, [], TOKENIZER)
    with pytest.raises(ValueError, match="rerank must be at least 0, got -1"):
        retrieve(model, PAIRS, TOKENIZER, rerank=-1)
    with pytest.raises(ValueError, match="must hold a word"):
        retrieve(model, [Pair(plain("red"), (" ",), "")], TOKENIZER)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MAMO, CLIP])
def test_retrieval_is_learned(kind):
    model, pairs = make(kind), [Pair(plain(color), (f"{color} {color}",), color) for color in COLORS]
    config, before = model.config, {n: p.clone() for n, p in model.named_parameters()}
    losses = finetune_retrieval(model, pairs, TOKENIZER, steps=40, lr=3e-3, progress=False)
    assert len(losses) == 40 and losses[-1] < 0.35 * losses[0]
    assert model.config is config and not model.training
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    if kind is MAMO:  # ITC and ITM alone; and the momentum network follows
        assert not any(n.startswith(("word_head", "predictor", "regressor")) for n in moved)
        assert {"match_head.weight", "target.image.cls_token"} <= moved
    found = values(retrieve(model, pairs, TOKENIZER))
    assert found["ITC text R@1"] == found["ITC image R@1"] == 1


def test_the_same_seed_gives_the_same_losses():
    settings = {"steps": 3, "batch_size": 3, "progress": False}
    runs = [finetune_retrieval(make(), DRAWN, TOKENIZER, seed=seed, **settings) for seed in (0, 0, 1, 2**40)]
    assert runs[0] == runs[1] and len({tuple(run) for run in runs}) == 3


def test_a_failure_leaves_the_configuration_as_it_was():
    model = make()
    config = model.config
    with pytest.raises(ValueError, match="at least 2 pairs"):
        finetune_retrieval(model, DRAWN[:1], TOKENIZER, steps=1, progress=False)
    assert model.config is config


@pytest.fixture
def line():
    """A model, and line(examples, step): a loss that notes what it is given."""
    model, seen = torch.nn.Linear(1, 1), []

    def loss_of(examples, step):
        seen.append(examples)
        return (model(torch.tensor(examples)[:, None]) - 1).square().mean()

    return model, loss_of, seen


def test_an_epoch_shows_every_example_once(line):
    model, loss_of, seen = line
    examples = [float(i) for i in range(10)]
    finetune(model, examples, loss_of, steps=5, batch_size=4, progress=False)
    order = [x for batch in seen for x in batch]
    assert [len(batch) for batch in seen] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:]) == examples and order[:10] != order[10:]
    seen.clear()
    finetune(model, examples, loss_of, steps=2, batch_size=32, progress=False)
    assert [sorted(batch) for batch in seen] == [examples] * 2


@pytest.mark.parametrize("broken", [lambda w: w / 0, lambda w: (w * 0).abs().sqrt()])
def test_what_is_not_finite_is_not_taken(broken):
    """A loss; or a gradient alone, which would show a step later, or never."""
    model = torch.nn.Linear(1, 1)
    before = model.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="step 1 of fine-tuning is not finite"):
        finetune(model, [1.0], lambda *_: broken(model.weight).sum(), steps=1, progress=False)
    assert torch.equal(model.weight, before)


# -- VQA ---------------------------------------------------------------------------------------------------------------

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


# -- reasoning ---------------------------------------------------------------------------------------------------------


def test_statements_are_learned():
    """The same sentence for all: the images tell."""
    statements = [
        Statement(plain(a), plain(b), "both are the same", a == b, f"{a} {b}", "same" if a == b else "")
        for a in ("red", "blue")
        for b in ("red", "blue")
    ]
    model = Reason(make())
    losses = train_reason(model, statements, TOKENIZER, steps=40, lr=3e-3, progress=False)
    assert losses[-1] < 0.2 * losses[0]
    results = score_reason(model, statements, TOKENIZER, batch_size=3)
    assert values(results) == {"accuracy": 1, "accuracy, no kind": 1, "accuracy, same": 1}
    assert results[0].count == 4 and [r.count for r in results[1:]] == [2, 2]
    turned = [Statement(s.left, s.right, s.sentence, not s.label, s.name) for s in statements]
    assert values(score_reason(model, turned, TOKENIZER)) == {"accuracy": 0}


# -- grounding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def peaks(monkeypatch):
    """peaks(patch, ...): the maps of the phrases, in order, highest at that patch of the 4 x 4."""

    def put(*patches):
        left = list(patches)

        def ground(model, batch, *, block=None):
            maps = torch.zeros(len(batch), 16)
            for row in maps:
                row[left.pop(0)] = 1.0
            return maps

        monkeypatch.setattr(grounding, "ground", ground)

    return put


SQUARE, WIDE = np.zeros((64, 64, 3), np.uint8), np.zeros((32, 64, 3), np.uint8)
PHRASES = [
    Phrase(SQUARE, "red", (0, 0, 16, 16), "hit: the first patch, at half its size"),
    Phrase(SQUARE, "red", (16, 0, 64, 64), "missed"),
    Phrase(SQUARE, "red", None, "no box"),
    Phrase(WIDE, "red", (0, 0, 15, 32), "cut off: what is left of column 16"),
    Phrase(WIDE, "red", (8, 24, 24, 32), "hit: of its 16 columns 8 are left"),
]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_pointing_accuracy(peaks, size):
    peaks(0, 0, 0, 0, 12)
    (result,) = score_ground(make(), PHRASES, TOKENIZER, batch_size=size)
    shares = (1 / 16, 3 / 4, 8 * 8 / 32**2)
    assert (result.name, result.count) == ("pointing accuracy", 3)
    assert result.value == pytest.approx(2 / 3) and result.chance == pytest.approx(sum(shares) / 3)


def test_no_box_no_score(peaks):
    peaks(0, 0)
    with pytest.raises(ValueError, match="none of 2 has one within the square in the middle"):
        score_ground(make(), PHRASES[2:4], TOKENIZER)


def test_a_picture_of_phrases(peaks, tmp_path):
    """Green where the box is hit, red where it is missed."""
    for name, patch in (("hit", 0), ("missed", 15)):
        peaks(patch, 5)
        draw_ground(make(), [PHRASES[0], PHRASES[2]], TOKENIZER, tmp_path / f"{name}.png")
    hit, missed = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("hit", "missed"))
    assert hit.shape == missed.shape and min(hit.shape[:2]) > 200

    def count(image, color):
        return (np.abs(image - color).sum(2) < 60).sum()

    green, red = (0x17, 0x8A, 0x4C), (0xC8, 0x45, 0x2F)
    assert count(hit, green) > 100 > count(hit, red) and count(missed, red) > 100 > count(missed, green)
