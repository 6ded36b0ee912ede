"""`pytest benchmarks --benchmark-only`: every op and model against its peers; `--smoke` just proves that they run."""

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import measure, report
from m3ae_fast import testing


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="tiny rounds: proves the benchmarks run, measures nothing")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.addoption("--seconds", type=float, default=6.0, help="that the rounds of one case may take; default 6")
    parser.addoption("--table", type=Path, help="write the table there (Markdown), and beside it as JSON")


def pytest_configure(config):
    measure.SETTINGS.smoke = config.getoption("--smoke", default=False)
    measure.SETTINGS.device = config.getoption("--device", default="cpu")
    measure.SETTINGS.seconds = config.getoption("--seconds", default=6.0)
    if not measure.SETTINGS.gpu:
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs a GPU, and torch sees none")
    torch.set_float32_matmul_precision("highest")  # no TF32
    for name in ("m3ae_small", "m3ae_huge", "mae_base"):
        batch = testing.SHAPES[name].batch * measure.SETTINGS.batches
        testing.SHAPES[name] = dataclasses.replace(testing.SHAPES[name], batch=batch)


def pytest_collection_modifyitems(config, items):
    """A smoke run takes the first case of every benchmark: each provider and dtype runs once, no size twice."""
    if not measure.SETTINGS.smoke:
        return
    first, kept, left = {}, [], []
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case", item.callspec.params.get("size"))
        (kept if first.setdefault(item.originalname, case) == case else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def pytest_terminal_summary(terminalreporter, config):
    if not measure.ROWS:
        return
    terminalreporter.section("m3ae_fast: medians, interleaved in one process")
    lines = [f"{name:<18}{value}" for name, value in report.machine().items()]
    if measure.SETTINGS.smoke:
        lines.append("SMOKE RUN: these times measure nothing")
    for line in lines + report.text(measure.ROWS) + report.missing():
        terminalreporter.write_line(line)
    table = config.getoption("--table")
    if table:
        report.write(table, measure.ROWS, "pytest " + " ".join(config.invocation_params.args))
        terminalreporter.write_line(f"written: {table}, {table.with_suffix('.json')}")
