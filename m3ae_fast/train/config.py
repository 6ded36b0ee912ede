"""RunConfig: everything a pre-training run is made of, saved in the run's folder as run.json."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

from m3ae_fast import _checks
from m3ae_fast._files import read_json, write_json
from m3ae_fast.data.specs import absolute
from m3ae_fast.models import OBJECTIVES
from m3ae_fast.models.config import SIZES

# What None stands for, by size. tiny is set to show learning within two minutes on two cores; the others follow
# arXiv:2205.14204: lr 1.5e-4 for every 256 samples of a step.
DEFAULTS = {
    "tiny": {"steps": 1200, "batch_size": 32, "lr": 2e-3},
    "small": {"steps": 100_000, "batch_size": 64},
    "base": {"steps": 100_000, "batch_size": 64},
    "large": {"steps": 100_000, "batch_size": 64},
    "huge": {"steps": 100_000, "batch_size": 64},
}
PAIRED = ("mamo", "clip")  # objectives of pairs alone: an image without a caption is left out
LR_PER_256 = 1.5e-4
TINY_LR = {"mamo": 1e-3, "clip": 1e-3, "supervised": 1e-3}  # of other objectives
# These change where and how a run is computed and watched, not what it computes: free to differ when resuming.
FREE = (
    "device", "workers", "shard", "rank_timeout", "strict", "max_bad_steps", "checkpoint_blocks", "checkpoint_every",
    "picture_every",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A pre-training run. None stands for the model's default; `resolved()` fills it in.

    Attributes:
        data: "shapes" or "cluttered" (drawn, built in), a folder of name.jpg + name.txt, a file or shards, each
            perhaps with a weight behind it ("A.h5=3"), or a list of such: see m3ae_fast.data.open_dataset.
        objective: what is trained: m3ae, mae, mamo, clip, supervised (m3ae_fast.models.OBJECTIVES).
        model: its size: tiny, small, base, large, huge.
        steps: optimiser steps. epochs: instead of steps, passes over the data; steps wins where both are given.
        batch_size: samples of a forward pass, over all processes: a multiple of their number, which may differ when
            resuming. accumulate: passes of a step.
        seed: of the weights, the data order and the masks.
        precision: "fp32", or "bf16": autocast, with weights and moments in fp32.
        lr: peak learning rate. warmup: steps of linear warm-up (default: a tenth of all), then a cosine to 0.
        weight_decay: AdamW's, on weight matrices only. grad_clip: largest gradient norm; 0: no clipping.
        ema: decay of the moving average of the weights (`m3ae_fast.train.average`), in [0, 1); 0: none is kept.
        image_size: pixels a side; image_mask_ratio, text_mask_ratio: in [0, 1). None: the model's own.
        options: other fields of the model's configuration, by name: {"mim_weight": 0}.
        text_vocab: vocab.txt or tokenizer.json; None: WordPiece trained on the data's captions.
        device: None: cuda if there is one, else cpu. workers: processes that load data, for each that trains.
        paired_share: of the images, which keep their captions, the same ones in every epoch.
        shard: of several processes (torchrun), each keeps a share of the weights, gradients and moments (FSDP2);
            False: each keeps all (DDP). rank_timeout: seconds that one waits for the others before it gives up.
        strict: stop at an image that cannot be read, instead of skipping and counting it.
        max_bad_steps: steps in a row whose loss or gradient may be not finite: they are skipped; one more ends the run.
        checkpoint_blocks: gradient checkpointing: less memory for more work, the same bits.
        checkpoint_every, picture_every: steps between them; 0: only at the end.
        model_config: all fields of the model's configuration; filled in when the run is made.

    Raises:
        ValueError: a value out of its range, naming it. TypeError: not a number.
    """

    data: str | list[str] = "shapes"
    objective: str = "m3ae"
    model: str = "tiny"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    seed: int = 0
    precision: str = "fp32"
    lr: float | None = None
    warmup: int | None = None
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    ema: float = 0.0
    image_size: int | None = None
    image_mask_ratio: float | None = None
    text_mask_ratio: float | None = None
    options: dict | None = None
    text_vocab: str | None = None
    paired_share: float = 1.0
    device: str | None = None
    workers: int = 0
    shard: bool = False
    rank_timeout: int = 600
    strict: bool = False
    max_bad_steps: int = 10
    checkpoint_blocks: bool = False
    checkpoint_every: int = 500
    picture_every: int | None = None
    model_config: dict | None = None

    def __post_init__(self):
        if not isinstance(self.data, str) and not (
            isinstance(self.data, (list, tuple)) and self.data and all(isinstance(spec, str) for spec in self.data)
        ):
            raise TypeError(f"data must be a string or a list of strings, got {self.data!r}")
        _checks.choice("objective", self.objective, OBJECTIVES)
        _checks.choice("model", self.model, SIZES)
        _checks.choice("precision", self.precision, ("fp32", "bf16"))
        for name, low in {"steps": 1, "batch_size": 1, "warmup": 0, "image_size": 1, "picture_every": 0}.items():
            if getattr(self, name) is not None:
                _checks.integer(name, getattr(self, name), low)
        _checks.integer("accumulate", self.accumulate, 1)
        _checks.integer("seed", self.seed, 0, 2**31)
        _checks.integer("workers", self.workers, 0)
        _checks.integer("max_bad_steps", self.max_bad_steps, 0)
        _checks.integer("checkpoint_every", self.checkpoint_every, 0)
        _checks.integer("rank_timeout", self.rank_timeout, 1)
        _real("weight_decay", self.weight_decay, low_included=True)
        _real("grad_clip", self.grad_clip, low_included=True)
        _real("paired_share", self.paired_share)
        if self.paired_share > 1:
            raise ValueError(f"paired_share must be in (0, 1], got {self.paired_share}")
        _real("ema", self.ema, low_included=True, high=1.0)
        if self.epochs is not None:
            _real("epochs", self.epochs)
        if self.paired_share < 1 and self.objective in PAIRED:
            raise ValueError(f"paired_share must be 1 for {self.objective}, which trains on pairs alone")
        if self.lr is not None:
            _real("lr", self.lr)
        for name in ("image_mask_ratio", "text_mask_ratio"):
            if getattr(self, name) is not None:
                _real(name, getattr(self, name), low_included=True, high=1.0)
        if self.steps is not None and self.warmup is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps ({self.steps}), got {self.warmup}")

    def resolved(self, samples: int | None = None) -> RunConfig:
        """The same run with every None that stands for a default filled in, and absolute paths.

        Args:
            samples: of the data set, by which epochs become steps; None: it has no end, and epochs must be None.
        """
        values = dataclasses.asdict(self)
        defaults = dict(DEFAULTS[self.model])
        if self.model == "tiny" and self.objective in TINY_LR:
            defaults["lr"] = TINY_LR[self.objective]
        for name, value in defaults.items():
            if values[name] is None:
                values[name] = value
        batch = values["batch_size"] * self.accumulate
        if self.epochs is not None and self.steps is None:
            if samples is None:
                raise ValueError(
                    "epochs must be None (steps say how long) for data without an end, such as shapes, or streamed, "
                    f"got {self.epochs:g}"
                )
            values["steps"] = max(int(self.epochs * samples / batch), 1)
        if values["lr"] is None:
            values["lr"] = LR_PER_256 * batch / 256
        if values["warmup"] is None:
            values["warmup"] = values["steps"] // 10
        if values["picture_every"] is None:
            values["picture_every"] = max(values["steps"] // 4, 1)
        values["data"] = absolute(self.data) if isinstance(self.data, str) else [absolute(spec) for spec in self.data]
        if self.text_vocab is not None:
            values["text_vocab"] = os.path.abspath(self.text_vocab)
        return RunConfig(**values)

    def to_dict(self) -> dict:
        """All fields by name: what run.json holds."""
        return dataclasses.asdict(self)

    def identity(self) -> dict:
        """What two runs must share to give the same numbers."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE}

    def save(self, folder: Path) -> None:
        """Write `<folder>/run.json`, whole or not at all."""
        write_json(folder / "run.json", self.to_dict())

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Read `<folder>/run.json`. ValueError, naming the file: it is not one of ours."""
        path = folder / "run.json"
        values = read_json(path)
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path} has fields this version does not know: {', '.join(unknown)}")
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None


def _real(name: str, value: object, *, low_included: bool = False, high: float = math.inf) -> None:
    _checks.number(name, value)
    if not (value >= 0 if low_included else value > 0) or not value < high:  # both true for a NaN
        if high < math.inf:
            bounds = f"in {'[' if low_included else '('}0, {high:g})"
        else:
            bounds = f"finite and {'not negative' if low_included else 'positive'}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
