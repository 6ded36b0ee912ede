"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path

from m3ae_fast._settings import add_options, natural, path, picture, positive, sides

SCORED = 500  # synthetic scenes to score on, where no number is given
CLASSES = "cluttered"  # the default data to classify: synthetic scenes of one class each


def add_scored(
    command: argparse.ArgumentParser, spec: str, rows: str, *, default: str = "shapes", out: bool = True
) -> None:
    """A run, and the data that it is scored on.

    Args:
        spec: what --data may be. rows: what such data holds. default: of --data. out: whether results are written.
    """
    add_run(command)
    rows = f"rows of a file: {rows}" if "FILE" in spec else rows
    command.add_argument("--data", default=default, metavar=spec, help=f"the data to score on (%(default)s); {rows}")
    command.add_argument(
        "--samples", type=positive, metavar="N", help=f"how many of them to score (synthetic: {SCORED}; others: all)"
    )
    if out:
        command.add_argument("--out", type=path, metavar="FILE", help="write the results there, as JSON")
    command.add_argument(
        "--seed", type=natural, default=0, metavar="S", help="seed of scenes and training (%(default)s)"
    )
    add_device(command)


def add_classes(command: argparse.ArgumentParser, *, out: bool = True) -> None:
    """A run, and the images of one class each that it is scored on. out: whether results are written."""
    add_scored(command, f"{CLASSES}|DIR", "a subfolder of DIR is a class", default=CLASSES, out=out)


def add_run(command: argparse.ArgumentParser) -> None:
    """The run whose model is used, and the size of images that it is used at."""
    command.add_argument("run", type=path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    command.add_argument(
        "--image-size", type=sides, metavar="PIXELS",
        help="pixels a side, or height x width, such as 128x256; positions are resampled (default: as in training)",
    )  # fmt: skip


def add_device(command: argparse.ArgumentParser) -> None:
    """Where the model runs."""
    command.add_argument("--device", default="cpu", help="where the model runs (%(default)s)")


def add_train(command: argparse.ArgumentParser, purpose: str) -> None:
    """The data that is learned from; purpose: "train on" for instance."""
    command.add_argument(
        "--train", metavar="SPEC", help=f"the data to {purpose}, as --data takes them (default: other scenes)"
    )


def add_trained(command: argparse.ArgumentParser, settings: type) -> None:
    """The data to train on, an option for each of the task's settings, and where the trained model goes."""
    add_train(command, "train on")
    add_options(command, settings)
    command.add_argument("--save", type=path, metavar="FILE", help="write the trained model there, as safetensors")


def add_picture(command: argparse.ArgumentParser, default: str) -> None:
    """Where the picture goes."""
    command.add_argument(
        "--out", type=picture, default=Path(default), metavar="FILE.png", help="the picture to write (%(default)s)"
    )


def add_captions(command: argparse.ArgumentParser) -> None:
    """The words beside each image of the command line."""
    command.add_argument(
        "--caption", dest="captions", action="append", metavar="TEXT", help="a caption; give one for each image"
    )


def check_captions(args: argparse.Namespace) -> None:
    """ValueError: captions were given, but not one for each image."""
    if args.captions and len(args.captions) != len(args.images):
        raise ValueError(
            f"--caption must be given once for each image, got {len(args.captions)} for {len(args.images)}"
        )
