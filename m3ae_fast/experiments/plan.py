"""What is trained, what each table compares, and what the paper (arXiv:2205.14204) says of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from m3ae_fast.models import OBJECTIVES
from m3ae_fast.train import RunConfig

IMAGE_SIZE = 48
WIDTHS = {"narrow": (64, 2), "": (128, 4), "wide": (192, 6)}  # width and heads
SIZES = {
    "depth": 4,
    "text_depth": 2,
    "decoder_width": 64,
    "decoder_depth": 1,
    "decoder_heads": 2,
}  # of whoever has them

# What differs from M3AE at text ratio 75 % with all captions; "size" is a key of WIDTHS, "options" are of the model.
RUNS: dict[str, dict] = {
    "pixels": {},
    "m3ae": {},
    "mae": {"objective": "mae"},
    "clip": {"objective": "clip"},
    "supervised": {"objective": "supervised"},
    "untrained": {"objective": "mae"},  # an MAE's encoder as it is drawn
    **{f"m3ae-paired-{percent}": {"paired_share": percent / 100} for percent in (10, 20, 30)},
    **{f"m3ae-ratio-{percent}": {"text_mask_ratio": percent / 100} for percent in (15, 50, 90)},
    **{
        f"m3ae-decoder-{name}": {"size": "narrow", "options": {"decoder_depth": 2} | options}
        for name, options in {
            "full": {},
            "part": {"predict_ratio": 1 / 3},
            "words": {"predict_ratio": [1 / 3, 1.0]},
            "cross": {"decoder": "cross"},
            "cross-part": {"decoder": "cross", "predict_ratio": 1 / 3},
        }.items()
    },
    **{f"{kind}-{size}": {"objective": kind, "size": size} for size in ("narrow", "wide") for kind in ("mae", "m3ae")},
}


class Row(NamedTuple):
    """Of a table."""

    label: str  # in the table
    run: str  # a key of RUNS
    paper: float | None = None  # its figure for this row, percent


class Table(NamedTuple):
    """Runs side by side."""

    title: str
    note: str  # what the paper's figures are, and ours where the title does not say it
    rows: tuple[Row, ...]
    scores: tuple[str, ...] = ("linear",)  # keys of a run's scores


LINEAR = "The paper's: ImageNet, linear classification, top-1"
TABLES: dict[str, Table] = {
    "objectives": Table(
        "Linear classification",
        f"{LINEAR}. CLIP and supervised are trained with their models' own settings, half the learning rate and the "
        "erf GELU",
        (
            Row("pixels, 12 x 12", "pixels"),
            Row("untrained", "untrained"),
            Row("MAE", "mae", 44.6),
            Row("M3AE", "m3ae", 61.3),
            Row("CLIP", "clip", 69.0),
            Row("supervised", "supervised", 81.8),
        ),
    ),
    "paired": Table(
        "Share of the images that have captions",
        LINEAR,
        (
            Row("10 %", "m3ae-paired-10", 53.3),
            Row("20 %", "m3ae-paired-20", 54.0),
            Row("30 %", "m3ae-paired-30", 54.5),
            Row("100 %", "m3ae", 58.8),
        ),
    ),
    "ratio": Table(
        "Share of the words that are masked",
        LINEAR,
        (
            Row("15 %", "m3ae-ratio-15", 45.9),
            Row("50 %", "m3ae-ratio-50", 61.0),
            Row("75 %", "m3ae", 64.1),
            Row("90 %", "m3ae-ratio-90", 63.9),
        ),
    ),
    "sizes": Table(
        "Size of the model",
        "The paper says that M3AE is above MAE at S, B and L and grows with size; its figures are not known here",
        tuple(
            Row(f"{kind.upper()}, width {width}", f"{kind}-{size}" if size else kind)
            for size, (width, _) in WIDTHS.items()
            for kind in ("mae", "m3ae")
        ),
    ),
    "decoder": Table(
        "What the decoder rebuilds, and from what",
        "Width 64; all decoders have two blocks here. CrossMAE (arXiv:2401.14391) finds no loss on ImageNet, of "
        "images alone",
        (
            Row("full", "m3ae-decoder-full"),
            Row("a third of the masked tokens", "m3ae-decoder-part"),
            Row("a third of the masked patches, all words", "m3ae-decoder-words"),
            Row("cross", "m3ae-decoder-cross"),
            Row("cross, a third", "m3ae-decoder-cross-part"),
        ),
    ),
    "ood": Table(
        "Out of distribution: AUROC, 50 by chance",
        "The paper says that M3AE is above MAE; its figures are not known here. Near: images of the four colors that "
        "the classifier was not fitted to, told from those of the other eight; every model was trained on images of "
        "all twelve, supervised with their labels, M3AE and CLIP with captions that name them. Far: scenes of `shapes`",
        (Row("MAE", "mae"), Row("M3AE", "m3ae"), Row("CLIP", "clip"), Row("supervised", "supervised")),
        ("near softmax", "near Mahalanobis", "far softmax", "far Mahalanobis"),
    ),
}


class Claim(NamedTuple):
    """The paper's `text`: the run `high` scores above the run `low`."""

    table: str
    text: str
    high: str
    low: str
    score: str = "linear"


CLAIMS = (
    Claim("objectives", "MAE is above an untrained encoder", "mae", "untrained"),
    Claim("objectives", "M3AE is above MAE", "m3ae", "mae"),
    Claim("objectives", "CLIP is above M3AE", "clip", "m3ae"),
    Claim("objectives", "supervised training is above CLIP", "supervised", "clip"),
    Claim("paired", "captions for a tenth of the images help", "m3ae-paired-10", "mae"),
    Claim("paired", "20 % are above 10 %", "m3ae-paired-20", "m3ae-paired-10"),
    Claim("paired", "30 % are above 20 %", "m3ae-paired-30", "m3ae-paired-20"),
    Claim("paired", "100 % are above 30 %", "m3ae", "m3ae-paired-30"),
    Claim("ratio", "masking 50 % of the words is better than 15 %", "m3ae-ratio-50", "m3ae-ratio-15"),
    Claim("ratio", "75 % is better than 50 %", "m3ae", "m3ae-ratio-50"),
    Claim("ratio", "90 % is better than 15 %", "m3ae-ratio-90", "m3ae-ratio-15"),
    Claim("sizes", "M3AE is above MAE at width 64", "m3ae-narrow", "mae-narrow"),
    Claim("sizes", "M3AE is above MAE at width 192", "m3ae-wide", "mae-wide"),
    Claim("sizes", "M3AE grows from width 64 to 192", "m3ae-wide", "m3ae-narrow"),
    *(Claim("ood", f"M3AE is above MAE, {score}", "m3ae", "mae", score) for score in TABLES["ood"].scores),
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        steps: of every run. batch_size: of a step.
        train, test: images that probes are fitted to and scored on.
    """

    steps: int = 1200
    batch_size: int = 64
    train: int = 4000
    test: int = 2000

    @classmethod
    def smoke(cls) -> Scale:
        """A run of seconds, only to check that everything works."""
        return cls(steps=3, batch_size=8, train=60, test=60)


UNTRAINED = ("pixels", "untrained")


def config_of(name: str, seed: int, scale: Scale) -> RunConfig:
    """One run.

    Args:
        name: a key of RUNS. seed: of its data, weights and masks. scale: how long it is.
    """
    changes = dict(RUNS[name])
    objective = changes.pop("objective", RunConfig.objective)
    width, heads = WIDTHS[changes.pop("size", "")]
    fields = {field.name for field in dataclasses.fields(OBJECTIVES[objective][1])}
    options = {name: value for name, value in (SIZES | {"width": width, "heads": heads}).items() if name in fields}
    options |= changes.pop("options", {})
    return RunConfig(
        data="cluttered", objective=objective, model="tiny", image_size=IMAGE_SIZE, options=options, seed=seed,
        steps=scale.steps, batch_size=scale.batch_size, device="cpu", checkpoint_every=500, picture_every=0, **changes,
    )  # fmt: skip


def runs_of(tables: list[str]) -> list[str]:
    """The runs that tables need, each once, in the order of RUNS."""
    needed = {row.run for table in tables for row in TABLES[table].rows}
    needed |= {run for claim in CLAIMS if claim.table in tables for run in (claim.high, claim.low)}
    return [name for name in RUNS if name in needed]
