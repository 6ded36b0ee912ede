"""What is said where an optional dependency is missing."""

import importlib
import sys

import pytest


@pytest.mark.parametrize("package", ["PIL", "tokenizers"])
def test_missing_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails, as if it were not installed
    monkeypatch.delitem(sys.modules, "m3ae_fast.data", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"m3ae_fast\.data needs {package}: pip install '\.\[train\]'"):
        importlib.import_module("m3ae_fast.data")
