"""Runs of two steps to try the commands on; models are so small that one thread is fastest."""

import pytest

from m3ae_fast.train import RunConfig, pretrain, run, trainer


@pytest.fixture(autouse=True)
def small(threads):
    threads(1)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """pretrained(*objectives): a folder with a run of each, by its name, of the module's tests."""

    def make(*objectives):
        folder = tmp_path_factory.mktemp("runs")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "draw_pictures", lambda *_: None)
            patch.setattr(run, "LEARN_WORDS_FROM", 300)
            for objective in objectives:
                config = RunConfig(objective=objective, steps=2, batch_size=4, image_size=32, device="cpu")
                pretrain(config, folder / objective, progress=False)
        return folder

    return make


@pytest.fixture
def mistake(command, tmp_path):
    """mistake(message, *arguments): that a command ends with one line that says so, status 2 and nothing written."""

    def check(message, *arguments):
        before = sorted(tmp_path.rglob("*"))
        status, out, err = command(*arguments)
        assert status == 2 and out == ""
        line = err.splitlines()[-1]
        assert line.startswith("m3ae-fast") and "error: " in line and message in line and "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before, "nothing half-written"

    return check
