"""RunConfig: everything a pre-training run is made of, saved in the run's folder as run.json."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from m3ae_fast._files import read_json, write_json
from m3ae_fast._settings import check, documented, free, setting
from m3ae_fast.data.specs import absolute, is_streamed, listed, without_place
from m3ae_fast.data.vocabularies import is_name
from m3ae_fast.models import OBJECTIVES, M3AEConfig, MAMOConfig, Model
from m3ae_fast.models.config import SIZES
from m3ae_fast.train.precision import DTYPES

# What None stands for, by size. tiny is set to show learning within three minutes on two cores, with the learning rate
# of `Model.TINY_LR`; the others follow arXiv:2205.14204: 1.5e-4 for every 256 samples of a step.
DEFAULTS = {size: {"steps": 100_000, "batch_size": 64} for size in SIZES}
DEFAULTS["tiny"] = {"steps": 1200, "batch_size": 32}
LR_PER_256 = 1.5e-4

RESOLVED = ("steps", "batch_size", "lr", "warmup", "picture_every", "model_config")  # never None in a run's files

# Titles of the command line's options.
RUN = "the run"
OPTIMIZER = "the optimizer (AdamW .9, .95; warm-up, then a cosine to 0)"
FILES = "where, and how far"
MACHINE = "the machine"

# What None stands for, in words.
_TINY, _OTHERS = DEFAULTS["tiny"], DEFAULTS["small"]
_STEPS, _BATCH_SIZE = (f"default: tiny {_TINY[name]:,}, others {_OTHERS[name]:,}" for name in ("steps", "batch_size"))
_RATES = {}  # at size tiny, each with the objectives that have it
for _name, (_model, _) in OBJECTIVES.items():
    _RATES.setdefault(f"{_model.TINY_LR:g}", []).append(_name.upper())
*_some, _rest = _RATES
_TINY_LR = " or ".join([*(f"{rate} ({', '.join(_RATES[rate])})" for rate in _some), _rest])
_LR = f"default: tiny {_TINY_LR}, others {LR_PER_256:g} for 256 samples of a step"


@documented
@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A pre-training run. None stands for the model's default; `resolved()` fills it in.

    Raises:
        ValueError: a value out of its range, naming it. TypeError: not a number.
    """

    data: str | list[str] = setting(
        "shapes", "shapes or cluttered (synthetic, built in), a folder of NAME.jpg + NAME.txt, hf:DIR, FILE.h5, "
        "FILE.jsonl, 'x-{00..11}.tar', or a URL of shards (docs/data.md). Several, in Python a list, are mixed by "
        "weights (1), such as A.h5=3; after a command, or a URL with a ?, =WEIGHT follows a space", RUN,
        "SPEC[=WEIGHT]",
    )  # fmt: skip
    objective: str = setting(next(iter(OBJECTIVES)), "the model and its losses", RUN, choices=OBJECTIVES)
    model: str = setting("tiny", "the model's size", RUN, choices=tuple(SIZES))
    steps: int | None = setting(None, f"optimizer steps; {_STEPS}", RUN, "N", "[1, inf)")
    epochs: float | None = setting(
        None, "passes over the data, instead of steps", RUN, "E", "(0, inf)",
        instead_of="steps",
    )  # fmt: skip
    batch_size: int | None = setting(
        None, "samples of a forward pass, over all processes: a multiple of their number, which may differ when "
        f"resuming; {_BATCH_SIZE}", RUN, "B", "[1, inf)",
    )  # fmt: skip
    accumulate: int = setting(1, "forward passes per step", RUN, "N", "[1, inf)")
    seed: int = setting(0, "seed of weights, data order and masks", RUN, "S", f"[0, {2**31})")
    precision: str = setting(
        "fp32", "bf16: autocast, with weights and optimizer state in fp32; fp16: the same with loss scaling, on a GPU",
        RUN, choices=tuple(DTYPES),
    )  # fmt: skip
    lr: float | None = setting(None, f"peak learning rate; {_LR}", OPTIMIZER, "LR", "(0, inf)")
    warmup: int | None = setting(None, "linear warm-up steps; default: a tenth of all", OPTIMIZER, "STEPS", "[0, inf)")
    weight_decay: float = setting(0.05, "weight decay of weight matrices", OPTIMIZER, "W", "[0, inf)")
    grad_clip: float = setting(1.0, "clip the gradient to this norm; 0: no clipping", OPTIMIZER, "NORM", "[0, inf)")
    ema: float = setting(
        0.0, "decay of a moving average of the weights, such as 0.9999; the average is then what other commands use "
        "(`m3ae_fast.train.average`); 0: no average", OPTIMIZER, "DECAY", "[0, 1)",
    )  # fmt: skip
    image_size: int | tuple[int, int] | None = setting(
        None, "pixels a side, or height x width, such as 128x256; default: the model's", RUN, "PIXELS", "[1, inf)"
    )
    max_patches: int | None = setting(
        None, "for m3ae and mae: images keep their aspect, each resized to at most this many patches, in one packed "
        "batch (docs/images.md); default: all are cropped to image_size", RUN, "N", "[1, inf)",
    )  # fmt: skip
    image_mask_ratio: float | None = setting(None, "share of patches masked; default: the model's", RUN, "R", "[0, 1)")
    text_mask_ratio: float | None = setting(None, "share of words masked; default: the model's", RUN, "R", "[0, 1)")
    masking: str | None = setting(
        None, "how masked tokens are chosen: sample to dirichlet are for m3ae and mae (docs/masking.md), the others "
        "for mamo; default: sample or two_pass", RUN, choices=(*M3AEConfig.MASKINGS, *MAMOConfig.MASKINGS),
    )  # fmt: skip
    options: dict | None = setting(
        None, "other fields of the model's configuration, such as mim_weight=0", RUN, "NAME=VALUE", flag="--set"
    )
    init: str | None = setting(
        None, "start from the weights of this run, checkpoint or converted file, and use its configuration and "
        "vocabulary", RUN, "RUN",
    )  # fmt: skip
    text_vocab: str | None = setting(
        None, "vocab.txt or tokenizer.json, a folder with one, or the name of a model in Hugging Face's cache, such as "
        "bert-base-uncased; default: WordPiece trained on the data's captions", RUN, "FILE|NAME",
    )  # fmt: skip
    paired_share: float = setting(
        1.0, "share of images that keep their captions, the same ones in every epoch", RUN, "S", "(0, 1]"
    )
    val_share: float = setting(
        0.0, "share of the samples held out for validation, the same ones whatever the seed", RUN, "S", "[0, 1)"
    )
    val_data: str | None = setting(
        None, "data to validate on instead, as --data takes them; shapes and cluttered give other scenes", RUN, "SPEC",
        free=True,
    )  # fmt: skip
    device: str | None = setting(None, "where to train; default: cuda if there is one, else cpu", MACHINE, free=True)
    workers: int = setting(
        0, "processes that load data, for each process that trains", MACHINE, "N", "[0, inf)", free=True
    )
    shard: bool = setting(
        False, "with several processes (torchrun), each keeps a share of the weights, gradients and optimizer state "
        "(FSDP2); default: each keeps all (DDP)", MACHINE, action=argparse.BooleanOptionalAction, free=True,
    )  # fmt: skip
    rank_timeout: int = setting(
        600, "seconds that a process waits for the others before it gives up", MACHINE, "SECONDS", "[1, inf)", free=True
    )
    strict: bool = setting(False, "stop at a sample that cannot be read, instead of replacing it", MACHINE, free=True)
    max_bad_steps: int = setting(
        10, "how many steps in a row may have a loss or gradient that is not finite: they are skipped and counted, "
        "and one more ends the run; 0: stop at the first", FILES, "N", "[0, inf)", free=True,
    )  # fmt: skip
    checkpoint_blocks: bool = setting(
        False, "gradient checkpointing: less memory for more work, bitwise identical", MACHINE, free=True
    )
    cuda_graphs: bool = setting(
        False, "launch the forward and backward pass of m3ae or mae as CUDA graphs, on one GPU: the same losses to "
        "rounding, less work for the host (docs/trainers.md)", MACHINE, free=True,
    )  # fmt: skip
    checkpoint_every: int = setting(
        500, "steps between checkpoints; 0: only at the end", FILES, "STEPS", "[0, inf)", free=True
    )
    val_every: int = setting(
        500, "steps between validations on val_share or val_data; 0: only at the end", FILES, "STEPS", "[0, inf)",
        free=True,
    )  # fmt: skip
    knn_every: int = setting(
        0, "steps between k-NN probes of the class token on what val_share or val_data holds out, for data with "
        "classes, and one at the end; 0: none", FILES, "STEPS", "[0, inf)", free=True,
    )  # fmt: skip
    knn_samples: int = setting(
        1000, "training samples that vote in a k-NN probe, and at most as many held-out samples that are classified",
        FILES,
        "N", "[1, inf)", free=True,
    )  # fmt: skip
    picture_every: int | None = setting(
        None, "steps between pictures; 0: only at the end; default: a quarter of all", FILES, "STEPS", "[0, inf)",
        free=True,
    )  # fmt: skip
    model_config: dict | None = setting(None, "all fields of the model's configuration; filled in when the run is made")

    def __post_init__(self):
        if not isinstance(self.data, str) and not (
            isinstance(self.data, (list, tuple)) and self.data and all(isinstance(spec, str) for spec in self.data)
        ):
            raise TypeError(f"data must be a string or a list of strings, got {self.data!r}")
        check(self)
        if isinstance(self.image_size, tuple):  # as it is read back from run.json
            object.__setattr__(self, "image_size", list(self.image_size))
        if self.val_share and self.val_data is not None:
            raise ValueError(f"val_share must be 0 beside val_data, got {self.val_share:g}")
        if self.val_data is not None and is_streamed(self.val_data):
            raise ValueError(f"val_data must not be streamed, got {self.val_data}")
        if self.knn_every and not self.val_share and self.val_data is None:
            raise ValueError(
                f"knn_every must be 0 without val_share or val_data, which hold out what is classified, "
                f"got {self.knn_every}"
            )
        if self.paired_share < 1 and self.model_class.CAPTIONS == "required":
            raise ValueError(f"paired_share must be 1 for {self.objective}, which trains on pairs alone")
        if self.cuda_graphs and not self.model_class.BUCKETS:
            raise ValueError(f"cuda_graphs must be False for {self.objective}, whose plans have no buckets")
        if self.max_patches is not None and not self.model_class.MIXED_SIZES:
            raise ValueError(f"max_patches must be None for {self.objective}, which reads images of one size")
        if self.cuda_graphs and self.max_patches is not None:
            raise ValueError("cuda_graphs must be False with max_patches: every batch has images of other sizes")
        if self.cuda_graphs and self.checkpoint_blocks:
            raise ValueError("cuda_graphs must be False with checkpoint_blocks, which looks at random numbers' state")
        if self.steps is not None and self.warmup is not None and self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps ({self.steps}), got {self.warmup}")

    @property
    def model_class(self) -> type[Model]:
        """The objective's model, which says what it needs."""
        return OBJECTIVES[self.objective][0]

    @property
    def images(self) -> dict:
        """As `ModelConfig.images`, of a run whose model_config is filled in."""
        return OBJECTIVES[self.objective][1].from_dict(self.model_config).images

    def resolved(self, samples: int | None = None) -> RunConfig:
        """The same run with every None that stands for a default filled in, and absolute paths.

        Args:
            samples: in the data set, to convert epochs to steps; None: it is endless, and epochs must be None.
        """
        values = dataclasses.asdict(self)
        for name, value in DEFAULTS[self.model].items():
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
            values["lr"] = self.model_class.TINY_LR if self.model == "tiny" else LR_PER_256 * batch / 256
        if values["warmup"] is None:
            values["warmup"] = values["steps"] // 10
        if values["picture_every"] is None:
            values["picture_every"] = max(values["steps"] // 4, 1)
        values["data"] = absolute(self.data) if isinstance(self.data, str) else [absolute(spec) for spec in self.data]
        if self.val_data is not None:
            values["val_data"] = absolute(self.val_data)
        if self.init is not None:
            values["init"] = os.path.abspath(self.init)
        if self.text_vocab is not None and not is_name(self.text_vocab):
            values["text_vocab"] = os.path.abspath(self.text_vocab)
        return RunConfig(**values)

    def to_dict(self) -> dict:
        """All fields by name: what run.json holds."""
        return dataclasses.asdict(self)

    def identity(self) -> dict:
        """What two runs must share to give the same numbers: not the place of the data."""
        shared = {name: value for name, value in self.to_dict().items() if name not in free(type(self))}
        names = [without_place(spec) for spec in listed(self.data)]
        return shared | {"data": names[0] if isinstance(self.data, str) else names}

    def save(self, folder: Path) -> None:
        """Write `<folder>/run.json`, whole or not at all."""
        write_json(folder / "run.json", self.to_dict())

    @classmethod
    def load(cls, folder: Path) -> RunConfig:
        """Read `<folder>/run.json`. ValueError, naming the file: it is not one of ours."""
        path = folder / "run.json"
        return cls.from_dict(read_json(path), path)

    @classmethod
    def from_dict(cls, values: dict, path: Path) -> RunConfig:
        """What `to_dict` made of a resolved run, read from a file. ValueError, naming it: it is not one of ours."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{path} has fields this version does not know: {', '.join(unknown)}")
        try:
            config = cls(**values)
            missing = [name for name in RESOLVED if getattr(config, name) is None]
            if not missing:
                OBJECTIVES[config.objective][1].from_dict(config.model_config)
                missing = [name for name in ("image_size", "vocab_size") if name not in config.model_config]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None
        if missing:
            raise ValueError(f"{path} must say {', '.join(missing)}")
        return config
