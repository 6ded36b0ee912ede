"""A setting is written once, as a dataclass's field: its documentation, its check and its option are made of it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args, get_type_hints

from m3ae_fast import _checks

SIDES = tuple[int, int]  # as a field's type, beside int: height and width in pixels
OPTIONS = "options"  # argparse's own group, of what is in no other


@dataclasses.dataclass(frozen=True)
class Setting:
    """What there is to know of a field besides its name, type and default."""

    help: str  # what it is, and what its default stands for where that is None or False
    group: str | None = None  # title of the options among which it is shown; None: it has no option
    metavar: str | None = None  # of the option's value
    within: str | None = None  # the values allowed, an interval such as "[0, inf)"; an int field must have one
    choices: Collection[str] | None = None  # the values allowed
    flag: str | None = None  # the option, where it is not the field's name
    action: Any = None  # argparse's, of a bool; default: "store_true"
    instead_of: str | None = None  # another setting: a command line may name one of the two
    free: bool = False  # says where and how a run is computed and watched, not what: may differ when resuming


def setting(default: Any, *about: Any, **more: Any) -> Any:
    """A dataclass's field with its `Setting`, made of the other arguments. None is allowed where it is the default."""
    return dataclasses.field(default=default, metadata={"setting": Setting(*about, **more)})


@functools.cache
def _settings(cls: type) -> dict[str, tuple[Any, Setting, frozenset]]:
    """(default, setting, types other than None) by name, of the fields that are settings."""
    hints = get_type_hints(cls)
    types = {name: frozenset(get_args(hint) or [hint]) - {type(None)} for name, hint in hints.items()}
    fields = [each for each in dataclasses.fields(cls) if "setting" in each.metadata]
    return {each.name: (each.default, each.metadata["setting"], types[each.name]) for each in fields}


def documented(cls: type) -> type:
    """A decorator that adds the settings to the class's docstring."""
    lines = []
    for name, (_, about, _) in _settings(cls).items():
        allowed = [f"one of {', '.join(about.choices)}"] if about.choices else []
        allowed += [f"in {about.within}"] if about.within else []
        lines += textwrap.wrap("; ".join([f"{name}: {about.help}", *allowed]), 112, subsequent_indent="    ")
    text = "Attributes:\n" + textwrap.indent("\n".join(lines), "    ")
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{text}\n"
    return cls


def check(settings: Any) -> None:
    """Raise ValueError or TypeError, naming the setting, for a value that is not allowed."""
    for name, (default, about, types) in _settings(type(settings)).items():
        value = getattr(settings, name)
        if value is None and default is None:
            continue
        if about.choices:
            _checks.choice(name, value, about.choices)
        if about.within and SIDES in types:
            _checks.sides(name, value, _bounds(about.within)[0])
        elif about.within and int in types:
            _checks.integer(name, value, *_bounds(about.within))
        elif about.within:
            _checks.real(name, value, about.within)


def _bounds(within: str) -> tuple[int, int | None]:
    """The least whole number in an interval, and the least one above it; None: there is none."""
    low, high = within[1:-1].split(", ")
    return int(low) + (within[0] == "("), None if high == "inf" else int(high) + (within[-1] == "]")


def add_options(command: argparse.ArgumentParser, cls: type, *names: str) -> dict[str, Any]:
    """An option for each setting, or for those of these names, named alike. Returns their groups, by title."""
    settings = {name: each for name, each in _settings(cls).items() if each[1].group and (not names or name in names)}
    abouts = [about for _, about, _ in settings.values()]
    titles = dict.fromkeys(about.group for about in abouts)
    groups = {title: command if title == OPTIONS else command.add_argument_group(title) for title in titles}
    either = {a.instead_of: groups[a.group].add_mutually_exclusive_group() for a in abouts if a.instead_of}
    for name, (default, about, types) in settings.items():
        many = "; may be repeated" if dict in types or list[str] in types else ""
        shown = "" if default is None or bool in types else f" ({default})"
        option = {"action": "append" if many else None, "metavar": about.metavar, "choices": about.choices}
        if bool in types:
            option = {"action": about.action or "store_true"}
        elif dict in types:
            option["type"] = name_and_value
        elif SIDES in types:
            option["type"] = functools.partial(sides, low=_bounds(about.within)[0])
        elif int in types:
            option["type"] = functools.partial(natural, low=_bounds(about.within)[0])
        elif float in types:
            option["type"] = float
        option |= {"dest": name, "default": command.argument_default or default}
        option |= {"help": f"{about.help}{many}{shown}".replace("%", "%%")}
        group = either.get(about.instead_of or name, groups[about.group])
        group.add_argument(about.flag or "--" + name.replace("_", "-"), **option)
    return groups


def given(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """The settings that a command line named; where its parser keeps defaults, those too."""
    found = {name: getattr(args, name) for name in _settings(cls) if hasattr(args, name)}
    for name, value in found.items():
        types = _settings(cls)[name][-1]
        if dict in types:
            found[name] = dict(value)
        elif list[str] in types and len(value) == 1:
            found[name] = value[0]
    return found


def free(cls: type) -> set[str]:
    """The names of the settings that may differ when resuming."""
    return {name for name, (_, about, _) in _settings(cls).items() if about.free}


def name_and_value(text: str) -> tuple[str, object]:
    """NAME=VALUE, the value a number, a JSON value or a plain word."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def natural(text: str, low: int = 0) -> int:
    """A whole number, at least low."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least {low}, got {text!r}")
    return value


positive = functools.partial(natural, low=1)


def sides(text: str, low: int = 1) -> int | list[int]:
    """Pixels a side, or height x width: "128x256"."""
    try:
        return natural(text, low) if "x" not in text else [natural(side, low) for side in text.split("x", 1)]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be pixels a side, at least {low}, or two such numbers as 128x256, got {text!r}"
        ) from None


def path(text: str) -> Path:
    """Of a file or a folder; Path("") would be the current one."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or a folder, got ''")
    return Path(text)


def picture(text: str) -> Path:
    """Of a PNG."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must name a .png file, got {text!r}")
    return Path(text)
