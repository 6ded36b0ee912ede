"""DDP, FSDP2 and torch.distributed.checkpoint by two processes, against one process that sees all samples."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from m3ae_fast import ImageTextBatch
from m3ae_fast.models import M3AE, MAMO, M3AEConfig, MAMOConfig
from m3ae_fast.nn import Block, checkpoint_blocks

STEPS = 3
CROSS = {"decoder": "cross", "predict_ratio": 0.5}
MODELS = {"m3ae": (M3AE, M3AEConfig), "mamo": (MAMO, MAMOConfig)}


def make_model(name, **options):
    torch.manual_seed(0)
    model, config = MODELS[name]
    return model(config.tiny(vocab_size=101, image_size=32, width=64, **options))


def make_optimizer(model):
    """SGD: an Adam's first steps are signs, which would hide a gradient of the wrong size."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def make_batch(ids, kinds="pairs"):
    """Samples by their numbers in the data set; "mixed": images alone in one process, texts alone in the other."""
    images, words, has_image = [], [], []
    for number in ids:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8)
        length = int(torch.randint(2, 12, (1,), generator=generator))
        text = torch.randint(0, 101, (length,), generator=generator, dtype=torch.int32)
        has_image.append(not (kinds == "mixed" and number % 4 >= 2))
        if has_image[-1]:
            images.append(pixels)
        words.append(text[:0] if kinds == "mixed" and number % 4 < 2 else text)
    lengths = [len(text) for text in words]
    return ImageTextBatch(
        torch.stack(images) if images else None, torch.cat(words), lengths, has_image=has_image, sample_ids=list(ids)
    )


def ids_of(step, rank):
    """Two samples for each process."""
    return range(4 * step + 2 * rank, 4 * step + 2 * rank + 2)


def train(model, optimizer, batches, steps=range(STEPS), call=None):
    """Losses of the steps; batches(step) -> what this process computes in it, one after the other."""
    losses = []
    for step in steps:
        if hasattr(model, "update_target"):
            model.update_target()
        loss, parts = 0.0, batches(step)
        for batch in parts:
            out = (call or model)(batch, seed=0, step=step)
            (out.loss / len(parts)).backward()
            loss += out.loss.item() / len(parts)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses


@functools.cache
def alone(name, kinds="pairs", *, whole=False, steps=STEPS, **options):
    """(losses, parameters) of one process: the halves one after the other, or the whole batch at once."""
    model = make_model(name, **options)

    def batches(step):
        halves = [ids_of(step, rank) for rank in range(2)]
        return [make_batch([*halves[0], *halves[1]], kinds)] if whole else [make_batch(half, kinds) for half in halves]

    losses = train(model, make_optimizer(model), batches, range(steps))
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


def mean(value):
    """Over both processes."""
    value = torch.tensor(value)
    dist.all_reduce(value)
    return (value / 2).tolist()


def mine(kinds="pairs"):
    return lambda step: [make_batch(ids_of(step, dist.get_rank()), kinds)]


def full(state):
    """A state dict of whole tensors."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def assert_same_run(found, expected, rtol=1e-5, atol=1e-6):
    for losses, state in found:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[0]), rtol=rtol, atol=atol)
        assert state.keys() == expected[1].keys()
        for name, value in state.items():
            torch.testing.assert_close(
                value, expected[1][name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


# -- DDP -------------------------------------------------------------------------------------------------------------


def ddp(name, kinds, options, settings):
    model = make_model(name, **options)
    wrapped = DistributedDataParallel(model, **settings)
    losses = train(model, make_optimizer(model), mine(kinds), call=wrapped)
    return mean(losses), {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("kinds", "options"), [("pairs", {}), ("mixed", {}), ("mixed", CROSS)])
def test_ddp_of_m3ae_is_one_process_with_all_samples(pair, kinds, options):
    """Masks are keyed by the samples' numbers. "mixed": one process has no text, the other no image."""
    found = pair(ddp, "m3ae", kinds, options, {})
    assert_same_run(found, alone("m3ae", kinds, whole=True, **options))
    assert_same_run(found, alone("m3ae", kinds, **options))


@pytest.mark.parametrize("loss", ["text", "image"])
def test_ddp_of_m3ae_with_a_loss_of_weight_0(pair, loss):
    """A weight of 0 is a gradient of 0, not none: DDP needs no find_unused_parameters."""
    options = {f"{loss}_loss_weight": 0.0}
    assert_same_run(pair(ddp, "m3ae", "pairs", options, {}), alone("m3ae", whole=True, **options))


def test_ddp_of_mamo_is_the_mean_of_both_halves(pair):
    """Not of one process with all samples: ITC and ITM compare the samples that a process sees."""
    assert_same_run(pair(ddp, "mamo", "pairs", {}, {}), alone("mamo"))


@pytest.mark.parametrize(("name", "kinds"), [("m3ae", "mixed"), ("mamo", "pairs")])
def test_ddp_with_a_static_graph(pair, name, kinds):
    """DDP looks for the loss in the output then, and adds up nothing where it finds none."""
    assert_same_run(pair(ddp, name, kinds, {}, {"static_graph": True}), alone(name, kinds))


def test_ddp_of_a_mamo_without_a_loss(pair):
    """What is of a loss of weight 0 has no gradient: DDP must be told."""
    options = {"mim_weight": 0.0}
    assert_same_run(pair(ddp, "mamo", "pairs", options, {"find_unused_parameters": True}), alone("mamo", **options))


# -- FSDP2 -----------------------------------------------------------------------------------------------------------


def sharded(name, options, device="cpu", **settings):
    """A model whose blocks are sharded one by one, what is left of it as a whole."""
    with torch.device(device):
        model = make_model(name, **options)
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)), **settings)
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)), **settings)


def fsdp(name, kinds, checkpointed, options):
    model = sharded(name, options)
    checkpoint_blocks(model, checkpointed)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    losses = train(model, make_optimizer(model), mine(kinds))
    return mean(losses), full(model.state_dict())


@pytest.mark.parametrize(
    ("name", "kinds", "checkpointed", "options"),
    [
        ("m3ae", "pairs", False, {}),
        ("m3ae", "mixed", True, {}),
        ("m3ae", "mixed", True, CROSS),
        ("mamo", "pairs", False, {}),
        ("mamo", "pairs", True, {}),
    ],
)
def test_fsdp_is_one_process(pair, name, kinds, checkpointed, options):
    assert_same_run(pair(fsdp, name, kinds, checkpointed, options), alone(name, kinds, **options))


def deferred(name):
    """Made on the meta device, sharded there, then given memory and weights; initialized by itself, then trained."""
    model = sharded(name, {}, "meta").to_empty(device="cpu")
    model.reset_parameters()
    start = {name: p.isfinite().all().item() for name, p in full(model.state_dict()).items()}
    positions = dict(model.named_buffers())
    model = sharded(name, {}, "meta").to_empty(device="cpu")
    weights = make_model(name).state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    losses = train(model, make_optimizer(model), mine())
    return start, positions, (mean(losses), full(model.state_dict()))


@pytest.mark.parametrize("name", ["m3ae", "mamo"])
def test_fsdp_of_a_model_made_on_the_meta_device(pair, name):
    found = pair(deferred, name)
    for start, positions, _ in found:
        assert all(start.values())
        for name_, table in make_model(name).named_buffers():
            assert torch.equal(positions[name_], table), name_
    assert_same_run([run for _, _, run in found], alone(name))


def gathers(name):
    """How often each block was gathered and let go in a step: its hooks fire."""
    model = sharded(name, {})
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    seen = []
    for number, block in enumerate(blocks):
        block.mlp.register_forward_pre_hook(
            lambda module, _, number=number: seen.append((number, isinstance(module.fc1.weight, DTensor)))
        )
    loss = model(make_batch(ids_of(0, dist.get_rank())), seed=0).loss
    resharded = [isinstance(block.mlp.fc1.weight, DTensor) for block in blocks]
    loss.backward()
    return seen, resharded


def test_fsdp_gathers_a_block_for_as_long_as_it_runs(pair):
    for seen, resharded in pair(gathers, "m3ae"):
        assert seen == [(number, False) for number in range(4)]  # two of the encoder, two of the decoder
        assert all(resharded)


def encode(name):
    model = sharded(name, {})
    register_fsdp_forward_method(model, "encode")
    with torch.no_grad():
        return model.encode(make_batch(range(2))).cls


def test_fsdp_of_other_methods_than_forward(pair):
    """FSDP2 must be told of them: they read parameters of the root, too."""
    expected = make_model("m3ae").encode(make_batch(range(2))).cls
    for cls in pair(encode, "m3ae"):
        torch.testing.assert_close(cls, expected)


def fsdp_in_bf16(name):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(name, {}, mp_policy=policy)
    losses = train(model, make_optimizer(model), mine())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return mean(losses)


@pytest.mark.parametrize("name", ["m3ae", "mamo"])
def test_fsdp_in_bf16_stays_close(pair, name):
    expected, _ = alone(name)
    for losses in pair(fsdp_in_bf16, name):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=3e-2, atol=0)
        assert losses != expected


# -- torch.distributed.checkpoint ------------------------------------------------------------------------------------


def state_of(model, optimizer):
    names = ("model", "optimizer")
    return dict(zip(names, get_state_dict(model, optimizer), strict=True))


def load(model, optimizer, folder, **settings):
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder, **settings)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def first_half(name, folder):
    model = sharded(name, {})
    optimizer = make_optimizer(model)
    losses = train(model, optimizer, mine(), range(1))
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    return mean(losses)


def last_step(name, folder):
    model = sharded(name, {})
    optimizer = make_optimizer(model)
    load(model, optimizer, folder)
    return mean(train(model, optimizer, mine(), range(2, 3)))


@pytest.mark.parametrize("name", ["m3ae", "mamo"])
def test_a_checkpoint_goes_from_two_processes_to_one_and_back(pair, name, tmp_path):
    expected, _ = alone(name)
    losses = pair(first_half, name, tmp_path / "two")[0]
    model = make_model(name)
    optimizer = make_optimizer(model)
    load(model, optimizer, tmp_path / "two", no_dist=True)
    halves = lambda step: [make_batch(ids_of(step, rank)) for rank in range(2)]  # noqa: E731
    losses += train(model, optimizer, halves, range(1, 2))
    dcp.save(state_of(model, optimizer), checkpoint_id=tmp_path / "one", no_dist=True)
    losses += pair(last_step, name, tmp_path / "one")[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
