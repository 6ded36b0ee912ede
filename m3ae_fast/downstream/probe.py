"""Linear classification of frozen features: BatchNorm without affine parameters, then a Linear.

Shapes: N images, D width of their features, C classes.
Source: arXiv:2205.14204 (M3AE) and arXiv:2111.06377 (MAE), appendix A.1, whose recipe "lars" is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3ae_fast import _checks
from m3ae_fast.downstream.accuracy import accuracies
from m3ae_fast.downstream.features import Features
from m3ae_fast.downstream.report import Result
from m3ae_fast.train.schedule import learning_rate

METHODS = ("ridge", "lars", "sgd")
STRENGTHS = tuple(10.0**k for k in range(-6, 3))  # of ridge's penalty, for a loss that is a mean over the samples
SCALES = tuple(2.0**k for k in range(11))  # of ridge's logits


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


def linear_probe(train: Features, test: Features, **options) -> Result:
    """Accuracy on `test` of a probe fitted to `train`; chance is the commonest class of `test`.

    Args:
        train, test: of the same width.
        options: as `fit_probe`'s; `classes` None counts those of both.
    Raises:
        ValueError, TypeError: as `fit_probe`; `test` is empty, or of another width.
    """
    _check("test", test, test.cls.shape[-1])
    if options.get("classes") is None:
        options["classes"] = 1 + max(int(part.labels.max()) for part in (train, test) if len(part.labels))
    probe = fit_probe(train, **options)
    _check("test", test, train.cls.shape[1], options["classes"])
    with torch.no_grad():
        return score_logits(probe(test.cls), test.labels)


def score_logits(logits: Tensor, labels: Tensor) -> Result:
    """Accuracy of logits [N, C] for labels [N] int64; chance is the commonest of the labels."""
    guesses = logits.argmax(1).tolist()
    return accuracies([""] * len(guesses), labels.tolist(), guesses)[0]


def fit_probe(
    train: Features,
    *,
    method: str = "ridge",
    classes: int | None = None,
    epochs: int = 90,
    batch_size: int = 256,
    lr: float = 0.1,
    seed: int = 0,
    crops: int = 1,
) -> LinearProbe:
    """A probe in evaluation mode.

    Args:
        train: features of two images or more.
        method: "ridge": least squares to one-hot targets in closed form, the strength of its penalty the power of ten
            with the highest leave-one-out accuracy (of equal ones the strongest), then times the power of two whose
            softmax has the lowest leave-one-out cross-entropy; no randomness, no setting but `crops`. "lars", "sgd":
            cross-entropy, momentum .9, no weight decay, a ninth of the epochs (of 90: ten) warm up, then a cosine to 0.
            LARS steps are shares of the weights' length: it wants the many steps of a large data set.
        classes: C; None: as many as the labels name.
        epochs: passes over the features ("lars", "sgd"). batch_size: of a step; a last smaller batch is left out.
        lr: peak, for 256 samples of a batch. seed: of the initial weights and of the order.
        crops: features of each image, in the order of `Crops`; "ridge" leaves out those of an image together.
    Raises:
        ValueError, TypeError: naming the argument.
    """
    _checks.choice("method", method, METHODS)
    _check("train", train, train.cls.shape[-1], classes)
    if len(train.labels) < 2:
        raise ValueError(f"train must hold two features or more, got {len(train.labels)}")
    if classes is None:
        classes = 1 + int(train.labels.max())
    _checks.integer("crops", crops, 1)
    images, rest = divmod(len(train.labels), crops)
    if images < 2 or rest or (train.labels.view(crops, images) != train.labels[:images]).any():
        raise ValueError(f"train must hold two images or more, {crops} times all of them in order, got others")
    if method == "ridge":
        return _ridge(train, classes, crops)
    _checks.positive("lr", lr)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        _checks.integer(name, value, 1 if name == "epochs" else 2)  # BatchNorm knows no variance of one sample
    probe = _initial(train.cls.shape[1], classes, seed)
    _descend(probe, train, LARS if method == "lars" else torch.optim.SGD, epochs, batch_size, lr, seed)
    _measure(probe, train.cls)  # of the last steps BatchNorm has averages, on the way from 0 and 1
    return probe.eval()


def _measure(probe: LinearProbe, cls: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [D] float64 of all training features, by which the probe normalises from now on."""
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
    probe, count = LinearProbe(train.cls.shape[1], classes), len(train.labels)
    mean, variance = _measure(probe, train.cls)
    by_image = torch.arange(count).view(crops, -1).T.flatten()
    x, labels = train.cls[by_image].double(), train.labels[by_image]
    x = (x - mean) / (variance + probe.norm.eps).sqrt()
    target = F.one_hot(labels, classes).double()
    y = target - target.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    turned = x @ vectors  # [N, D], columns orthogonal
    images, one = turned.unflatten(0, (-1, crops)), torch.eye(crops, dtype=x.dtype)
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


def _initial(width: int, classes: int, seed: int) -> LinearProbe:
    probe, generator = LinearProbe(width, classes), torch.Generator().manual_seed(seed)
    nn.init.normal_(probe.linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(probe.linear.bias)
    return probe


def _descend(
    probe: LinearProbe, train: Features, optimiser: type, epochs: int, batch_size: int, lr: float, seed: int
) -> None:
    count = len(train.labels)
    batch_size = min(batch_size, count)
    peak, each = lr * batch_size / 256, count // batch_size
    steps = epochs * each
    optimiser = optimiser(probe.linear.parameters(), lr=peak, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    probe.train()
    for step in range(steps):
        if step % each == 0:
            order = torch.randperm(count, generator=generator)
        chosen = order[step % each * batch_size :][:batch_size]
        loss = F.cross_entropy(probe(train.cls[chosen]), train.labels[chosen])
        if not loss.isfinite():
            raise FloatingPointError(f"loss must be finite, got {loss:.4g} at step {step + 1}: a lower lr may help")
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps=steps, warmup=steps // 9, peak=peak)
        optimiser.step()


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are shares of a matrix's length, whatever its gradient's:

        v = momentum * v + g * trust * |w| / |g|        w = w - lr * v

    |.| the Euclidean norm of a whole tensor. Vectors (biases), and where either norm is 0, take g itself.

    Args:
        params: as of every optimiser. lr: learning rate. momentum: of v. trust: the share.

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
