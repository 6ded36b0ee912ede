"""The recorded choice of attention's backend: what counts, what is refused, and how a record is made."""

import json

import pytest
import torch

from benchmarks import choose
from m3ae_fast import SeqLens, _backends, varlen_attention, varlen_attention_qkvpacked
from m3ae_fast.ops.varlen_attention import choice
from m3ae_fast.ops.varlen_attention.op import BACKENDS

ROWS = [(64, 128, "triton"), (64, 81, "cuda"), (80, 81, "triton")]
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS.modules, reason="the compiled module is missing")


@pytest.fixture
def recorded(monkeypatch):
    """A record of this CPU: cpp for heads of up to 64 channels and up to 81 tokens; elsewhere the reference runs."""
    monkeypatch.setattr(_backends, "PREFERENCE", {})
    monkeypatch.setattr(BACKENDS, "picked", {})
    monkeypatch.setattr(choice, "RECORDS", {"cpu": {"rows": ((64, 81, "cpp"),)}})


def q(width):
    return torch.zeros(4, 2, width)


@needs_cpp
def test_the_first_row_that_covers_a_call_counts(recorded, monkeypatch):
    assert choice.pick(BACKENDS, None, q(64), 81, 81) == "cpp"
    assert choice.pick(BACKENDS, None, q(64), 81, 82) == "reference"
    assert choice.pick(BACKENDS, None, q(65), 81) == "reference"
    assert choice.pick(BACKENDS, None, q(64), None, None) == "reference"  # lengths that nobody said
    assert choice.pick(BACKENDS, None, q(64).half(), 81) == "reference"  # which cpp cannot run
    assert choice.pick(BACKENDS, "reference", q(64), 81) == "reference"
    monkeypatch.setattr(_backends, "_FORCED", "reference")
    assert choice.pick(BACKENDS, None, q(64), 81) == "reference"


@needs_cpp
def test_a_forced_backend_takes_the_place_of_records(recorded, monkeypatch):
    monkeypatch.setattr(choice, "FORCED", "cuda")
    monkeypatch.setattr(choice, "RECORDS", {})
    assert choice.pick(BACKENDS, None, q(64), 81) == "reference"  # the CUDA kernels do not run here
    assert choice.remarks() == ["M3AE_FAST_ATTENTION=cuda"]
    monkeypatch.setattr(choice, "CHOICES", ("cpp",))
    monkeypatch.setattr(choice, "FORCED", "cpp")
    assert choice.pick(BACKENDS, None, q(512), 4096) == "cpp"


@needs_cpp
def test_the_op_and_its_packed_form_ask_with_their_longest_length(recorded):
    tokens = torch.randn(90, 3, 2, 8, requires_grad=True)
    short, long = SeqLens([45, 45]), SeqLens([8, 82])
    for lens, kernels in ((short, True), (long, False)):
        parts = tokens.unbind(1)
        packed = varlen_attention_qkvpacked(tokens, lens)
        for out in (packed, varlen_attention(*parts, lens), varlen_attention(*parts, lens, lens)):
            assert type(out.grad_fn).__name__.startswith("_VarlenAttention") is kernels, lens.lengths


@needs_cpp
def test_compiled_code_chooses_as_eager_code_does(recorded):
    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def choose_by(x, longest):
        return x + (choice.pick(BACKENDS, None, x, longest) == "cpp")

    for longest in (50, 60, 81, 82, 500):
        assert bool((choose_by(q(64), longest) == (longest <= 81)).all()), longest


def test_a_gpu_is_asked_for_its_capability_outside_of_what_is_compiled(monkeypatch):
    def capability(device):
        torch._dynamo.graph_break()  # an error, if this were traced
        return 9, 0

    monkeypatch.setattr(choice, "_CAPABILITIES", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)

    @torch.compile(backend="eager", fullgraph=True)
    def on_hopper(x):
        return x + (choice._architecture(torch.device("cuda", 0)) == "sm_90")

    assert on_hopper(torch.zeros(1)) == 1


def table(**cuda):
    """Of a benchmark: at 81 x 64 Triton's quartiles are 1.0 and 1.1, those of cuda as given."""
    times = {"m3ae_fast": (1.0, 1.1), "m3ae_fast, cuda": cuda.get("quartiles"), "FlashAttention-2": (0.1, 0.1)}
    rows = [
        {"op": f"varlen_attention {mode}", "case": case, "provider": provider, "quartiles_ms": quartiles}
        for mode in ("forward", "forward+backward")
        for case in ("81 x 64 bf16", "m3ae_small_encoder x 256 bf16")
        for provider, quartiles in times.items()
        if quartiles is not None
    ]
    return {"machine": {"GPU": "NVIDIA H200, sm_90, 132 multiprocessors", "date": "2026-01-01"}, "rows": rows}


@pytest.mark.parametrize(("quartiles", "best"), [((0.8, 0.9), "cuda"), ((0.9, 1.0), "triton"), ((2.0, 2.0), "triton")])
def test_cuda_is_chosen_where_it_is_clearly_faster(quartiles, best, tmp_path, monkeypatch, capsys):
    (tmp_path / "gpu_attention.json").write_text(json.dumps(table(quartiles=quartiles)))
    monkeypatch.setattr("sys.argv", ["choose", str(tmp_path / "gpu_attention.json"), str(tmp_path)])
    choose.main()
    assert f"up to 64 channels, up to 81 tokens: {best}" in capsys.readouterr().out
    record = choice.read(tmp_path / "sm_90.json")
    assert record["architecture"] == "sm_90" and record["rows"] == ((64, 81, best),)
    monkeypatch.setattr(choice, "RECORDS", {"sm_90": record})
    assert choice.remarks() == ["by shape on sm_90, as measured on NVIDIA H200, sm_90, 132 multiprocessors, 2026-01-01"]


def test_a_table_without_cuda_makes_no_record():
    with pytest.raises(ValueError, match="forward and backward pass by both backends on a GPU"):
        choose.record(table())


def test_rows_are_sorted_as_they_count(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"architecture": "sm_90", "rows": ROWS}))
    assert choice.read(path)["rows"] == ((64, 81, "cuda"), (64, 128, "triton"), (80, 81, "triton"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"architecture": "sm_90", "rows": [[64, 81, "fastest"]]}'])
def test_what_is_no_record_is_refused_by_name(text, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"record\.json is no record of benchmarks\.choose"):
        choice.read(path)


def test_the_environment_must_name_a_backend_or_a_record(python):
    refused = python("import m3ae_fast", M3AE_FAST_ATTENTION="flash")
    assert refused.returncode and "flash is no record of benchmarks.choose: FileNotFoundError" in refused.stderr
