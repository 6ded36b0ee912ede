"""`pytest benchmarks --benchmark-only`: every op and model against its peers; `--smoke` just proves that they run."""

import platform

import measure
import torch

import m3ae_fast


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="tiny rounds: proves the benchmarks run, measures nothing")


def pytest_configure(config):
    measure.SETTINGS.smoke = config.getoption("--smoke", default=False)


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


def pytest_terminal_summary(terminalreporter):
    if not measure.ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("m3ae_fast: medians, interleaved in one process")
    write("\n".join(line for line in m3ae_fast.explain().splitlines()[:8] if line))
    write(f"machine           {platform.processor() or platform.machine()}, torch {torch.__version__}")
    write(f"copy bandwidth    {measure.copy_bandwidth() / 1e6:.1f} GB/s read + written")
    if measure.SETTINGS.smoke:
        write("SMOKE RUN: these times measure nothing")
    write(f"{'op':<34}{'case':<24}{'provider':<26}{'median ms':>10}{'quartiles':>18}{'x ours':>8}{'copy %':>8}")
    for row in measure.ROWS:
        low, high = row.quartiles_ms
        share = "" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f}"
        write(
            f"{row.op:<34}{row.case:<24}{row.provider:<26}{row.median_ms:>10.3f}"
            f"{f'{low:.3f}-{high:.3f}':>18}{row.ratio:>8.2f}{share:>8}  {row.extra}"
        )
