"""Losses that compare pairs, in two and four processes with DDP and FSDP2: those of one process with all pairs."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from m3ae_fast import ImageTextBatch
from m3ae_fast.models import CLIP, MAMO, EncodersConfig, MAMOConfig
from m3ae_fast.models.contrastive import meet, same_pairs
from m3ae_fast.train import distributed
from tests.models.plain_mamo import SIZES

PAIRS, STEPS = 8, 3
SPLITS = {1: [8], 2: [3, 5], 4: [1, 3, 2, 2]}  # pairs of each process
MODELS = {
    "clip": (CLIP, EncodersConfig, {}),
    "mamo": (MAMO, MAMOConfig, {"itm_weight": 0.0}),
    "mamo with a queue": (
        MAMO,
        MAMOConfig,
        {"itm_weight": 0.0, "queue_size": 12, "soft_targets": 0.4, "soft_words": 0.4, "masking": "simultaneous"},
    ),
    "mamo with itm": (MAMO, MAMOConfig, {"queue_size": 12}),
}


@pytest.fixture(autouse=True)
def as_in_the_processes(threads):
    """One thread."""
    threads(1)


def make_batch(step, split):
    """What this process has of a step's pairs. Pairs 0 and 6 have the same image, 1 and 5 the same text, and text 2 is
    right for image 7; one process of several knows of no facts."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (PAIRS, 3, 16, 16), generator=generator, dtype=torch.uint8)
    texts = [torch.randint(0, 53, (n,), generator=generator, dtype=torch.int32) for n in (8, 2, 1, 7, 3, 2, 5, 4)]
    images[6], texts[5] = images[0], texts[1]
    facts, says = torch.zeros(PAIRS, 2, dtype=torch.int64), torch.zeros(PAIRS, 1, dtype=torch.int64)
    facts[7, 1] = facts[2, 0] = says[2] = 5
    rank = dist.get_rank() if len(split) > 1 else 0
    own = slice(sum(split[:rank]), sum(split[: rank + 1]))
    known = (
        {} if len(split) > 1 and own.stop < PAIRS and not facts[own].any() else {"facts": facts[own], "says": says[own]}
    )
    lengths, ids = [len(text) for text in texts[own]], list(range(PAIRS * step, PAIRS * step + PAIRS))[own]
    return ImageTextBatch(images[own], torch.cat(texts[own]), lengths, sample_ids=ids, **known)


def train(name, count, way=None):
    """(means over processes of the metrics of each step, parameters and buffers in full)."""
    torch.manual_seed(0)
    kind, config, options = MODELS[name]
    model = kind(config(**SIZES, **options))
    model.joined = count > 1
    shard = way == "FSDP2"
    called = distributed.spread(model, torch.device("cpu"), shard=shard, dtype=None, unused=not kind.ALL_GRADIENTS)
    assert isinstance(called, FSDPModule) == (shard and count > 1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        output = called(make_batch(step, SPLITS[count]), seed=0, step=step)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target()
        losses.append(distributed.mean(torch.stack([getattr(output, each).detach() for each in kind.METRICS])))
    state = {each: distributed.whole(value).detach() for each, value in model.state_dict().items()}
    return [dict(zip(kind.METRICS, each.tolist(), strict=True)) for each in losses], state


@functools.cache
def alone(name):
    return train(name, 1)


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["clip", "mamo", "mamo with a queue"])
def test_many_processes_are_one(processes, name, count, way):
    """Losses, parameters, moving averages and queues; processes that have more pairs and words count for more."""
    losses, state = alone(name)
    every = processes(count)(train, name, count, way)
    for step, wanted in enumerate(losses):
        watched = {each for each, metric in MODELS[name][0].METRICS.items() if metric.of == "watch"}
        for each in wanted.keys() - watched:
            found = every[0][0][step][each]
            assert found == pytest.approx(wanted[each], rel=1e-5, abs=1e-6), f"{each} of step {step}"
    for each, value in every[0][1].items():
        torch.testing.assert_close(value, state[each], rtol=1e-5, atol=1e-6, msg=lambda m, n=each: f"{n}: {m}")
        assert all(torch.equal(value, other[each]) for _, other in every), each


def test_itm_compares_the_pairs_of_a_process(processes):
    """ITC, which does not, is that of one process in the first step; queues stay in step."""
    (first, *_), _ = alone("mamo with itm")
    every = processes(2)(train, "mamo with itm", 2)
    assert every[0][0][0]["itc_loss"] == pytest.approx(first["itc_loss"], rel=1e-5)
    assert every[0][0][0]["itm_loss"] != pytest.approx(first["itm_loss"], rel=1e-3)
    assert every[0][1]["contrast.queued"] == STEPS * PAIRS
    for each in ("image_queue", "text_queue"):
        assert torch.equal(*(state[f"contrast.{each}"] for _, state in every))


def same_in_parts():
    batch = make_batch(0, SPLITS[2])
    return same_pairs(batch, None, meet(True, batch))


def test_pairs_of_other_processes_may_be_right(processes):
    batch = make_batch(0, SPLITS[1])
    wanted, _ = same_pairs(batch)
    assert wanted.sum() == PAIRS + 5
    parts = processes(2)(same_in_parts)
    assert torch.equal(torch.cat([of_images for of_images, _ in parts]), wanted)
    assert torch.equal(torch.cat([of_texts for _, of_texts in parts], 1), wanted)
