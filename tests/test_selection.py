"""Which of the collected tests a command line runs (`tests/conftest.py`)."""

from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).parent
FILE = TESTS / "ops/test_extremes.py"


@pytest.fixture
def selected(pytestconfig, monkeypatch):
    """selected(arguments, everything): how many run of two tests of FILE, the second of which is exhaustive."""
    conftest = next(each for each in pytestconfig.pluginmanager.get_plugins() if is_file(each, TESTS / "conftest.py"))
    monkeypatch.setattr(conftest._backends, "TESTED", None)

    def select(arguments, everything=False):
        config = SimpleNamespace(
            args=arguments,
            getoption={"--all": everything}.__getitem__,
            hook=SimpleNamespace(pytest_deselected=lambda items: None),
            invocation_params=SimpleNamespace(dir=TESTS.parent),
        )
        items = [
            SimpleNamespace(path=FILE, get_closest_marker=lambda name, mark=mark: mark) for mark in (None, "exhaustive")
        ]
        conftest.pytest_collection_modifyitems(config, items)
        return len(items)

    return select


def is_file(plugin, path):
    return getattr(plugin, "__file__", None) == str(path)


@pytest.mark.parametrize("arguments", [["tests"], ["tests/ops"], ["tests/ops/test_fuzz.py"], []])
def test_by_default_those_that_matter_most_run(selected, arguments):
    assert selected(arguments) == 1
    assert selected(arguments, everything=True) == 2


@pytest.mark.parametrize(
    "argument", ["tests/ops/test_extremes.py", f"{FILE}::test_a[b::c]", "tests/nn/../ops/test_extremes.py"]
)
def test_all_tests_of_a_named_file_run(selected, argument):
    assert selected([argument, "tests/nn"]) == 2
