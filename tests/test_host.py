"""benchmarks/host.py: it runs, and no op is missing from its tables."""

import importlib.util
import math
from pathlib import Path

import pytest

import m3ae_fast
from benchmarks import host
from m3ae_fast import _backends

pytest.importorskip("m3ae_fast._cpp")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parents[1]


def assert_measured(rows):
    for row in rows:
        for who in {"ours", "theirs", "reference"} & row.keys():
            assert row[who] and all(0 < value < math.inf for value in row[who].values()), row


def test_every_op_is_measured():
    result = host.measure("cpu", smoke=True)
    assert sorted(row["op"] for row in result["ops"]) == sorted(_backends.LOADED)
    assert_measured(result["ops"] + result["steps"])
    for row in result["ops"]:
        parts = host.PARTS[:1] if row["op"] == "sample_mask" else host.PARTS  # it has no gradient
        assert tuple(row["ours"]) == tuple(row["reference"]) == parts and row["theirs"], row
    table = host.markdown({"machine": "this one"}, {"cpu": result}, {"cpu": result}).splitlines()
    for op in _backends.LOADED:
        (line,) = (line for line in table if line.startswith(f"| {op} |"))
        assert line.count("→") == (2 if op == "sample_mask" else 6)


@needs_triton
def test_a_gpu_is_measured_without_one():
    result = host.measure("gpu", ops=["layer_norm"], smoke=True)
    assert [row["op"] for row in result["ops"]] == ["layer_norm"] and result["steps"] == []
    assert_measured(result["ops"])


LAUNCHES = """
from benchmarks import stub_gpu
driver = stub_gpu.install()
import torch, m3ae_fast
x, weight = torch.randn(6, 64, requires_grad=True), torch.randn(64, requires_grad=True)
for _ in range(2):
    with driver.recording() as calls:
        m3ae_fast.layer_norm(x, weight, None).sum().backward()
    print([call.grid for call in calls], [call.function for call in calls], len(calls[0].arguments))
m3ae_fast.layer_norm(x, weight, None)
print(len(calls))
"""


@needs_triton
def test_a_stubbed_gpu_is_asked_for_launches(python):
    package = Path(m3ae_fast.__file__).parents[1]
    done = python(LAUNCHES, PYTHONPATH=f"{package}:{ROOT}")
    assert done.returncode == 0, done.stderr
    launches = "[(6, 1, 1), (1, 1, 1), (4, 1, 1)] [1, 2, 3] 11"  # forward, backward, the sum over chunks of rows
    assert done.stdout.splitlines() == [launches, launches, "3"]


def test_a_page_keeps_its_text(tmp_path, monkeypatch, capsys):
    page = tmp_path / "host.md"
    page.write_text(f"text\n\n{host.MEASURED}\n\nold\n")
    monkeypatch.setattr(host, "measure", lambda *_: {"ops": [], "steps": []})
    monkeypatch.setattr("sys.argv", ["host", "--page", str(page), "--json", str(tmp_path / "host.json")])
    host.main()
    start, _, tables = page.read_text().partition(f"{host.MEASURED}\n\n")
    assert start == "text\n\n" and tables == capsys.readouterr().out and "old" not in tables
    assert (tmp_path / "host.json").exists()
