"""Figures with their errors and chance levels: as JSON, and as a table."""

import json
import math
import statistics

import pytest

from m3ae_fast.downstream import Result
from m3ae_fast.downstream.scoring.report import table, write


def test_result():
    scores = [True, False, 1, 0.5, True]
    result = Result.of("accuracy", scores, 0.25)
    assert (result.name, result.value, result.chance, result.count) == ("accuracy", pytest.approx(0.7), 0.25, 5)
    assert result.error == pytest.approx(statistics.stdev(map(float, scores)) / math.sqrt(5))
    single = Result.of("accuracy", [True])
    assert (single.value, single.chance, single.count, single.error) == (1, None, 1, None)


@pytest.mark.parametrize("score", [1.5, -0.1, math.nan])
def test_a_score_is_a_share(score):
    with pytest.raises(ValueError, match=rf"scores must be in \[0, 1\], got {score} for 'accuracy'"):
        Result.of("accuracy", [0, score])


def test_no_score():
    with pytest.raises(ValueError, match="scores must hold at least one, got none for 'accuracy'"):
        Result.of("accuracy", [])


def test_write(tmp_path):
    results = [Result.of("text R@1", [1, 0, 0, 1], 0.001), Result.of("text R@5", [1])]
    path = tmp_path / "retrieval.json"
    path.write_text("an older one")
    write(path, results, {"data": "shapes", "step": 12})
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["about"] == {"data": "shapes", "step": 12}
    assert [Result(**row) for row in read["results"]] == results
    write(str(path), iter(results[:1]))
    assert json.loads(path.read_text())["about"] == {}
    assert [p.name for p in tmp_path.iterdir()] == ["retrieval.json"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write(tmp_path / "nowhere" / "x.json", results)


def test_table():
    results = [
        Result("accuracy", 0.8312, 0.25, 1000, 0.0118),
        Result("text R@1", 1.0, 0.0001, 12345, 0.0),
        Result("pointing", 0.0, None, 1, None),
    ]
    assert table(results).split("\n") == [
        "           result   +/-   chance   examples",
        "accuracy     83.1   1.2     25.0      1,000",
        "text R@1    100.0   0.0     0.01     12,345",
        "pointing      0.0     -        -          1",
    ]


def test_without_the_train_extra(python):
    """Scores need neither Pillow nor tokenizers; what does need them says how to get them."""
    code = """if True:
        import sys
        sys.modules["PIL"] = sys.modules["tokenizers"] = None
        from m3ae_fast.downstream import Question, recalls
        try:
            import m3ae_fast.data.examples.shapes
        except ModuleNotFoundError as error:
            print(error)
    """
    result = python(code)
    assert result.returncode == 0 and "needs PIL: pip install '.[train]'" in result.stdout, result.stderr
