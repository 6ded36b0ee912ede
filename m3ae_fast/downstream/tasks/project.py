"""Features in two dimensions, by t-SNE, and their picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from m3ae_fast import _checks
from m3ae_fast._drawing import INK, new_figure, save_figure
from m3ae_fast.data.samples import open_classes
from m3ae_fast.downstream.commands.arguments import add_classes, add_picture
from m3ae_fast.downstream.commands.session import open_run
from m3ae_fast.downstream.features import extract

LEGEND = 20  # classes with a color of their own
PERPLEXITY = 30.0


def project(cls: Tensor, *, perplexity: float = PERPLEXITY, seed: int = 0) -> np.ndarray:
    """Features [N, D] -> points [N, 2] float32, close where the features are close.

    Args:
        cls: as of `Features`. perplexity: about how many neighbors a feature has, in (0, N). seed: of the optimizer.
    Raises:
        ValueError: fewer than 4 features, or a perplexity out of range. ModuleNotFoundError: scikit-learn is missing.

    Source: van der Maaten and Hinton, JMLR 9 (2008); scikit-learn's, initialized with the first two principal
    components.
    """
    _checks.shape("cls", cls, (None, None))
    if len(cls) < 4:
        raise ValueError(f"cls must hold 4 features or more, got {len(cls)}")
    if not 0 < perplexity < len(cls):
        raise ValueError(f"perplexity must be in (0, {len(cls)}), below the number of features, got {perplexity:g}")
    from sklearn.manifold import TSNE

    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(cls.numpy())


def draw_projection(points: np.ndarray, labels: Tensor, classes: Sequence[str], path: Path) -> None:
    """A point an image, a color a class, the one that it is named after where all are names of colors; past 20 classes
    colors come again, and no legend is drawn.

    Args:
        points: [N, 2]. labels: [N], numbers of `classes`, the names. path: of the PNG.
    """
    import matplotlib
    from matplotlib.colors import is_color_like

    figure = new_figure(8, 6)
    axes = figure.subplots()
    named = all(map(is_color_like, classes))
    colors = list(classes) if named else matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"].colors
    edge = {"edgecolors": INK, "linewidths": 0.4} if named else {"linewidths": 0}  # white is seen, too
    labels = labels.numpy()
    for number in np.unique(labels):
        chosen = points[labels == number]
        color = colors[number % len(colors)]
        axes.scatter(*chosen.T, s=16, facecolors=color, alpha=0.8, label=classes[number], **edge)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#c9cdd6")
    axes.set_title(f"{len(points):,} images, t-SNE of CLS", loc="left", fontsize=11, fontweight="bold", color=INK)
    if len(classes) <= LEGEND:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, path)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast project` takes."""
    add_classes(command, out=False)
    add_picture(command, "features.png")
    command.add_argument("--text", action="store_true", help="encode each image together with its caption")
    command.add_argument(
        "--perplexity", type=float, default=PERPLEXITY, metavar="P", help="t-SNE's perplexity (%(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast project`; returns the exit status."""
    run, scored, _ = open_run(args)
    samples = scored(open_classes)
    features = extract(run.model, samples, run.tokenizer, text=args.text)
    points = project(features.cls, perplexity=args.perplexity, seed=args.seed)
    draw_projection(points, features.labels, samples.classes, args.out)
    print(f"{args.out}: {len(points)} images of {len(samples.classes)} classes, the model after {run.step:,} steps")
    return 0
