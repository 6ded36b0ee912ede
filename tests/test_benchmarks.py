"""What the benchmarks do on a GPU, as far as it shows without one."""

import json
import runpy
import types

import pytest
import torch

import m3ae_fast
from benchmarks import measure, probe, report
from m3ae_fast import SeqLens, _backends, testing
from m3ae_fast.testing import Call


class Stub:
    """In the place of pytest-benchmark's fixture, and of torch.cuda.Event: it notes what is asked of it, in order."""

    asked: list[str]

    def __init__(self, **options):
        self.extra_info, self.options = {}, options

    def pedantic(self, run, **options):
        run()

    def record(self):
        self.asked.append("record")

    def synchronize(self):
        self.asked.append("wait")

    def elapsed_time(self, end):
        return 2.0


@pytest.fixture
def gpu(monkeypatch):
    """measure, as on a GPU: events are stubs, and its tensors stay on the CPU. Returns what is asked of the GPU."""
    asked = Stub.asked = []
    monkeypatch.setattr(measure, "SETTINGS", measure.Settings(smoke=True, device="cuda"))
    monkeypatch.setattr(measure, "ROWS", [])
    monkeypatch.setattr(measure, "MISSING", {})
    monkeypatch.setattr(measure, "large", lambda: torch.ones(8))
    monkeypatch.setattr(torch.cuda, "Event", Stub)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("idle"))
    return asked


def test_events_enclose_the_run_on_an_idle_gpu(gpu):
    assert measure.milliseconds(gpu.append, "run") == 2.0
    assert gpu == ["idle", "record", "run", "record", "wait"]


def test_a_peer_that_cannot_run_is_left_out_and_named(gpu, tmp_path, monkeypatch):
    def absent(i):
        raise ModuleNotFoundError("No module named 'flash_attn'\nmore")

    peers = {"m3ae_fast": lambda i: i, "there": lambda i: i, "absent": absent}
    rows = measure.compare(Stub(), "op", "case", peers)
    measure.compare(Stub(), "op", "other", peers)
    assert list(rows) == ["m3ae_fast", "there"] and rows["there"].ratio == 1.0
    line = "not measured: absent: ModuleNotFoundError: No module named 'flash_attn' (2: op case, op other)"
    assert report.missing() == [line]

    monkeypatch.setattr(report, "machine", lambda: {"GPU": "a stub"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a stub")
    report.write(tmp_path / "tables" / "gpu.md", measure.ROWS, "pytest")
    text = (tmp_path / "tables" / "gpu.md").read_text()
    assert text.startswith("# Measured on a stub\n") and f"- {line}\n" in text
    missing = json.loads((tmp_path / "tables" / "gpu.json").read_text())["missing"]
    assert [(each["peer"], each["where"]) for each in missing] == [("absent", ["op case", "op other"])]


def test_our_own_failure_is_raised(gpu):
    def broken(i):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        measure.compare(Stub(), "op", "case", {"m3ae_fast": broken, "there": lambda i: i})


def test_on_a_cpu_a_failing_peer_is_raised():
    def broken(i):
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"):
        measure.compare(Stub(), "op", "case", {"m3ae_fast": lambda i: i, "broken": broken})


def test_a_call_moves_whole():
    """Tensors of any dtype, those in containers, and SeqLens; leaves stay leaves, and a copy shares no memory."""
    leaf, lens = torch.ones(5, 2, requires_grad=True), SeqLens([2, 3])
    call = Call((leaf, [torch.arange(5)], lens), {"mask": torch.ones(5) > 0, "size": 2})
    moved = call.on("meta")
    assert all(x.device.type == "meta" for x in moved.tensors()) and len(moved.tensors()) == 4
    assert moved.args[2].device.type == "meta" and moved.args[2].lengths == lens.lengths
    assert moved.leaves() == [moved.args[0]] and moved.args[0].is_leaf and moved.kwargs["size"] == 2
    copied = call.on("cpu")
    assert copied.args[0].data_ptr() != leaf.data_ptr() and torch.equal(copied.args[0], leaf)


@pytest.mark.parametrize("error", [0.0, 0.1])
def test_the_cuda_kernels_are_timed_where_they_are_right(gpu, monkeypatch, error):
    def op(x, *, impl=None):
        return 2 * x + (error if impl == "cuda" else 0)

    monkeypatch.setitem(_backends.LOADED, "op", types.SimpleNamespace(modules={"cuda": None}))
    rows = measure.compare_op(Stub(), "op", "case", [Call((torch.ones(3),))], "forward", {"m3ae_fast": op, "there": op})
    assert list(rows) == ["m3ae_fast", "there"] + ["m3ae_fast, cuda"] * (not error)
    missing = [f"{peer}: {reason}" for peer, reason in measure.MISSING]
    assert [line.startswith("m3ae_fast, cuda: AssertionError: output 0: error") for line in missing] == [True] * bool(
        error
    )


def test_normal_numbers_are_drawn_where_they_are_measured(monkeypatch):
    cases = testing.cases("varlen_attention")
    there = measure.make(cases, "small")
    monkeypatch.setattr(measure, "SETTINGS", measure.Settings(device="meta"))
    call = measure.make(cases, "small")
    drawn = {x.device.type for x in call.tensors() if x.is_floating_point()}
    assert drawn == {"meta"} and call.args[3].device.type == "cpu"
    assert [(x.shape, x.dtype, x.requires_grad) for x in call.tensors()] == [
        (x.shape, x.dtype, x.requires_grad) for x in there.tensors()
    ]


@pytest.fixture
def options(tmp_path):
    """Of the probe, which notes its results in a file: options.noted() reads it."""
    path = tmp_path / "probe.jsonl"
    noted = lambda: [json.loads(line) for line in path.read_text().splitlines()]  # noqa: E731
    return types.SimpleNamespace(device="cpu", cases="first", json=path, limit=9.0, noted=noted)


def test_the_probe_says_at_once_what_fails(options, monkeypatch, capsys):
    impl = testing.impls("restore_tokens")[0]
    assert probe.probe("restore_tokens", impl, "float32", options)
    op = m3ae_fast.restore_tokens
    monkeypatch.setattr(
        m3ae_fast, "restore_tokens", lambda *a, impl, **k: op(*a, **k, impl=impl) * (2 if impl != "reference" else 1)
    )
    assert not probe.probe("restore_tokens", impl, "float32", options)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"PASS restore_tokens {impl} float32 small (")
    assert lines[1].startswith(f"FAIL restore_tokens {impl} float32 small (") and "output 0: error" in lines[1]
    assert [bool(each["failure"]) for each in options.noted()] == [False, True]


def test_a_process_that_dies_fails_and_takes_no_other_with_it(options, monkeypatch):
    statuses = iter([-11, probe.FAILED, 0])
    monkeypatch.setattr(probe.subprocess, "run", lambda *a, **k: types.SimpleNamespace(returncode=next(statuses)))
    assert [probe.in_a_process("linear", "triton", "float32", options) for _ in range(3)] == [False, False, True]
    assert [each["failure"] for each in options.noted()] == ["the process ended: -11"]


@pytest.mark.parametrize("name", ["cost", "growth"])
def test_a_command_without_its_argument_says_what_it_wants(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name])
    with pytest.raises(SystemExit, match=r"^2$"):
        runpy.run_path(f"{measure.__file__.removesuffix('measure.py')}{name}.py", run_name="__main__")
    assert f"usage: python -m benchmarks.{name} [-h] " in capsys.readouterr().err
