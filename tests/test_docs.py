"""What is public is documented, and what the documents say can be followed."""

import importlib
import inspect
import pydoc
import re
import shlex
from pathlib import Path

import pytest

from m3ae_fast import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LONGER = {"mamo_ablation.py"}  # from before the rule


def modules() -> list[str]:
    """m3ae_fast, its packages, and one module for each library that it integrates with."""
    folders = (path.parent.name for path in sorted((ROOT / "m3ae_fast").glob("*/__init__.py")))
    libraries = (path.stem for path in sorted((ROOT / "m3ae_fast/integrations").glob("[a-z]*")))
    return ["m3ae_fast", *(f"m3ae_fast.{name}" for name in folders if name not in ("integrations", "ops"))] + [
        f"m3ae_fast.integrations.{name}" for name in libraries
    ]


@pytest.fixture(params=modules())
def module(request):
    try:
        module = importlib.import_module(request.param)
        public(module)  # some of it is imported late
        return module
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("m3ae_fast"):
            raise
        pytest.skip(f"{request.param} needs {error.name}")


def public(module) -> dict:
    """Its functions and classes by name: those of `__all__` and the tasks, or all that are defined in it."""
    if hasattr(module, "__all__"):
        found = {name: getattr(module, name) for name in (*module.__all__, *getattr(module, "TASKS", ()))}
    else:
        found = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        found = {name: value for name, value in found.items() if getattr(value, "__module__", "") == module.__name__}
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isfunction(value)}


def documentation(value) -> str:
    """A function's or class's docstring, those of the classes of ours that it inherits from, the comments beside a
    record's fields, and the docstrings of what it refers to by name, in backticks."""
    ours = value.__mro__ if inspect.isclass(value) else [value]
    texts = [each.__doc__ or "" for each in ours if each.__module__.startswith("m3ae_fast")]
    if hasattr(value, "__annotations__") and inspect.isclass(value):
        texts += re.findall(r"^    (\w+: .*#.*)$", inspect.getsource(value), re.M)
    home = inspect.getmodule(value).__name__
    for name in re.findall(r"`([\w.]+)`", texts[0]):
        texts.append(inspect.getdoc(pydoc.locate(f"{home}.{name}") or pydoc.locate(name)) or "")
    return "\n".join(texts)


def test_every_public_name_says_what_it_is(module):
    assert module.__doc__, "the module says nothing"
    for name, value in public(module).items():
        # a dataclass without a docstring is given its signature
        assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isroutine(function) and not method.startswith("_"):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{method}"


def test_every_parameter_is_documented(module):
    for name, value in public(module).items():
        if inspect.isclass(value) and issubclass(value, Warning):
            continue  # made by warnings.warn
        text = documentation(value)
        for parameter in inspect.signature(value).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{name} does not say what {parameter} is"


def test_the_api_reference_is_of_all_packages():
    named = re.search(r"PACKAGES = \(([^)]*)\)", (ROOT / "docs/site_pages.py").read_text(encoding="utf-8"))[1]
    assert sorted(re.findall(r"\w+", named)) == sorted({name.split(".")[1] for name in modules()[1:]})


def commands(path: Path) -> list[str]:
    """The command lines of ours in the blocks of a document, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    whole = (block.replace("\\\n", " ") for block in blocks)  # a backslash goes on in the next line
    lines = [line.strip().removeprefix("$ ") for block in whole for line in block.splitlines()]
    return [line for line in lines if re.match(r"m3ae-fast |torchrun .*-m m3ae_fast ", line) and "..." not in line]


def parse(command: str) -> None:
    """SystemExit: the command line takes no such command, option or value."""
    arguments = shlex.split(command, comments=True)
    arguments = arguments[1:] if arguments[0] == "m3ae-fast" else arguments[arguments.index("m3ae_fast") + 1 :]
    cli._parser(arguments[0]).parse_args(arguments)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_are_taken(path):
    pytest.importorskip("tokenizers")  # options of pretrain need the train extra
    for command in commands(path):
        parse(command)


@pytest.mark.parametrize("name", cli.EXAMPLES)
def test_the_help_of_a_command_has_examples_that_are_taken(name, command_line):
    pytest.importorskip("tokenizers")
    status, out, _ = command_line(name, "--help")
    assert status == 0
    for example in cli.EXAMPLES[name]:
        assert f"\n  m3ae-fast {example}\n" in out
        if example != "--version":
            parse(f"m3ae-fast {example}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for named in re.findall(r"`((?:benchmarks|docs|examples|m3ae_fast|tests)/[\w/]+\.\w+)`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_is_python(path):
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        compile(block, path.name, "exec")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60 or path.name in LONGER, f"{len(lines)} lines"
