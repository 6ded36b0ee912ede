"""pretrain --cuda-graphs: the run without, on a recorder in the place of CUDA's graphs; what is refused."""

import pytest

from m3ae_fast import _autograd
from m3ae_fast.models import graphs
from m3ae_fast.train import Trainer, trainer
from tests.models.recorded import RecordedGraphs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_graphs_is_the_run_without(train, monkeypatch, accumulate):
    monkeypatch.setattr(graphs, "CudaGraphs", RecordedGraphs)
    monkeypatch.setattr(_autograd, "keep_graph", lambda: True)  # a gradient is scaled in place on the CPU alone
    plain, graphed = (train(str(on), cuda_graphs=on, accumulate=accumulate, steps=8) for on in (False, True))
    for ours, theirs in zip(graphed, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    train("stopped", cuda_graphs=True, accumulate=accumulate, steps=8, stop_after=5)
    assert train("stopped", cuda_graphs=True, accumulate=accumulate, steps=8, resume=True) == graphed


def test_what_has_no_graphs_is_refused(config, tmp_path):
    for changes, message in (
        ({"objective": "mamo"}, "cuda_graphs must be False for mamo, whose plans have no buckets"),
        ({"objective": "clip"}, "cuda_graphs must be False for clip"),
        ({"checkpoint_blocks": True}, "cuda_graphs must be False with checkpoint_blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            config(cuda_graphs=True, **changes)
    with pytest.raises(ValueError, match="cuda_graphs must be False in 2 processes"):
        trainer._refuse_what_does_not_split(config(cuda_graphs=True), 2)
    with pytest.raises(ValueError, match=r"device must be a GPU to capture CUDA graphs \(cuda_graphs\), got cpu"):
        Trainer(config(cuda_graphs=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()
