"""The layers of the package, as CONTRIBUTING shows them: no import runs upward, no two modules import each other."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = {"m3ae_fast._C", "m3ae_fast._cuda"}
BASE = "base"  # the files beside the folders


def modules() -> dict[str, str]:
    """The source of every module by its name, of a package by the name of its folder."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / "m3ae_fast").rglob("*.py")}
    names = {path: ".".join(name.parts).removesuffix(".__init__") for name, path in paths.items()}
    return {name: path.read_text(encoding="utf-8") for path, name in names.items()}


def imports(source: str, known: set[str]) -> set[str]:
    """The known modules that a source imports anywhere, in functions and for type checkers, too. Packages that run on
    the way to a module do not count."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"an import must name the whole module, got {ast.unparse(node)}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known | COMPILED else node.module for name in names}
    return found & known


def diagram() -> dict[str, list[str]]:
    """What each layer may import, from the highest to the lowest."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.search(r"^layer +may import\n(.*?)^```$", text, re.M | re.S)[1].splitlines()
    return {layer: below for layer, *below in map(str.split, lines)}


MODULES = modules()
GRAPH = {name: imports(source, set(MODULES)) for name, source in MODULES.items()}
LAYERS = diagram()


def layer(module: str) -> str:
    """Where a module is."""
    name = module.removeprefix("m3ae_fast.").split(".")[0].replace("__main__", "cli")
    return name if name in LAYERS else BASE


def test_the_diagram_shows_every_folder_and_no_way_up():
    folders = {path.parent.name for path in (ROOT / "m3ae_fast").glob("*/__init__.py")}
    assert set(LAYERS) == {"m3ae_fast", "cli", *folders}
    highest_first = list(LAYERS)
    for i, name in enumerate(highest_first):
        assert set(LAYERS[name]) <= set(highest_first[i + 1 :]), f"{name} must import what is below it"


@pytest.mark.parametrize("name", [*LAYERS, BASE])
def test_no_import_runs_upward(name):
    allowed = {name, BASE, *LAYERS.get(name, ())}
    here = [module for module in GRAPH if layer(module) == name]
    upward = [(module, other) for module in here for other in GRAPH[module] if layer(other) not in allowed]
    assert here and not upward, "\n".join(f"{module} imports {other}" for module, other in upward)


def test_no_two_modules_import_each_other():
    try:
        graphlib.TopologicalSorter(GRAPH).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" is imported by ".join(error.args[1]))


def test_imports_in_functions_count():
    source = "def f():\n    from m3ae_fast import _C, nn as fast, explain\n    import m3ae_fast.train.run\n"
    known = {"m3ae_fast", "m3ae_fast.nn", "m3ae_fast.train", "m3ae_fast.train.run"}
    assert imports(source, known) == {"m3ae_fast", "m3ae_fast.nn", "m3ae_fast.train.run"}
