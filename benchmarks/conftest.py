"""`pytest benchmarks --benchmark-only`: the step of a small M3AE and every op against their peers, in a few minutes;
`--all`: every size, and the other models, in an hour; `--smoke` just proves that they run."""

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
    """Without --all, a small M3AE's step and of every op the first case, forward and backward, each in all its dtypes;
    on a GPU M3AE's step in all sizes. A smoke run takes the first case of every benchmark: each provider and dtype runs
    once, no size twice."""
    if config.getoption("--all"):
        return
    smoke, first, kept, left = measure.SETTINGS.smoke, {}, [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case = params.get("case", params.get("size"))
        wanted = first.setdefault(item.originalname, case) == case
        if not smoke:
            of_an_op = item.path.parent.name == "ops" and params.get("mode") != "forward"
            wanted = (item.originalname == "bench_m3ae_step" and case != "m3ae_tiny") or (of_an_op and wanted)
        (kept if wanted else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def shown_at_once(pytestconfig):
    """What a benchmark has measured, in a line for each of its cases."""
    before = len(measure.ROWS)
    yield
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    for line in report.short(measure.ROWS[before:]):
        reporter.ensure_newline()
        reporter.write_line(line)


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
