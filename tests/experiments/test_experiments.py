"""The papers' tables in miniature: what is trained differs in what the tables say, and what is reported is what was
scored."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch

from m3ae_fast.cli import main
from m3ae_fast.experiments import CLAIMS, RUNS, TABLES, Scale, config_of, experiments, train_and_score, write_report
from m3ae_fast.experiments.plan import runs_of

SMOKE = Scale.smoke()


def test_every_run_differs_from_m3ae_in_what_its_name_says():
    base = config_of("m3ae", 0, SMOKE).to_dict()
    for name in RUNS:
        config = config_of(name, 0, SMOKE).to_dict()
        different = {key for key in base if config[key] != base[key]}
        if name.startswith("m3ae-paired"):
            assert different == {"paired_share"} and config["paired_share"] == int(name[-2:]) / 100
        elif name.startswith("m3ae-ratio"):
            assert different == {"text_mask_ratio"} and config["text_mask_ratio"] == int(name[-2:]) / 100
        elif name.startswith("m3ae-decoder"):
            options = config["options"]
            changed = {key: options[key] for key in options if options[key] != base["options"].get(key)}
            assert different == {"options"} and options["width"] == 64 and changed.pop("decoder_depth") == 2
            del changed["width"], changed["heads"]
            assert changed.get("predict_ratio") == {"part": 1 / 3, "words": [1 / 3, 1.0]}.get(name.rpartition("-")[2])
            assert ("decoder" in changed) == ("cross" in name) and set(changed) <= {"predict_ratio", "decoder"}
        elif name.endswith(("-narrow", "-wide")):
            assert different == ({"options"} if name.startswith("m3ae") else {"options", "objective"})
        elif name in ("mae", "untrained"):
            assert different == {"objective"}, "MAE must be M3AE without words, in every other respect the same"
        elif name in ("clip", "supervised"):
            assert different == {"objective", "options"} and config["options"]["width"] == base["options"]["width"]
    assert config_of("mae", 1, SMOKE) == dataclasses.replace(config_of("mae", 0, SMOKE), seed=1)


def test_tables_and_claims_name_runs_and_scores_that_exist():
    assert set(runs_of(list(TABLES))) == set(RUNS)
    for table in TABLES.values():
        assert {row.run for row in table.rows} <= set(RUNS)
    for claim in CLAIMS:
        assert {claim.high, claim.low} <= set(RUNS) and claim.table in TABLES
        assert claim.score in TABLES[claim.table].scores
    for tables, got in ((["nothing"], "nothing"), ([], "none")):
        with pytest.raises(ValueError, match=f"tables must be of objectives, .* got {got}"):
            experiments("never", tables=tables)
    for name in ("seeds", "jobs"):
        with pytest.raises(ValueError, match=f"{name} must be .*, got 0"):
            experiments("never", **{name: 0})


def test_a_run_is_trained_and_scored_once(tmp_path):
    torch.manual_seed(1)
    scores = train_and_score("m3ae", 0, SMOKE, tmp_path)
    assert set(scores) == {"linear", *TABLES["ood"].scores}
    assert all(0 <= value <= 100 for value in scores.values())
    written = tmp_path / "m3ae-0" / "scores.json"
    assert json.loads(written.read_text())["scores"] == scores
    invented = json.loads(written.read_text()) | {"scores": {"linear": 1.0}}
    written.write_text(json.dumps(invented))
    assert train_and_score("m3ae", 0, SMOKE, tmp_path) == {"linear": 1.0}, "what is there is not scored again"
    with pytest.raises(ValueError, match="runs of the same settings"):
        train_and_score("m3ae", 0, dataclasses.replace(SMOKE, steps=4), tmp_path)
    written.unlink()
    assert train_and_score("m3ae", 0, SMOKE, tmp_path / "again") == scores, "a run is a function of its seed"


def scored(folder, **linear):
    for name in RUNS:
        for seed, value in enumerate(linear.get(name.replace("-", "_"), (50.0, 50.0, 50.0))):
            path = folder / f"{name}-{seed}" / "scores.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"scale": {}, "scores": {"linear": value}}))


def test_the_report_says_what_agrees_and_what_does_not(tmp_path):
    scored(tmp_path, m3ae=(80.0, 81.0, 82.0), mae=(30.0, 30.0, 33.0), clip=(70.0, 70.0, 70.0), supervised=(60, 80, 71))
    text = write_report(tmp_path, ["objectives"], 3, SMOKE).read_text()
    assert "| MAE | 31.0 +/- 1.7 | 44.6 |" in text and "| M3AE | 81.0 +/- 1.0 | 61.3 |" in text
    assert "| untrained | 50.0 +/- 0.0 | - |" in text
    assert "M3AE is above MAE: agrees (+50.0, standard error 0.6)" in text
    assert "CLIP is above M3AE: **disagrees** (-11.0, standard error 0.6)" in text
    assert "supervised training is above CLIP: not significant (+0.3, standard error 5.8)" in text
    assert (tmp_path / "objectives.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "experiments.json").read_text())["scores"]["clip"] == [{"linear": 70.0}] * 3


def test_one_seed_shows_nothing(tmp_path):
    scored(tmp_path, m3ae=(80.0,), mae=(30.0,), clip=(70.0,), supervised=(60.0,))
    text = write_report(tmp_path, ["objectives"], 1, SMOKE).read_text()
    assert "M3AE is above MAE: +50.0 in one seed, from which nothing follows" in text and "agrees" not in text


def test_the_command(tmp_path, capsys):
    options = ["--only", "paired", "--seeds", "1", "--jobs", "1", "--smoke"]
    assert main(["experiments", "--out", str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert "| 10 % |" in printed and "experiments.md" in printed
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"m3ae-0", "mae-0", "m3ae-paired-10-0", "m3ae-paired-20-0", "m3ae-paired-30-0"}


def test_runs_end_with_their_parent(tmp_path):
    """Killed, it cannot end them: they must see to it."""
    script = tmp_path / "start.py"
    script.write_text(
        "from m3ae_fast.experiments import Scale, experiments\n"
        "if __name__ == '__main__':\n"
        f"    experiments({str(tmp_path)!r}, tables=['objectives'], seeds=1, scale=Scale(steps=10**6), jobs=1)\n"
    )
    parent = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL)
    rows = tmp_path / "m3ae-0" / "metrics.jsonl"
    wait_until(lambda: rows.is_file() and rows.stat().st_size)
    parent.kill()
    parent.wait()

    def still() -> bool:
        before = rows.stat().st_size
        time.sleep(2)  # some hundred steps
        return rows.stat().st_size == before

    wait_until(still, 30)


def wait_until(done, seconds=120):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def test_nothing_is_trained_after_a_run_that_failed(tmp_path):
    (tmp_path / "pixels-0").mkdir()
    (tmp_path / "pixels-0" / "scores.json").write_text(json.dumps({"about": "another run", "scores": {}}))
    with pytest.raises(ValueError, match="runs of the same settings"):
        experiments(tmp_path, tables=["objectives"], seeds=1, scale=SMOKE, jobs=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["pixels-0"]
