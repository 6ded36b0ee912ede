"""pretrain(): the same bits after any stop, and a clear word about everything that stops it."""

import errno
import math
import multiprocessing
import os
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import BadSample, Loader
from m3ae_fast.models import M3AE, OBJECTIVES, M3AEConfig
from m3ae_fast.train import Trainer, checkpoint, load_run, metrics, pretrain, trainer
from m3ae_fast.train import run as runs


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): call do() as step n (counted from 1) begins."""

    step = trainer.train_step

    def hook(number, do):
        def hooked(model, optimizer, micro_batches, config, done, *rest):
            if done + 1 == number:
                do()
            return step(model, optimizer, micro_batches, config, done, *rest)

        monkeypatch.setattr(trainer, "train_step", hooked)

    return hook


@pytest.fixture
def noisy(monkeypatch):
    """A model that draws random numbers, as one with dropout does."""
    forward = M3AE.forward

    def drawing(self, batch, **options):
        output = forward(self, batch, **options)
        output.loss = output.loss * (1 + 0.1 * torch.rand(()))
        return output

    monkeypatch.setattr(M3AE, "forward", drawing)


def fail():
    raise RuntimeError("the power went")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_it_is_the_same_run(train, rows, at_step, noisy, precision, workers):
    settings = {"precision": precision, "workers": workers}
    whole = train("whole", **settings)
    assert [row[0] for row in whole] == list(range(1, 13))
    assert all(math.isfinite(value) for row in whole for value in row)

    assert train("stopped", stop_after=5, **settings) == whole[:5]
    assert train("stopped", stop_after=6, resume=True, **settings) == whole[:6]
    assert train("stopped", resume=True, **settings) == whole

    at_step(9, fail)  # between checkpoints: steps 7 and 8 are taken again
    with pytest.raises(RuntimeError, match="the power went"):
        train("killed", checkpoint_every=3, **settings)
    assert len(rows("killed")) == 8
    at_step(0, fail)
    assert train("killed", resume=True, checkpoint_every=3, **settings) == whole


def test_the_model_too_is_the_same_to_the_bit(train, tmp_path):
    train("whole")
    train("stopped", stop_after=5)
    train("stopped", resume=True)
    whole, stopped = (load_run(tmp_path / out).model.state_dict() for out in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_what_changes_no_number_may_change_when_resuming(train):
    whole = train("whole")
    train("moved", stop_after=5)
    assert train("moved", resume=True, workers=1, checkpoint_every=2, strict=True, checkpoint_blocks=True) == whole


def test_random_numbers_of_a_step_do_not_depend_on_earlier_ones(train, at_step, noisy):
    """A picture, a data loader or the user may draw between two steps."""
    whole = train("whole")
    at_step(4, lambda: torch.rand(1000))
    assert train("drawn") == whole
    assert whole[0][1] != whole[0][2] + 0.5 * whole[0][3], "the model drew nothing: this test would show nothing"


def test_seeds_differ(train):
    assert train("a", steps=2, seed=1)[0][1] != train("b", steps=2, seed=2)[0][1]


def test_accumulating_is_a_larger_batch(train):
    large = train("large", steps=4, batch_size=4, lr=1e-3)
    small = train("small", steps=4, batch_size=2, accumulate=2, lr=1e-3)
    for a, b in zip(large, small, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_it_learns(train):
    losses = [row[1] for row in train(steps=30, batch_size=4)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_ctrl_c_stops_after_the_step_with_a_checkpoint(config, train, rows, tmp_path, at_step):
    whole = train("whole")
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)  # a shell's job in the background ignores it
    summary = pretrain(config(), tmp_path / "run", progress=False)
    assert summary.interrupted and summary.step == 4
    assert rows() == whole[:4]
    assert signal.getsignal(signal.SIGINT) is before
    at_step(0, fail)
    assert train(resume=True) == whole


def test_a_new_run_does_not_touch_an_old_one(train):
    train(steps=2)
    with pytest.raises(FileExistsError, match=r"run holds a run already: --resume continues it, another --out"):
        train(steps=2)


@pytest.mark.parametrize("resume", [False, "auto"])
def test_checkpoints_of_a_run_without_its_run_json_are_kept(train, tmp_path, resume):
    train(steps=2)
    (tmp_path / "run" / "run.json").rename(tmp_path / "run.json")
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(FileExistsError, match=r"run holds checkpoints, but no run.json: put it back, or choose"):
        train(steps=2, resume=resume)
    assert sorted((tmp_path / "run").rglob("*")) == before
    (tmp_path / "run.json").rename(tmp_path / "run" / "run.json")
    train(steps=2, resume=True)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="what is mapped is told by /proc")
def test_a_resumed_run_lets_go_of_its_checkpoint(train, at_step, tmp_path):
    train(stop_after=2, ema=0.9)
    mapped = []
    at_step(3, lambda: mapped.append("step-00000002" in Path("/proc/self/maps").read_text()))
    train(resume=True, stop_after=3, ema=0.9)
    assert mapped == [False]


def test_nothing_to_resume(train, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run holds no run to resume: .*with --resume auto, the run starts"):
        train(resume=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="resume must be one of False, True, 'auto', got 'maybe'"):
        train(resume="maybe")


def test_auto_starts_or_resumes(train):
    whole = train("whole")
    assert train(resume="auto", stop_after=5) == whole[:5]
    assert train(resume="auto") == whole


def test_a_finished_run_is_left_alone(train, config, tmp_path):
    whole = train(steps=3)
    summary = pretrain(config(steps=3), tmp_path / "run", resume=True, progress=False)
    assert (summary.step, summary.steps, summary.last) == (3, 3, {})
    assert train(steps=3, resume=True) == whole


def test_a_finished_run_may_be_given_more_steps(train, config, tmp_path):
    first = train(steps=4)
    with pytest.raises(ValueError, match=r"steps: 4 there, 3 asked for$"):
        train(steps=3, resume=True)
    both = train(steps=6, resume=True)
    assert both[:4] == first and len(both) == 6
    rates = [trainer.learning_rate(step, steps=6, warmup=0, peak=2e-3) for step in (4, 5)]
    assert [row[-1] for row in both[4:]] == rates
    assert train(steps=6, resume=True) == both, "it is of six steps now"
    with pytest.raises(ValueError, match=r"steps: 6 there, 4 asked for$"):
        train(steps=4, resume=True)


def test_stop_after_must_lie_ahead(train):
    train(stop_after=5)
    with pytest.raises(ValueError, match="stop_after must be more than the 5 steps already taken, got 5"):
        train(stop_after=5, resume=True)


def test_another_configuration_is_refused_by_field(train):
    train(stop_after=2)
    message = r"run.json is of another configuration: steps: 12 there, 20 asked for; batch_size: 2 there, 3 asked for$"
    with pytest.raises(ValueError, match=message):
        train(resume=True, steps=20, batch_size=3)


def test_a_checkpoint_of_another_run_is_refused(train, tmp_path):
    train("one", stop_after=2)
    train("two", stop_after=2, seed=1)
    path = checkpoint.latest(tmp_path / "one" / "checkpoints")
    path.write_bytes(checkpoint.latest(tmp_path / "two" / "checkpoints").read_bytes())
    with pytest.raises(ValueError, match=r"step-00000002.safetensors is of another configuration: seed: 1 there, 0"):
        train("one", resume=True)


def test_a_checkpoint_cut_short_is_named(train, rows, tmp_path):
    whole = train(stop_after=2)
    path = checkpoint.latest(tmp_path / "run" / "checkpoints")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"step-00000002.safetensors is not a whole checkpoint"):
        train(resume=True)
    assert rows() == whole, "nothing of the run may be touched by a resume that fails"


def test_a_disk_that_is_full_from_the_start_leaves_no_run(train, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"run/checkpoints/step-00000000.safetensors cannot be written"):
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run" / "run.json").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert len(train()) == 12, "once there is room, the same call works"


def test_decay_is_for_matrices_alone(config):
    model = M3AE(M3AEConfig.tiny(vocab_size=50))
    optimizer = trainer.make_optimizer(model, lr=1e-3, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert decayed | others == set(names.values()) and not decayed & others
    assert all(name.endswith(".weight") for name in decayed) and "text_head.weight" in decayed
    assert {"text_embedding.weight", "cls_token", "image_type", "text_mask_token", "text_head.bias"} <= others
    assert not any("norm" in name for name in decayed)


def test_photos_train_and_a_bad_one_is_counted(train, config, photos, tmp_path, counted_warnings):
    (photos / "1.jpg").write_bytes((photos / "1.jpg").read_bytes()[:300])
    (photos / "2.txt").write_text("many words " * 60)
    summary = pretrain(config(data=str(photos), steps=4), tmp_path / "run", progress=False)
    assert summary.counters["images_skipped"] > 0 and summary.counters["texts_cut"] > 0
    assert summary.counters["seen"] == 8
    assert [str(w.message) for w in counted_warnings if "1.jpg" in str(w.message)]


def test_strict_stops_at_a_bad_image(train, photos):
    (photos / "1.jpg").write_bytes(b"not an image")
    with pytest.raises(BadSample, match=r"1\.jpg"):
        train(data=str(photos), strict=True)


def test_images_without_captions_train_a_model_of_images_alone(train, photos, tmp_path):
    for path in photos.glob("*.txt"):
        path.unlink()
    assert len(train(data=str(photos), steps=2)) == 2
    run = load_run(tmp_path / "run")
    assert run.tokenizer is None and run.model.config.vocab_size == 0


def test_a_run_is_self_contained(train, photos, tmp_path):
    train(data=str(photos), steps=2)
    (tmp_path / "run").rename(tmp_path / "moved")
    for path in photos.iterdir():
        path.unlink()
    run = load_run(tmp_path / "moved")
    assert run.step == 2 and not run.model.training
    assert run.tokenizer.decode(run.tokenizer.encode("noise number")) == "noise number"
    assert load_run(checkpoint.latest(tmp_path / "moved" / "checkpoints")).step == 2


def test_a_tokenizer_of_another_run_is_refused(train, photos, tmp_path):
    train("one", steps=1)
    train("two", steps=1, data=str(photos))
    (tmp_path / "one" / "tokenizer.json").write_bytes((tmp_path / "two" / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"tokenizer.json has \d+ words, the model has \d+: it belongs to another run"):
        load_run(tmp_path / "one")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_driven_step_by_step_it_is_the_same_run(config, tmp_path, monkeypatch, objective):
    drawn = []
    monkeypatch.setattr(trainer, "draw_pictures", lambda folder, *_: drawn.append(folder))
    data = "cluttered" if objective == "supervised" else "shapes"
    settings = config(objective=objective, data=data, steps=4, picture_every=0)
    pretrain(settings, tmp_path / "whole", progress=False)
    driven = Trainer(settings, tmp_path / "driven")
    with driven:
        first = [driven.step() for _ in range(2)]
        driven.save()
    with driven:  # once more: it goes on
        driven.step()
        driven.save()
    with Trainer(settings, tmp_path / "driven", resume=True) as resumed:
        assert resumed.done == 3 and not resumed.stopping
        resumed.step()
        resumed.save()
        resumed.draw()
    logs = [metrics.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "driven")]
    assert logs[1][:2] == first
    for row in (*logs[0], *logs[1]):
        del row["tokens_per_second"]
    assert logs[0] == logs[1]
    assert drawn == [tmp_path / "whole", tmp_path / "driven"]
    saved = [checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints")) for name in ("whole", "driven")]
    assert all(torch.equal(value, saved[1].model[name]) for name, value in saved[0].model.items())


@pytest.mark.parametrize("method", ["step", "save", "draw"])
def test_what_needs_the_folder_says_so(config, tmp_path, method):
    closed = Trainer(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing is written before it is entered"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"{method} must be called inside `with trainer:`"):
            getattr(closed, method)()
        with closed, pytest.raises(RuntimeError, match="call run outside of `with trainer:`"):
            closed.run(progress=False)


def test_a_trainer_that_could_not_be_entered_takes_no_step(config, tmp_path):
    first, second = (Trainer(config(), tmp_path / "run") for _ in range(2))
    with first:
        with pytest.raises(BlockingIOError):
            second.__enter__()
        with pytest.raises(RuntimeError, match="step must be called inside"):
            second.step()


def test_there_is_no_step_after_the_last(config, tmp_path):
    with Trainer(config(steps=2), tmp_path / "run") as trained:
        rates = [trained.step()["lr"] for _ in range(2)]
        with pytest.raises(RuntimeError, match="the run has taken all of its 2 steps"):
            trained.step()
    assert rates == [trainer.learning_rate(step, steps=2, warmup=0, peak=2e-3) for step in range(2)]


@pytest.mark.parametrize(("most", "cut"), [(1e-3, True), (1e6, False), (0.0, False)])
def test_gradients_are_scaled_where_they_are_too_long_alone(config, tmp_path, most, cut, monkeypatch):
    scale, calls, norms = torch.nn.utils.clip_grads_with_norm_, [], []
    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", lambda *args: calls.append(args) or scale(*args))
    with Trainer(config(grad_clip=most), tmp_path / "run") as trained:
        trained.optimizer.register_step_pre_hook(
            lambda *_: norms.append(torch.nn.utils.get_total_norm(p.grad for p in trained.model.parameters()).item())
        )
        trained.step()
    assert (len(calls) == 1) == cut
    assert norms[0] == pytest.approx(most, rel=1e-2) if cut else norms[0] > 1e-2


def test_leaving_ends_the_data_workers(config, tmp_path):
    before = set(multiprocessing.active_children())
    with Trainer(config(workers=1), tmp_path / "run") as trained:
        trained.step()
        assert set(multiprocessing.active_children()) - before
    assert not set(multiprocessing.active_children()) - before


def test_a_run_goes_on_after_a_stop_in_the_same_trainer(config, tmp_path, at_step):
    stopped = Trainer(config(steps=6), tmp_path / "run")
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    first, rest = stopped.run(progress=False), stopped.run(progress=False)
    assert (first.step, first.interrupted) == (2, True) and (rest.step, rest.interrupted) == (6, False)
    assert rest.images == 2 * 4 and rest.tokens < 4 / 2 * 2 * first.tokens


def test_a_stop_before_the_first_step_leaves_a_checkpoint(config, tmp_path, monkeypatch):
    save, asked = checkpoint.save, []

    def asks(*arguments):
        if not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", asks)
    summary = pretrain(config(), tmp_path / "run", progress=False)
    assert (summary.step, summary.interrupted) == (1, True)
    assert pretrain(config(steps=12), tmp_path / "run", resume=True, progress=False).step == 12


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_a_warning(config, tmp_path, monkeypatch, error):
    def refused(*_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    with pytest.warns(M3AEFastWarning, match="on a file system without locks: make sure that no other process trains"):
        assert pretrain(config(steps=2), tmp_path / "run", progress=False).step == 2


def test_an_objective_of_ones_own(config, tmp_path, monkeypatch):
    class Mine(M3AE):
        """One of a user's script."""

    monkeypatch.setitem(OBJECTIVES, "mine", (Mine, M3AEConfig))
    pretrain(config(objective="mine", steps=2), tmp_path / "run", progress=False)
    assert type(load_run(tmp_path / "run").model) is Mine


def test_a_subclass_takes_the_steps_of_a_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)

    class Counting(Trainer):
        """Freezes the patch embedding, and counts."""

        seen = 0

        def build(self):
            super().build()
            self.model.patch_embed.requires_grad_(False)

        def step(self):
            self.seen += 1
            return super().step()

    counting = Counting(config(steps=3), tmp_path / "run")
    before = counting.model.patch_embed.proj.weight.clone()
    summary = counting.run(progress=False)
    assert counting.seen == summary.step == 3
    assert torch.equal(counting.model.patch_embed.proj.weight, before)


@pytest.mark.parametrize("objective", ["m3ae", "mae", "mamo"])
def test_a_step_takes_from_pinned_memory_alone(config, tmp_path, monkeypatch, pinned, objective):
    """What a step asks to have on its device is pinned: a GPU copies it while the host goes on."""
    settings = {"objective": objective, "steps": 2, "accumulate": 2, "picture_every": 0}
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)

    def losses(out):
        pretrain(config(**settings), tmp_path / out, progress=False)
        return [{**row, "tokens_per_second": 0} for row in metrics.read(tmp_path / out / "metrics.jsonl")]

    if objective == "mamo":  # ITM's pairs are made in the step
        settings |= {"batch_size": 4, "options": {"itm_weight": 0.0}}
    expected = losses("plain")
    step, to, moved = trainer.train_step, torch.Tensor.to, []

    def recorded(x, *args, **options):
        asks = "device" in options or any(isinstance(each, str | torch.device) for each in args)
        if asks and x.dim() and threading.current_thread() is threading.main_thread():  # scalars: norms of gradients
            moved.append(pinned(x) or not x.numel())
        return to(x, *args, **options)

    def watched(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", recorded)
            return step(*args)

    monkeypatch.setattr(trainer, "train_step", watched)
    monkeypatch.setattr(runs, "Loader", lambda *args, **options: Loader(*args, **options | {"pin_memory": True}))
    assert losses("pinned") == expected
    assert moved and all(moved)


def test_the_optimizer_is_fused_and_the_same_for_any_thread_count(threads):
    weights = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(0)
        model = torch.nn.Linear(1003, 401)
        optimizer = trainer.make_optimizer(model, lr=1e-3, weight_decay=0.05)
        assert optimizer.defaults["fused"]
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        weights.append(model.weight.detach())
    assert torch.equal(*weights)
