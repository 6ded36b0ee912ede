"""Linear classification of frozen features: BatchNorm without affine parameters, then a Linear.

Shapes: N images, D width of their features, C classes.
Source: arXiv:2205.14204 (M3AE) and arXiv:2111.06377 (MAE), appendix A.1, whose recipe "lars" is.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast._settings import OPTIONS, add_options, check, documented, given, positive, setting
from m3ae_fast.data.samples import Crops, Some
from m3ae_fast.downstream.commands.arguments import add_classes, add_train
from m3ae_fast.downstream.commands.session import finish, open_run, pair_of_classes
from m3ae_fast.downstream.features import Features, extract
from m3ae_fast.downstream.scoring.accuracy import score_logits
from m3ae_fast.downstream.scoring.report import Result
from m3ae_fast.train import Run
from m3ae_fast.train.schedule import learning_rate

PROBED = 2000  # synthetic scenes to fit to, all of which are
METHODS = ("ridge", "lars", "sgd")
STRENGTHS = tuple(10.0**k for k in range(-6, 3))  # of ridge's penalty, for a loss that is a mean over the samples
SCALES = tuple(2.0**k for k in range(11))  # of ridge's logits


@documented
@dataclasses.dataclass(frozen=True)
class Fitting:
    """How a probe is fitted.

    "ridge" is least squares to one-hot targets in closed form, the strength of its penalty the power of ten with the
    highest leave-one-out accuracy (of equal ones the strongest), then times the power of two whose softmax has the
    lowest leave-one-out cross-entropy; it reads no setting but `classes` and `crops`, and leaves out those of an image
    together. "lars" and "sgd": cross-entropy, momentum .9, no weight decay, a ninth of the epochs (of 90: ten) warm up,
    then a cosine to 0; a last, smaller batch of an epoch is left out. LARS steps are shares of the weights'
    length: it wants the many steps of a large data set.
    """

    method: str = setting("ridge", "how the probe is fitted", OPTIONS, choices=METHODS)
    epochs: int = setting(90, "lars, sgd: passes over the features", OPTIONS, "N", "[1, inf)")
    batch_size: int = setting(256, "lars, sgd: features per step", OPTIONS, "B", "[1, inf)")
    lr: float = setting(0.1, "lars, sgd: peak learning rate, per 256 features of a step", OPTIONS, within="(0, inf)")
    seed: int = setting(0, "lars, sgd: seed of the initial weights and of the order", within=f"[0, {2**63})")
    classes: int | None = setting(None, "how many; default: as many as the labels name", within="[1, inf)")
    crops: int = setting(1, "features of each image, in the order of `Crops`", within="[1, inf)")
    __post_init__ = check


class LinearProbe(nn.Module):
    """logits = Linear((x - mean) / sqrt(variance + 1e-5)), mean and variance of the training features.

    Args:
        width: D. classes: C.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=1e-5, affine=False)
        self.linear = nn.Linear(width, classes)

    def forward(self, cls: Tensor) -> Tensor:
        """Features [N, D] -> logits [N, C]."""
        return self.linear(self.norm(cls))


def probe(train: Features, test: Features, **settings) -> Result:
    """Accuracy on `test` of a probe fitted to `train`; chance is the most common class of `test`.

    Args:
        train, test: of the same width.
        settings: fields of `Fitting`; `classes` None counts those of both.
    Raises:
        ValueError, TypeError: as `fit_probe`; `test` is empty, or of another width.
    """
    _check("test", test, test.cls.shape[-1])
    if settings.get("classes") is None:
        settings["classes"] = 1 + max(int(part.labels.max()) for part in (train, test) if len(part.labels))
    fitted = fit_probe(train, **settings)
    _check("test", test, train.cls.shape[1], settings["classes"])
    with torch.no_grad():
        return score_logits(fitted(test.cls), test.labels)


def fit_probe(train: Features, **settings) -> LinearProbe:
    """A probe in evaluation mode.

    Args:
        train: features of two images or more.
        settings: fields of `Fitting`.
    Raises:
        ValueError, TypeError: naming the argument.
    """
    fitting = Fitting(**settings)
    _check("train", train, train.cls.shape[-1], fitting.classes)
    if len(train.labels) < 2:
        raise ValueError(f"train must hold two features or more, got {len(train.labels)}")
    classes, crops = fitting.classes or 1 + int(train.labels.max()), fitting.crops
    images, rest = divmod(len(train.labels), crops)
    if images < 2 or rest or (train.labels.view(crops, images) != train.labels[:images]).any():
        raise ValueError(f"train must hold two images or more, {crops} times all of them in order, got others")
    if fitting.method == "ridge":
        return _ridge(train, classes, crops)
    _checks.integer("batch_size", fitting.batch_size, 2)  # BatchNorm knows no variance of one sample
    probe = _initial(train, classes, fitting.seed)
    _descend(probe, train, fitting)
    _measure(probe, train.cls)  # of the last steps BatchNorm has averages, on the way from 0 and 1
    return probe.eval()


def _measure(probe: LinearProbe, cls: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [D] float64 of all training features, by which the probe normalizes from now on."""
    variance, mean = torch.var_mean(cls.double(), 0, correction=0)
    probe.norm.running_mean.copy_(mean)
    probe.norm.running_var.copy_(variance)
    return mean, variance


def _ridge(train: Features, classes: int, crops: int) -> LinearProbe:
    """Centred features X and targets Y; W = (X'X + N s I)^-1 X'Y, from one eigendecomposition for every strength s.

    Left out together, the crops i of an image are guessed y_i - (I - H_i)^-1 (y_i - f_i), where
    H_i = 1/N + x_i (X'X + N s I)^-1 x_i': nothing is fitted again (nor standardised: mean and variance are those of all
    samples). Were only one crop left out, the others would tell its class, and the weakest penalty would be chosen.
    """
    probe, count = _untrained(train, classes), len(train.labels)
    mean, variance = _measure(probe, train.cls)
    by_image = torch.arange(count, device="cpu").view(crops, -1).T.flatten()
    x, labels = train.cls[by_image].double(), train.labels[by_image]
    x = (x - mean) / (variance + probe.norm.eps).sqrt()
    target = F.one_hot(labels, classes).double()
    y = target - target.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    turned = x @ vectors  # [N, D], columns orthogonal
    images, one = turned.unflatten(0, (-1, crops)), torch.eye(crops, dtype=x.dtype, device=x.device)
    right, best = turned.T @ y, -1.0
    for strength in STRENGTHS:
        inverse = 1 / (values.clamp(min=0) + count * strength)
        fitted = turned @ (inverse[:, None] * right)
        lever = 1 / count + images * inverse @ images.mT  # [images, crops, crops]
        error = torch.linalg.solve(one - lever, (y - fitted).unflatten(0, (-1, crops)))
        left_out = target - error.flatten(0, 1)
        accuracy = (left_out.argmax(1) == labels).double().mean().item()
        if accuracy >= best:
            best, guesses, weight = accuracy, left_out, vectors @ (inverse[:, None] * right)
    scale = min(SCALES, key=lambda scale: F.cross_entropy(scale * guesses, labels).item())
    with torch.no_grad():
        probe.linear.weight.copy_(scale * weight.T)
        probe.linear.bias.copy_(scale * target.mean(0))
    return probe.eval()


def _untrained(train: Features, classes: int) -> LinearProbe:
    with torch.device(train.cls.device):
        return LinearProbe(train.cls.shape[1], classes)


def _initial(train: Features, classes: int, seed: int) -> LinearProbe:
    probe, generator = _untrained(train, classes), torch.Generator().manual_seed(seed)
    nn.init.normal_(probe.linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(probe.linear.bias)
    return probe


def _descend(probe: LinearProbe, train: Features, fitting: Fitting) -> None:
    count = len(train.labels)
    batch_size = min(fitting.batch_size, count)
    peak, each = fitting.lr * batch_size / 256, count // batch_size
    steps = fitting.epochs * each
    kind = LARS if fitting.method == "lars" else torch.optim.SGD
    optimizer = kind(probe.linear.parameters(), lr=peak, momentum=0.9)
    generator = torch.Generator().manual_seed(fitting.seed)
    probe.train()
    for step in range(steps):
        if step % each == 0:
            order = torch.randperm(count, generator=generator, device="cpu")
        chosen = order[step % each * batch_size :][:batch_size]
        loss = F.cross_entropy(probe(train.cls[chosen]), train.labels[chosen])
        if not loss.isfinite():
            raise FloatingPointError(f"loss must be finite, got {loss:.4g} at step {step + 1}: a lower lr may help")
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=steps, warmup=steps // 9, peak=peak)
        optimizer.step()


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are shares of a matrix's length, whatever its gradient's:

        v = momentum * v + g * trust * |w| / |g|        w = w - lr * v

    |.| the Euclidean norm of a whole tensor. Vectors (biases), and where either norm is 0, take g itself.

    Args:
        params: as of every optimizer. lr: learning rate. momentum: of v. trust: the share.

    Source: arXiv:1708.03888, without weight decay; the rate outside of v, as in torch's SGD.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure=None):
        """One step; closure: recomputes the loss, which is handed back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g, v = w.grad, self.state[w].setdefault("velocity", torch.zeros_like(w))
                if w.dim() > 1:
                    ours, theirs = w.norm(), g.norm()
                    g = g * torch.where((ours > 0) & (theirs > 0), group["trust"] * ours / theirs, 1.0)
                v.mul_(group["momentum"]).add_(g)
                w.sub_(group["lr"] * v)
        return loss


def _check(name: str, features: Features, width: int, classes: int | None = None) -> None:
    _checks.shape(f"{name}.cls", features.cls, (None, width))
    _checks.dtype(f"{name}.cls", features.cls, (torch.float32,))
    _checks.shape(f"{name}.labels", features.labels, (len(features.cls),))
    _checks.dtype(f"{name}.labels", features.labels, (torch.int64,))
    if not len(features.labels):
        raise ValueError(f"{name} must hold at least one feature, got none")
    _checks.within(f"{name}.labels", features.labels, 0, classes or 2**62)
    if not features.cls.isfinite().all():
        raise ValueError(f"{name}.cls must be finite, got NaN or infinity")


def add_fitting(command: argparse.ArgumentParser) -> None:
    """What the probe is fitted to, and how."""
    add_train(command, "fit to")
    command.add_argument(
        "--train-samples",
        type=positive,
        metavar="N",
        help=f"how many images to fit to (synthetic: {PROBED}; others: all)",
    )
    command.add_argument(
        "--crops", type=positive, metavar="N", help="random crops of every image to fit to (default: the center crop)"
    )
    add_options(command, Fitting)
    command.add_argument("--text", action="store_true", help="encode each image together with its caption")


def to_fit(args: argparse.Namespace, training: Some, run: Run) -> tuple[Features, dict]:
    """(features to fit to, settings of `fit_probe`)."""
    size, crops = run.model.config.image_size, args.crops or 1
    samples = Crops(training, crops, size, args.seed) if args.crops else training
    settings = given(Fitting, args) | {"classes": len(training.classes), "crops": crops}
    return extract(run.model, samples, run.tokenizer, text=args.text), settings


def add_arguments(command: argparse.ArgumentParser) -> None:
    """What `m3ae-fast probe` takes."""
    add_classes(command)
    add_fitting(command)


def main(args: argparse.Namespace) -> int:
    """`m3ae-fast probe`; returns the exit status."""
    run, scored, trained = open_run(args)
    samples, training = pair_of_classes(scored, trained, count=args.train_samples, drawn=PROBED)
    test = extract(run.model, samples, run.tokenizer, text=args.text)
    train, settings = to_fit(args, training, run)
    return finish(args, run, [probe(train, test, **settings)], train_samples=len(training))
