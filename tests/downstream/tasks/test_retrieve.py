"""Retrieval: what it reports, and that it is learned."""

import numpy as np
import pytest
import torch

from m3ae_fast.downstream import Pair
from m3ae_fast.downstream.pack import pack_for
from m3ae_fast.downstream.tasks.retrieve import finetune_retrieval, retrieve
from m3ae_fast.models import CLIP, MAMO
from tests.downstream.tasks.tiny import COLORS, DRAWN, TOKENIZER, make, plain, values


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
        both = itc / model.contrast.temperature.double() + itm
        tables[""] = (reranked(itc, itm), reranked(itc.T, itm.T))
        tables["ITC + ITM "] = (reranked(itc, both), reranked(itc.T, both.T))
    found = {}
    for prefix, (by_image, by_text) in tables.items():
        for top in (1, 5, 10):
            found[f"{prefix}text R@{top}"] = share(by_image, right, top)
            found[f"{prefix}image R@{top}"] = share(by_text, lambda j, i: right(i, j), top)
    return found


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
    assert found == pytest.approx(wanted) and len(found) == (18 if k else 6)
    assert 0 < found["ITC text R@5"] < 1 and 0 < found["ITC image R@5"] < 1


def test_reranking_ranks_again():
    """Of all candidates it is ITM's order, of fewer ITC's choice: the test above would not tell, were they alike."""
    model = make(spread=0.3)
    ranked = [values(retrieve(model, PAIRS, TOKENIZER, rerank=k)) for k in (1, 3, 100)]

    def of(found, prefix):
        names = [f"{way} R@{k}" for way in ("text", "image") for k in (1, 5, 10)]
        return [found[prefix + name] for name in names]

    itc, again = of(ranked[0], "ITC "), [of(each, "") for each in ranked]
    assert again[0] == itc and again[1] != itc and again[2] not in (itc, again[1])
    assert of(ranked[2], "ITC + ITM ") not in (itc, again[2])


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
