"""A loss or a gradient that is not finite: the step is skipped, counted and kept, and the run goes on to the bit."""

import json
import math

import pytest
import torch

from m3ae_fast.models import M3AE, OBJECTIVES
from m3ae_fast.train import bad_steps, checkpoint, load_bad_step, load_run, metrics, pretrain, trainer


@pytest.fixture
def breaks(monkeypatch):
    """breaks(*steps, gradient=False): the loss of these steps, counted from 1, or only its gradient, is NaN."""
    forward = M3AE.forward

    def arrange(*steps, gradient=False):
        def broken(self, batch, *, seed, step):
            output = forward(self, batch, seed=seed, step=step)
            if step + 1 in steps:
                if gradient:
                    output.loss.register_hook(lambda grad: grad * math.nan)
                else:
                    output.loss = output.loss * math.nan
            return output

        monkeypatch.setattr(M3AE, "forward", broken)

    return arrange


def weights(folder):
    return load_run(folder).model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_bad_step_changes_nothing_and_the_next_goes_on(train, breaks, tmp_path, counted_warnings, gradient):
    breaks(5, gradient=gradient)
    train(steps=6, stop_after=4)
    before = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    train(steps=6, stop_after=5, resume=True)
    after = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert (before.step, before.bad_steps, after.step, after.bad_steps) == (4, (0, 0), 5, (1, 1))
    assert same(before.model, after.model)
    assert before.optimizer.keys() == after.optimizer.keys()
    assert all(same(before.optimizer[name], after.optimizer[name]) for name in before.optimizer)
    assert [str(w.message) for w in counted_warnings if "step 5 is not finite (loss" in str(w.message)]

    taken = train(steps=6, resume=True)
    breaks()
    assert taken[5] != train("healthy", steps=6)[5], "a step less was taken"
    assert not same(before.model, weights(tmp_path / "run")), "step 6 was taken"


def test_resumed_across_bad_steps_it_is_the_same_run(train, breaks, tmp_path, counted_warnings):
    breaks(2, 5, 6, 7, 11)
    whole = train("whole")
    assert train("stopped", stop_after=6) == whole[:6], "stopped in the midst of them"
    assert train("stopped", resume=True) == whole
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "stopped"))
    assert [row[1] is None for row in whole] == [i in (2, 5, 6, 7, 11) for i in range(1, 13)]


def test_rows_of_bad_steps_are_json_and_counted(train, config, breaks, tmp_path, counted_warnings):
    breaks(2, 3)
    summary = pretrain(config(steps=4), tmp_path / "run", progress=False)  # with its pictures
    assert summary.bad_steps == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and [row["bad_steps"] for row in rows] == [0, 1, 2, 2]
    assert rows[1]["loss"] is None and math.isfinite(rows[1]["image_loss"])
    again = pretrain(config(steps=4), tmp_path / "run", resume=True, progress=False)
    assert again.bad_steps == 2, "of the whole run"


@pytest.mark.parametrize("limit, last", [(0, 2), (2, 6)])
def test_too_many_in_a_row_end_the_run(train, rows, breaks, tmp_path, counted_warnings, limit, last):
    breaks(2, 4, 5, 6, 7)
    message = rf"step {last} is not finite \(loss nan.*\), and was not taken.*bad_steps.step-0000000{last}.safetensors"
    with pytest.raises(FloatingPointError, match=message):
        train(max_bad_steps=limit, checkpoint_every=1)
    assert len(rows()) == last - 1
    assert all(p.isfinite().all() for p in load_run(tmp_path / "run").model.parameters())
    with pytest.raises(FloatingPointError, match=f"step {last} is not finite"):
        train(max_bad_steps=limit, resume=True)  # the count goes on across a resume
    assert len(train(max_bad_steps=4, resume=True)) == 12
    assert [w for w in counted_warnings if "bad steps so far" in str(w.message)]


def test_a_bad_batch_comes_back_and_can_be_run_again(train, breaks, tmp_path, counted_warnings):
    breaks(4)
    settings = {"steps": 6, "accumulate": 2, "precision": "bf16"}
    train(stop_after=3, **settings)
    model = load_run(tmp_path / "run").model
    train(resume=True, **settings)
    bad = load_bad_step(tmp_path / "run" / "bad_steps" / "step-00000004.safetensors")
    assert (bad.step, bad.seed, bad.precision) == (4, 0, "bf16") and "step 4 is not finite (loss nan" in bad.reason
    assert [len(batch) for batch in bad.batches] == [2, 2]
    assert torch.cat([batch.sample_ids for batch in bad.batches]).tolist() == [12, 13, 14, 15]
    outputs = bad.replay(model)
    assert all(output.loss.isnan() for output in outputs)
    row = metrics.read(tmp_path / "run" / "metrics.jsonl")[3]
    assert row["loss"] is None
    assert row["image_loss"] == sum(output.image_loss / 2 for output in outputs).item(), "the very numbers"
    breaks()
    assert all(output.loss.isfinite() for output in bad.replay(model))


def test_a_batch_is_saved_as_the_loader_made_it(config, tmp_path):
    from m3ae_fast import ImageTextBatch

    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    mixed = ImageTextBatch(
        images, torch.tensor([3, 4, 5], dtype=torch.int32), [0, 1, 2], has_image=[True, False, True],
        sample_ids=[7, 2**40, 9], labels=torch.eye(3, dtype=torch.bool),
        facts=torch.ones(3, 4).long(), says=torch.eye(3).long(),
    )  # fmt: skip
    words = ImageTextBatch(None, torch.tensor([3, 4]), [1, 1], sample_ids=[1, 2])
    bad_steps.save_bad_step(tmp_path / "bad" / "b.safetensors", 9, config(seed=5), "why", [mixed, words])
    bad = load_bad_step(tmp_path / "bad" / "b.safetensors")
    for saved, batch in zip(bad.batches, [mixed, words], strict=True):
        for name in ("images", "text", "sample_ids", "labels", "facts", "says"):
            ours, theirs = getattr(saved, name), getattr(batch, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
        assert saved.has_image == batch.has_image and saved.text_lengths.lengths == batch.text_lengths.lengths
    assert bad.batches[0].images.stride() == images.stride(), "channels-last: the same kernels run"


def test_the_first_files_are_kept(train, breaks, tmp_path, monkeypatch, counted_warnings):
    monkeypatch.setattr(bad_steps, "KEPT", 2)
    breaks(1, 3, 5, 6)
    train(checkpoint_every=0)
    assert sorted(p.name[:13] for p in (tmp_path / "run" / "bad_steps").iterdir()) == ["step-00000001", "step-00000003"]
    assert "the batches of 2 others are in" in str(counted_warnings[-1].message)


def test_other_files_are_no_bad_steps(train, tmp_path):
    train(steps=1)
    path = checkpoint.latest(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"safetensors is a safetensors file, but not a bad step"):
        load_bad_step(path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cut is cut short or altered"):
        load_bad_step(tmp_path / "cut")
    with pytest.raises(FileNotFoundError, match="nowhere is not a bad step: no such file"):
        load_bad_step(tmp_path / "nowhere")


def test_a_momentum_network_and_its_queue_stay_as_they_were(config, tmp_path, monkeypatch, counted_warnings):
    """A forward pass fills the queue: one that fails must not leave its NaNs there."""
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)
    kind = OBJECTIVES["mamo"][0]
    forward = kind.forward

    def broken(self, batch, *, seed, step):
        output = forward(self, batch, seed=seed, step=step)
        if step == 2:
            self.contrast.image_queue.fill_(math.nan)
            output.loss = output.loss * math.nan
        return output

    monkeypatch.setattr(kind, "forward", broken)
    settings = config(objective="mamo", batch_size=4, steps=4, options={"queue_size": 8, "soft_targets": 0.4})
    pretrain(settings, tmp_path / "run", stop_after=2, progress=False)
    before = weights(tmp_path / "run")
    pretrain(settings, tmp_path / "run", resume=True, stop_after=3, progress=False)
    assert same(before, weights(tmp_path / "run")) and before["contrast.queued"] == 8
    assert pretrain(settings, tmp_path / "run", resume=True, progress=False).last["loss"] is not None
