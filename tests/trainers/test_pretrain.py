"""pretrain() in two processes: the run of one, whichever way the model is spread; moved from one to the other."""

import contextlib
import functools
import os
import resource
import signal
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from m3ae_fast.models import M3AE
from m3ae_fast.train import (
    RunConfig,
    checkpoint,
    distributed,
    load_bad_step,
    load_run,
    metrics,
    precision,
    pretrain,
    run,
    sharded,
    trainer,
    validation,
)

NAMES = ("loss", "image_loss", "text_loss", "text_accuracy", "lr")
QUEUE = {"objective": "mamo", "options": {"itm_weight": 0.0, "queue_size": 6, "soft_targets": 0.4}}
MAMO_NAMES = ("loss", "mrm_loss", "mim_loss", "mlm_loss", "itc_loss", "mlm_accuracy", "lr")
WAYS = {"DDP": {}, "FSDP2": {"shard": True}}


def make_config(**changes):
    settings = {"steps": 6, "batch_size": 4, "image_size": 32, "device": "cpu", "picture_every": 0}
    return RunConfig(**(settings | changes))


def train(folder, resume=False, stop_after=None, sgd=False, loss_scale=None, **changes):
    """(summary, rows of metrics.jsonl) of a run, or of a part of it; in one process or as one of two.

    loss_scale: where it begins, in fp16 or any other precision; None: the CPU is left as it is, without one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LEARN_WORDS_FROM", 300)
        patch.setattr(validation, "SAMPLES", 10)
        patch.setattr(trainer, "draw_pictures", lambda *_: None)
        if sgd:
            patch.setattr(
                trainer, "make_optimizer", lambda model, lr, weight_decay: torch.optim.SGD(model.parameters())
            )
        if loss_scale is not None:
            scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale)
            patch.setattr(precision, "check", lambda *_: None)
            patch.setattr(precision, "loss_scaler", lambda *_: scaler)
        config = make_config(**changes)
        summary = pretrain(config, folder, resume=resume, stop_after=stop_after, progress=False)
    return summary, metrics.read(folder / "metrics.jsonl")


@pytest.fixture(autouse=True)
def as_in_the_pair(threads):
    """One thread."""
    threads(1)


@pytest.fixture
def alone(tmp_path):
    """alone(**changes): rows and weights of one process."""

    @functools.cache
    def of(settings):
        folder = tmp_path / f"alone{len(list(tmp_path.iterdir()))}"
        _, rows = train(folder, **dict(settings))
        return rows, load_run(folder).model.state_dict()

    return lambda **changes: of(tuple(sorted(changes.items())))


def assert_same(rows, expected, rtol=1e-5, names=NAMES):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    found, wanted = (torch.tensor([[row[name] for name in names] for row in each]) for each in (rows, expected))
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-6)


def distance(model, weights):
    """Of two models, as a share of the way that they went in training; not by element: a gradient that is 0 but for
    rounding (a key's bias) is worth a whole step to Adam."""
    torch.manual_seed(0)
    start = type(model)(model.config).state_dict()
    found = model.state_dict()
    squares = [((found[n] - w).square().sum(), (w - start[n]).square().sum()) for n, w in weights.items()]
    apart, went = (sum(each) for each in zip(*squares, strict=True))
    return (apart / went).sqrt().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulate": 2, "checkpoint_blocks": True, "ema": 0.9}],
    ids=["plain", "accumulated, checkpointed, averaged"],
)
def test_two_processes_are_one(pair, alone, tmp_path, way, changes):
    expected, weights = alone(**changes)
    (summary, rows), (other, _) = pair(functools.partial(train, **changes, **WAYS[way]), tmp_path / "two")
    assert_same(rows, expected)
    assert summary.last == rows[-1] and other.counters == summary.counters and other.step == summary.step == 6
    assert summary.counters["seen"] == 6 * 4 * changes.get("accumulate", 1)
    assert distance(load_run(tmp_path / "two").model, weights) < 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_of_the_same_size(pair, alone, tmp_path, way):
    """Adam, and clipping, would hide a sum in a mean's place."""
    changes = {"sgd": True, "lr": 0.02, "grad_clip": 0.0, "accumulate": 2}
    expected, weights = alone(**changes)
    (_, rows), _ = pair(functools.partial(train, **changes, **WAYS[way]), tmp_path / "two")
    assert_same(rows, expected)
    for name, value in load_run(tmp_path / "two").model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def sums(folder, **changes):
    """Of a run's passes, whether their gradients were summed over the processes."""
    summing, sharded, seen = distributed.summing_gradients, [], []

    @contextlib.contextmanager
    def watched(model, now):
        with summing(model, now):
            seen.append(sharded[-1] if sharded else model.require_backward_grad_sync)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "summing_gradients", watched)
        patch.setattr(FSDPModule, "set_requires_gradient_sync", lambda self, now: sharded.append(now))
        train(folder, **changes)
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_summed_once_a_step(pair, tmp_path, way):
    for seen in pair(functools.partial(sums, steps=2, accumulate=3, **WAYS[way]), tmp_path / "run"):
        assert seen == [False, False, True] * 2


@pytest.mark.parametrize("way", WAYS)
def test_bf16_stays_close(pair, alone, tmp_path, way):
    """Sharded parameters are rounded before they are gathered: LayerNorms and tokens, too."""
    expected, _ = alone(precision="bf16")
    (_, rows), _ = pair(functools.partial(train, precision="bf16", **WAYS[way]), tmp_path / "two")
    assert_same(rows, expected, rtol=5e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, rtol", [("fp32", 1e-5), ("fp16", 5e-3)])
def test_a_loss_scale_is_that_of_one_process(pair, alone, tmp_path, way, kind, rtol):
    changes = {"precision": kind, "loss_scale": 1024.0, "accumulate": 2, "steps": 4}
    expected, _ = alone(**changes)
    (_, rows), (other, _) = pair(functools.partial(train, **changes, **WAYS[way]), tmp_path / "two")
    assert_same(rows, expected, rtol=rtol)
    assert other.last["loss_scale"] == 1024.0


def overflowing(folder, **changes):
    """In the third step, the gradient of one number, which is the second process's share of a parameter."""
    forward, calls = M3AE.forward, []

    def steep(self, *args, **options):
        output = forward(self, *args, **options)
        calls.append(None)
        if len(calls) == 3:
            last = self.cls_token[-1]
            output.loss = output.loss + (last - last.detach()) * torch.finfo(torch.float32).max
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M3AE, "forward", steep)
        return train(folder, loss_scale=1024.0, **changes)


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_in_one_share_halves_the_scale_of_all(pair, tmp_path, way):
    (summary, rows), (other, _) = pair(functools.partial(overflowing, **WAYS[way]), tmp_path / "run")
    assert [row["bad_steps"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["loss_scale"] for row in rows] == [1024.0] * 3 + [512.0] * 3
    assert other.last["loss_scale"] == summary.last["loss_scale"] and other.bad_steps == 1


@pytest.mark.parametrize("way", WAYS)
def test_validation_is_shared_and_training_none_the_wiser(pair, alone, tmp_path, way):
    expected, weights = alone(ema=0.9, val_data="shapes", val_every=2)
    changes = {"ema": 0.9, "val_data": "shapes", "val_every": 2, **WAYS[way]}
    (_, rows), _ = pair(functools.partial(train, **changes), tmp_path / "two")
    assert_same(rows, expected)
    assert distance(load_run(tmp_path / "two").model, weights) < 1e-3
    names = [f"val_{name}" for name in NAMES[:4]]
    found, wanted = (
        torch.tensor([[row[name] for name in names] for row in each if "val_loss" in row]) for each in (rows, expected)
    )
    assert found.shape == (3, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_run_moves(pair, alone, tmp_path):
    """From one process to two, sharded, to one, to two that are not, each half-way to the next."""
    expected, weights = alone(ema=0.9)
    moved = tmp_path / "moved"
    train(moved, stop_after=1, ema=0.9)
    pair(functools.partial(train, resume=True, stop_after=3, ema=0.9, shard=True), moved)
    assert checkpoint.latest(moved / "checkpoints").name == "step-00000003"
    train(moved, resume=True, stop_after=4, ema=0.9)
    assert checkpoint.latest(moved / "checkpoints").name == "step-00000004.safetensors"
    pair(functools.partial(train, resume=True, stop_after=5, ema=0.9, shard=True), moved)
    (_, rows), _ = pair(functools.partial(train, resume=True, ema=0.9), moved)
    assert_same(rows, expected)
    assert distance(load_run(moved).model, weights) < 1e-3


def weights_and_checkpoint(folder):
    """What a sharded model holds when it is saved."""
    held, save = {}, checkpoint.save

    def watched(path, step, config, model, *rest):
        held.update({name: value.full_tensor() for name, value in model.state_dict().items()})
        save(path, step, config, model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", watched)
        train(folder, shard=True, stop_after=2)
    return held


def test_a_sharded_checkpoint_is_read_to_the_bit_and_verified(pair, tmp_path):
    held, _ = pair(weights_and_checkpoint, tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run" / "checkpoints")
    files = sorted(file.name for file in path.iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "m3ae_fast.json"]
    for which in (tmp_path / "run", path):
        found = load_run(which).model.state_dict()
        assert found.keys() == held.keys() and all(torch.equal(found[name], held[name]) for name in held)
    for name in files:
        whole = (path / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:]):
            (path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=r"step-00000002"):
                load_run(tmp_path / "run")
        (path / name).write_bytes(whole)
    header = (path / "m3ae_fast.json").read_text()
    (path / "m3ae_fast.json").write_text(header.replace('"step": 2', '"step": 3'))
    with pytest.raises(ValueError, match=r"step-00000002 is damaged: m3ae_fast.json was altered"):
        load_run(path)
    (path / "m3ae_fast.json").write_text(header)
    (path / "__1_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"step-00000002 is damaged: __1_0.distcp is missing or was altered"):
        load_run(path)


def attempt(*args, **changes):
    """The error that train() ends with in this process."""
    try:
        train(*args, **changes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_each_process_checks_its_files(pair, tmp_path):
    pair(functools.partial(train, shard=True, stop_after=1), tmp_path / "run")
    path = checkpoint.latest(tmp_path / "run" / "checkpoints") / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])
    found = pair(functools.partial(attempt, resume=True, shard=True), tmp_path / "run")
    assert all("step-00000001 is damaged: __1_0.distcp is missing or was altered" in each for each in found)


def on_a_full_disk(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        return attempt(folder, resume=True, shard=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_for_one_process_leaves_the_old_checkpoint(pair, tmp_path):
    pair(functools.partial(train, shard=True, stop_after=2), tmp_path / "run")
    for error in pair(on_a_full_disk, tmp_path / "run"):
        assert error.startswith("OSError: ") and "checkpoints/step-00000006 cannot be written: " in error
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000000", "step-00000002"], "nothing half-written"
    (summary, _), _ = pair(functools.partial(train, shard=True, resume=True), tmp_path / "run")
    assert summary.step == 6
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000002", "step-00000006"], "nor is anything half-written left"


def without_a_shared_folder(folder):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(sharded, "temporary_name", lambda _: folder.with_name("elsewhere"))
        return attempt(folder, shard=True)


def test_a_folder_that_not_all_processes_see_is_refused(pair, tmp_path):
    first, second = pair(without_a_shared_folder, tmp_path / "run")
    assert first.startswith("OSError: ") and second.startswith("FailedElsewhere: ")
    assert "step-00000000 cannot be written: __1_0.distcp of another process is not seen here; all must share" in first
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "elsewhere").exists()


def with_other_data(folder):
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(run, "open_data", lambda *_: range(3))
        return attempt(folder)


def test_other_data_in_one_process_is_refused_by_all(pair, tmp_path):
    for error in pair(with_other_data, tmp_path / "run"):
        assert error.startswith("ValueError: data must be the same in all processes, got [3, ")


def not_finite_in_one(folder, **changes):
    forward = M3AE.forward

    def broken(self, batch, *, seed, step):
        output = forward(self, batch, seed=seed, step=step)
        if step == 2 and dist.get_rank() == 1:
            output.loss = output.loss * torch.nan
        return output

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True):
        patch.setattr(M3AE, "forward", broken)
        return train(folder, **changes)


@pytest.mark.parametrize("way", WAYS)
def test_both_share_a_knn_probe(pair, alone, tmp_path, way):
    changes = {"data": "cluttered", "val_data": "cluttered", "knn_every": 2, "knn_samples": 16, "val_every": 0}
    expected, _ = alone(**changes)
    (_, rows), (other, _) = pair(functools.partial(train, **changes, **WAYS[way]), tmp_path / "two")
    found, wanted = (
        [(row["step"], row["knn_accuracy"], row["knn_chance"]) for row in each if "knn_accuracy" in row]
        for each in (rows, expected)
    )
    assert found == wanted and [step for step, *_ in found] == [2, 4, 6]
    assert other.last["knn_accuracy"] == rows[-1]["knn_accuracy"]


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(pair, tmp_path, way):
    (summary, rows), (other, _) = pair(functools.partial(not_finite_in_one, **WAYS[way]), tmp_path / "run")
    assert summary.bad_steps == other.bad_steps == 1 and summary.step == 6
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False, False]
    assert all(p.isfinite().all() for p in load_run(tmp_path / "run").model.parameters())
    parts = [load_bad_step(tmp_path / "run" / "bad_steps" / f"step-00000003-{rank}.safetensors") for rank in range(2)]
    assert [part.batches[0].sample_ids.tolist() for part in parts] == [[8, 9], [10, 11]]


def one_is_asked_to_stop(folder, **changes):
    step = trainer.train_step

    def asked(model, optimizer, micro_batches, config, done, *rest):
        if done == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, optimizer, micro_batches, config, done, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", asked)
        return train(folder, **changes)


@pytest.mark.parametrize("way", WAYS)
def test_asked_to_stop_one_stops_all(pair, alone, tmp_path, way):
    for summary, rows in pair(functools.partial(one_is_asked_to_stop, **WAYS[way]), tmp_path / "run"):
        assert summary.interrupted and summary.step == len(rows) == 3
    (_, rows), _ = pair(functools.partial(train, resume=True, **WAYS[way]), tmp_path / "run")
    assert_same(rows, alone()[0])


def test_what_fails_in_the_first_process_fails_in_all(pair, tmp_path):
    pair(functools.partial(train, stop_after=1), tmp_path / "run")
    first, second = pair(attempt, tmp_path / "run")
    assert first.startswith("FileExistsError: ") and "holds a run already" in first
    assert second.startswith("FailedElsewhere: the first process failed: FileExistsError: ")


def test_what_cannot_be_split_is_refused(pair, tmp_path):
    first, _ = pair(functools.partial(attempt, batch_size=3), tmp_path / "run")
    assert first.startswith("ValueError: batch_size must be a multiple of the 2 processes, got 3")
    assert not (tmp_path / "run").exists()


def warned(folder, **changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary, _ = train(folder, **changes)
    return [str(warning.message) for warning in caught], summary


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changes", "names"),
    [({"objective": "clip", "accumulate": 2}, ("loss", "image_accuracy", "text_accuracy", "lr")), (QUEUE, MAMO_NAMES)],
    ids=["CLIP, accumulated", "MAMO with a queue"],
)
def test_pairs_are_compared_with_those_of_all_processes(pair, tmp_path, way, changes, names):
    _, expected = train(tmp_path / "alone", **changes)
    (_, rows), _ = pair(functools.partial(train, **changes, **WAYS[way]), tmp_path / "two")
    assert_same(rows, expected, names=names)
    assert distance(load_run(tmp_path / "two").model, load_run(tmp_path / "alone").model.state_dict()) < 1e-3


def test_a_queue_moves(processes, tmp_path):
    """From one process to two, sharded, to four, which have a pair each."""
    _, expected = train(tmp_path / "alone", **QUEUE)
    moved = tmp_path / "moved"
    train(moved, stop_after=2, **QUEUE)
    processes(2)(functools.partial(train, resume=True, stop_after=4, shard=True, **QUEUE), moved)
    (_, rows), *_ = processes(4)(functools.partial(train, resume=True, **QUEUE), moved)
    assert_same(rows, expected, names=MAMO_NAMES)
    found, wanted = (load_run(folder).model.contrast for folder in (moved, tmp_path / "alone"))
    assert found.queued == wanted.queued == 24
    torch.testing.assert_close(found.image_queue, wanted.image_queue, rtol=1e-3, atol=1e-5)


def test_itm_says_that_it_compares_the_pairs_of_a_process(pair, tmp_path):
    said = "itm_loss of mamo compares the pairs that a process has, 2 of the 4 of a pass"
    for itm, count in (({}, 1), (QUEUE["options"], 0)):
        changes = {"steps": 1, "objective": "mamo", "options": itm}
        (first, summary), (second, _) = pair(functools.partial(warned, **changes), tmp_path / str(count))
        assert summary.step == 1 and not any("compares the pairs" in message for message in second)
        assert [said in message for message in first].count(True) == count


def pictures(folder):
    run.LEARN_WORDS_FROM = 300
    pretrain(make_config(shard=True, steps=2), folder, progress=False)


def test_a_sharded_model_is_drawn_too(pair, tmp_path):
    pair(pictures, tmp_path / "run")
    assert (tmp_path / "run" / "pictures" / "reconstruction-00000002.png").stat().st_size > 1000


def gathered_for_pictures(folder, objective):
    """How often the whole model was asked for, and what was kept of it in this process."""
    asked, gather = [], distributed.gather_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "gather_weights", lambda model: (asked.append(gather(model)), asked[-1])[1])
        warned(folder, shard=True, steps=2, objective=objective)
    return [len(weights) for weights in asked]


@pytest.mark.parametrize("objective", ["mae", "clip"])
def test_a_sharded_model_is_gathered_by_the_first_process_if_it_is_drawn(pair, tmp_path, objective):
    first, second = pair(gathered_for_pictures, tmp_path / "run", objective)
    if objective == "clip":
        assert first == second == []
    else:
        assert second == [0] and first == [len(load_run(tmp_path / "run").model.state_dict())]


def broadcasts():
    model = distributed.spread(torch.nn.BatchNorm1d(3), torch.device("cpu"), shard=False, dtype=None)
    return model.broadcast_buffers


def test_constant_buffers_are_not_sent_in_every_pass(pair):
    assert pair(broadcasts) == [False, False]
