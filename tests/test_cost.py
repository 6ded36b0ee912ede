"""benchmarks/cost.py: what it counts is there, and docs/scale.md says what it says."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import cost, decoder
from benchmarks.models import bench_m3ae
from m3ae_fast import testing
from m3ae_fast.models import M3AE, M3AEConfig

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    "config",
    [
        M3AEConfig.tiny(vocab_size=1000),
        M3AEConfig.tiny(vocab_size=50, depth=1, decoder_depth=3, width=256, image_mask_ratio=0.5, text_mask_ratio=0.25),
        M3AEConfig.tiny(vocab_size=1000, predict_ratio=0.4),
        M3AEConfig.tiny(vocab_size=1000, decoder="cross", width=256),
        M3AEConfig.tiny(vocab_size=1000, decoder="cross", decoder_depth=3, predict_ratio=0.4),
    ],
)
def test_products_are_those_of_a_step(config):
    shape = testing.ModelShape(2, 64, 8, config.width, config.heads, 128, 4, config.vocab_size, (20, 20))
    _, loss_of = bench_m3ae.make_model(config, "m3ae_fast", [bench_m3ae.make_batch(config, shape, 0)])
    assert bench_m3ae.flops_of(loss_of) == pytest.approx(2 * cost.training(config, words=20), rel=0.02)


def test_the_decoders_page_has_what_is_counted():
    page = (DOCS / "decoder.md").read_text(encoding="utf-8")
    for way, changes in decoder.WAYS.items():
        assert f"| {way} | {cost.training(M3AEConfig.small(**changes)) / 1e9:.0f} |" in page


def test_parameters_are_those_of_the_model():
    config = M3AEConfig.tiny(vocab_size=100)
    assert cost.parameters(config) == sum(p.numel() for p in M3AE(config).parameters())


def test_what_is_sent_counts_where_it_takes_longer():
    config = M3AEConfig.large()
    slow, fast = (cost.seconds(config, cost.BATCH, 64, share * cost.PEAK) for share in (0.1, 1e6))
    compute = cost.BATCH * cost.training(config) / (64 * 0.1 * cost.PEAK)
    assert slow == pytest.approx(compute), "hidden behind the backward pass"
    assert fast == pytest.approx(cost.sent(config, 64) / cost.INFINIBAND, rel=1e-3), "nothing to hide behind"


def test_the_page_is_up_to_date():
    page = (DOCS / "scale.md").read_text(encoding="utf-8")
    assert cost.renewed(page, DOCS) == page, "run: python -m benchmarks.cost docs/scale.md"


def test_a_measured_step_takes_the_place_of_an_assumed_one(tmp_path):
    shutil.copy(DOCS / "cpu.json", tmp_path)
    row = {"op": "M3AE step", "case": "m3ae_large bf16, batch 64", "provider": "m3ae_fast", "median_ms": 40.0}
    rows = [row, row | {"provider": "padded, eager", "median_ms": 80.0}, row | {"case": "m3ae_large fp32, batch 64"}]
    (tmp_path / "gpu_step.json").write_text(json.dumps({"rows": rows}))
    assert cost.measured(tmp_path / "gpu_step.json") == {"large": 64 * cost.training(M3AEConfig.large()) / 0.04}
    tables = cost.tables(tmp_path)
    (large,) = (line for line in tables["1 B pairs, once"].splitlines() if line.startswith("| large"))
    assert "measured: " in large and large.endswith("| 1,600 |"), "64 samples in 40 ms"
    assert f"| {1e9 / 1600 / 3600:,.0f} h |" in large
    assert "assumed: " in tables["1 B pairs, once"], "the other sizes"


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="the page must have one place for the table 'models', got 0"):
        cost.renewed("", DOCS)
