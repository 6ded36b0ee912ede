"""What a command opens and leaves: a run and data, results and the trained model."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import nn

from m3ae_fast._files import read_tensors, write_tensors
from m3ae_fast.data import DRAWN
from m3ae_fast.data.samples import Some, open_classes
from m3ae_fast.downstream.commands.arguments import SCORED
from m3ae_fast.downstream.scoring import report
from m3ae_fast.models import OBJECTIVES, objectives_offering
from m3ae_fast.train import Run, load_run

TRAINING = 50_000  # synthetic scenes to fine-tune on: more than are ever read


def open_run(args: argparse.Namespace, *methods: str, words: bool = False):
    """The run, and (open the data to score on, open the data to train on) by an opener such as `open_pairs`.

    Args:
        args: of the command line. methods: what the model must offer (`Model.offers`).
        words: it must be a model that reads captions, too.
    Raises:
        ValueError: a file could not be written in the end, or it is a run of an objective that does not do.
    """
    for name in ("out", "save", "picture"):
        path = getattr(args, name, None)
        if path and (path.is_dir() or not path.parent.is_dir()):  # or hours of training would end here
            raise ValueError(f"--{name} must name a file in a folder that exists, got {path}")
    objectives = objectives_offering(*methods)
    if words:
        objectives = [name for name in objectives if OBJECTIVES[name][0].CAPTIONS != "unused"]
    run = load_run(args.run, args.device, objectives=objectives, image_size=args.image_size)
    images = run.model.config.images

    def scored(opener: Callable, spec: str | None = None):
        spec = spec or args.data
        count = args.samples or (SCORED if spec in DRAWN else None)
        seed = 2 * (args.seed + run.config.seed) + 1  # odd
        return opener(spec, seed=seed, count=count, **images)

    def trained(opener: Callable, count: int | None = None, drawn: int = TRAINING):
        spec = args.train or args.data
        if not args.train and args.data not in DRAWN:
            raise ValueError(f"--train must name data to train on, beside --data {args.data}, got none")
        count = count or (drawn if spec in DRAWN else None)
        seed = 2 * (args.seed + run.config.seed) + 2  # even: of scenes that no --seed scores
        return opener(spec, seed=seed, count=count, **images)

    return run, scored, trained


def pair_of_classes(scored: Callable, trained: Callable, **options) -> tuple[Some, Some]:
    """(data to score on, data to train on), which must have the same classes. options: of `trained`."""
    test, training = scored(open_classes), trained(open_classes, **options)
    if test.classes != training.classes:
        raise ValueError(f"--train must have the classes of --data, {few(test.classes)}, got {few(training.classes)}")
    return test, training


def few(names: tuple[str, ...]) -> str:
    """The first of the names, and how many there are."""
    return ", ".join(names[:5]) + (f" ... ({len(names)})" if len(names) > 5 else "")


def finish(args: argparse.Namespace, run: Run, results: list[report.Result], **about) -> int:
    """Print the results; write them beside the command's arguments, of which `about` names what they left open."""
    print(report.table(results))
    if args.out:
        given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        del given["name"], given["out"]
        report.write(args.out, results, given | {"command": args.name, "step": run.step} | about)
        print(f"results: {args.out}")
    return 0


def save(args: argparse.Namespace, model: nn.Module, **metadata: str) -> None:
    """Write the trained model where --save says, if it does."""
    if args.save:
        write_tensors(args.save, model.state_dict(), metadata)
        print(f"model: {args.save}")


def load_saved(
    path: str | os.PathLike,
    key: str,
    build: Callable[[list[str]], nn.Module],
    what: str,
) -> tuple[nn.Module, list[str]]:
    """A model that `save` wrote, in evaluation mode, and the list that is the metadata's entry `key`.

    Args:
        path: of the file. build: makes the model of that list. what: the file must be, for an error.
    Raises:
        FileNotFoundError: there is none. ValueError: it is not what it must be; weights may have been written into what
            `build` made by then.
    """
    from safetensors import SafetensorError

    if not Path(path).is_file():
        raise FileNotFoundError(f"path must name a file, there is no {path}")
    try:
        metadata, tensors = read_tensors(path)
        names = json.loads(metadata.get(key, "null"))
        if not isinstance(names, list) or not names:
            raise ValueError(f"its metadata have no list of {key}")
        model = build(names)
        model.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} must be {what}: {reason}") from None
    return model.eval(), names
