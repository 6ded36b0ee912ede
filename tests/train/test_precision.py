"""fp16 with its loss scale, on a CPU that is let do it; what is refused, and what is warned of."""

import math

import pytest
import torch

from m3ae_fast import M3AEFastWarning, _cpp
from m3ae_fast.models import M3AE
from m3ae_fast.train import checkpoint, load_run, metrics, precision, pretrain

CPU = torch.device("cpu")


@pytest.fixture
def scales(monkeypatch):
    """scales(**options): runs have a GradScaler with these options, whatever their precision, fp16 on the CPU too."""

    def enable(**options):
        monkeypatch.setattr(precision, "check", lambda *_: None)
        monkeypatch.setattr(precision, "loss_scaler", lambda *_: torch.amp.GradScaler("cpu", **options))

    return enable


def column(folder, name):
    return [row.get(name) for row in metrics.read(folder / "metrics.jsonl")]


def test_fp16_is_refused_on_a_cpu(config, tmp_path):
    with pytest.raises(ValueError, match=r"^precision must be fp32 or bf16 on a CPU, .*, got fp16$"):
        pretrain(config(precision="fp16"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_cpu_without_bf16_is_warned_of_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(_cpp, "multiplies_bf16", lambda: False)
    with pytest.warns(M3AEFastWarning, match="bf16 saves no time on this CPU, .*--precision fp32") as caught:
        pretrain(config(precision="bf16", steps=2), tmp_path / "run", progress=False)
    assert len(caught) == 1
    pretrain(config(steps=1), tmp_path / "other", progress=False)  # fp32: the warning would be an error


@pytest.mark.parametrize(
    ("isas", "expected"),
    [(["scalar"], False), (["scalar", "avx2", "avx512"], False), (["scalar", "avx2", "avx512_bf16"], True)],
)
def test_an_instruction_set_says_whether_bf16_is_multiplied(monkeypatch, isas, expected):
    monkeypatch.setattr(_cpp, "_C", type("_C", (), {"available_isas": lambda: isas}))
    assert _cpp.multiplies_bf16() == expected


@pytest.mark.parametrize("name, dtype", precision.DTYPES.items())
def test_autocast(name, dtype):
    with precision.autocast(name, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


def test_only_fp16_is_scaled():
    assert [name for name in precision.DTYPES if precision.loss_scaler(name, CPU).is_enabled()] == ["fp16"]


def test_a_scale_alone_changes_no_bit(train, scales, tmp_path):
    """A power of two, in fp32: gradients are unscaled before they are clipped, once for all passes of a step."""
    settings = {"steps": 6, "accumulate": 2, "grad_clip": 0.05}
    plain = train("plain", **settings)
    scales()
    assert train("scaled", **settings) == plain
    plain, scaled = (load_run(tmp_path / name).model.state_dict() for name in ("plain", "scaled"))
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)
    assert column(tmp_path / "scaled", "loss_scale") == [65536.0] * 6
    assert column(tmp_path / "plain", "loss_scale") == [None] * 6


def test_fp16_follows_fp32_and_resumes(train, scales, tmp_path):
    exact = train("exact")
    scales(init_scale=256.0, growth_interval=3)
    whole = train("whole", precision="fp16")
    assert [row[1] for row in whole] == pytest.approx([row[1] for row in exact], rel=5e-3) and whole != exact
    assert column(tmp_path / "whole", "loss_scale") == [256.0 * 2 ** (step // 3) for step in range(12)]
    train("stopped", precision="fp16", stop_after=5)  # in the midst of three good steps
    assert train("stopped", precision="fp16", resume=True) == whole
    assert column(tmp_path / "stopped", "loss_scale") == column(tmp_path / "whole", "loss_scale")
    whole, stopped = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_an_overflow_is_a_bad_step_and_halves_the_scale(train, scales, tmp_path, counted_warnings):
    scales(init_scale=2.0**24)
    train("run", precision="fp16", steps=20, stop_after=3, max_bad_steps=20)
    folder = tmp_path / "run"
    assert column(folder, "bad_steps") == [1, 2, 3]
    assert column(folder, "loss_scale") == [2.0**24, 2.0**23, 2.0**22]
    assert all(map(math.isfinite, column(folder, "loss"))), "the loss itself is not scaled"
    assert "loss_scale 1.678e+07, gradient norm" in str(counted_warnings[0].message)
    before = checkpoint.load(checkpoint.latest(folder / "checkpoints"))
    assert (before.bad_steps, before.loss_scale["scale"]) == ((3, 3), 2.0**21) and not before.optimizer

    train("run", precision="fp16", steps=20, resume=True, max_bad_steps=20)
    after = checkpoint.load(checkpoint.latest(folder / "checkpoints"))
    bad = column(folder, "bad_steps")[-1]
    assert 3 < bad < 20 and after.loss_scale["scale"] == 2.0 ** (24 - bad)
    taken = {int(moments["step"]) for moments in after.optimizer.values()}
    assert taken == {20 - bad}, "steps that were skipped are no steps of AdamW"


def test_other_runs_keep_no_scale(train, tmp_path):
    train(steps=1)
    assert checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints")).loss_scale == {}


def test_a_bad_step_of_fp16_is_computed_again_in_fp16(train, scales, tmp_path, monkeypatch, counted_warnings):
    from m3ae_fast.train import load_bad_step

    scales(init_scale=2.0**24)
    train(precision="fp16", steps=1)
    bad = load_bad_step(tmp_path / "run" / "bad_steps" / "step-00000001.safetensors")
    dtypes, forward = [], M3AE.forward

    def watched(self, *args, **options):
        dtypes.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return forward(self, *args, **options)

    monkeypatch.setattr(M3AE, "forward", watched)
    (output,) = bad.replay(load_run(tmp_path / "run").model)
    assert bad.precision == "fp16" and dtypes == [torch.float16]
    assert output.loss.item() == column(tmp_path / "run", "loss")[0]
