"""Steps whose loss or gradient is not finite: not taken, counted, and their batches kept to be looked at."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from m3ae_fast._files import naming, read_tensors, write_tensors
from m3ae_fast._mixed_seed import mixed_seed
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.batch import ImageTextBatch
from m3ae_fast.train import distributed
from m3ae_fast.train.config import RunConfig
from m3ae_fast.train.precision import autocast

FORMAT = 1
KEPT = 10  # files of a run: the first steps to go wrong tell most
NOTE = (
    "a step of m3ae-fast pretrain that was not finite: m3ae_fast.train.load_bad_step(path) reads it, "
    ".replay(model) computes it again; images are [N, H, W, C] uint8, with grids their patches, text is packed"
)


class NotFinite(FloatingPointError):
    """A step's loss or gradient is not finite; nothing of the step is left in model and optimizer.

    Args:
        step: its number, counted from 1.
        values: its metrics by name.
        norm: of its gradient.
    """

    def __init__(self, step: int, values: dict[str, float], norm: float):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        super().__init__(f"step {step} is not finite ({shown}, gradient norm {norm:.4g}), and was not taken")
        self.step = step
        self.values = {name: value if math.isfinite(value) else None for name, value in values.items()}  # as JSON can


class BadSteps:
    """Counts a run's bad steps, and saves their batches as `<folder>/bad_steps/step-00000005.safetensors`; of several
    processes each saves its own, as `step-00000005-<process>.safetensors`.

    Args:
        folder: of the run.
        config: of the run: its seed, precision and max_bad_steps.
        total, in_a_row: bad steps so far in all, and since the last good one.
    """

    def __init__(self, folder: Path, config: RunConfig, total: int = 0, in_a_row: int = 0):
        self.folder, self.config = folder / "bad_steps", config
        self.total, self.in_a_row = total, in_a_row

    def add(self, bad: NotFinite, batches: list[ImageTextBatch]) -> None:
        """Count one more, save its batches and warn; raise FloatingPointError where it is one too many in a row."""
        self.total += 1
        self.in_a_row += 1
        process = f"-{distributed.rank()}" if distributed.world_size() > 1 else ""
        path = self.folder / f"step-{bad.step:08d}{process}.safetensors"
        if path.exists() or sum(1 for _ in self.folder.glob(f"step-{8 * '?'}{process}.safetensors")) < KEPT:
            save_bad_step(path, bad.step, self.config, str(bad), batches)
            kept = f"its batch is in {path}"
        else:
            kept = f"the batches of {KEPT} others are in {self.folder}"
        limit = self.config.max_bad_steps
        if self.in_a_row > limit:
            before = f", the {limit} before it neither" if limit else ""
            raise FloatingPointError(
                f"{bad}{before}: {kept} (m3ae_fast.train.load_bad_step reads it); a lower lr or a longer warmup may "
                "help in a new run, or --resume --max-bad-steps N"
            )
        if distributed.is_first():  # all of them know
            warnings.warn(f"{bad}; bad steps so far: {self.total}; {kept}", M3AEFastWarning, stacklevel=2)


class BadStep(NamedTuple):
    """A bad step, read back. batches: of its passes, on the CPU."""

    step: int  # counted from 1
    seed: int  # of the run: keys the masks, with the step and the samples' ids
    precision: str  # of `m3ae_fast.train.precision.DTYPES`
    reason: str  # what was not finite
    batches: list[ImageTextBatch]

    def replay(self, model: nn.Module) -> list:
        """The model's outputs for the batches, with the masks, random numbers and precision of the run.

        They are bitwise the run's own where the model has the weights it had then: bad steps change none, so
        `--resume --stop-after` the step before makes them. Of several processes, a model that compares pairs has here
        those of one of them alone.

        Args:
            model: of the run's objective, on any device.
        """
        device = next(model.parameters()).device
        torch.manual_seed(mixed_seed(self.seed, self.step - 1))
        with autocast(self.precision, device):
            return [model(batch.to(device), seed=self.seed, step=self.step - 1) for batch in self.batches]


def save_bad_step(path: Path, step: int, config: RunConfig, reason: str, batches: list[ImageTextBatch]) -> None:
    """Write a safetensors file: of each batch `<number>.images`, `.text`, `.text_lengths`, `.has_image`,
    `.sample_ids`, `.labels`, `.facts`, `.says`, `.grids`, as far as it has them; the rest is JSON in the metadata's
    entry `m3ae_fast`.

    Args:
        path: of the file; its folder is made if need be.
        step: counted from 1.
        config: of the run.
        reason: what was not finite.
        batches: of the step's passes.

    Raises:
        OSError: the file cannot be written (a full disk); it names the path and leaves nothing behind.
    """
    tensors = {f"{i}.{name}": value for i, batch in enumerate(batches) for name, value in _tensors(batch).items()}
    header = {"format": FORMAT, "note": NOTE, "step": step, "seed": config.seed, "precision": config.precision}
    header |= {"reason": reason, "batches": len(batches)}
    with naming(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_tensors(path, tensors, {"m3ae_fast": json.dumps(header)})


def load_bad_step(path: str | Path) -> BadStep:
    """Read a file of a run's folder bad_steps/ back.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: no such file. ValueError: it is not such a file, or it is cut short.
    """
    from safetensors import SafetensorError

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a bad step: no such file")
    try:
        metadata, tensors = read_tensors(path)
        header = json.loads(metadata.get("m3ae_fast", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is cut short or altered: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT or "reason" not in header:
        raise ValueError(f"{path} is a safetensors file, but not a bad step of m3ae_fast (format {FORMAT})")
    batches = []
    for i in range(header["batches"]):
        prefix = f"{i}."
        batches.append(_batch({name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}))
    return BadStep(header["step"], header["seed"], header["precision"], header["reason"], batches)


def _tensors(batch: ImageTextBatch) -> dict[str, Tensor]:
    found = {
        "text": batch.text,
        "text_lengths": torch.tensor(batch.text_lengths.lengths, device="cpu"),
        "has_image": torch.tensor(batch.has_image, device="cpu"),
        "sample_ids": batch.sample_ids,
    }
    if batch.images is not None:
        found["images"] = batch.images.permute(0, 2, 3, 1)  # as the loader has them in memory
    found |= {name: x for name in ("labels", "facts", "says") if (x := getattr(batch, name)) is not None}
    if batch.grids is not None:
        found["grids"] = torch.tensor(batch.grids, device="cpu")
    return found


def _batch(tensors: dict[str, Tensor]) -> ImageTextBatch:
    images, grids = tensors.get("images"), tensors.get("grids")
    return ImageTextBatch(
        None if images is None else images.permute(0, 3, 1, 2),
        tensors["text"],
        tensors["text_lengths"],
        has_image=tensors["has_image"].tolist(),
        sample_ids=tensors["sample_ids"],
        labels=tensors.get("labels"),
        facts=tensors.get("facts"),
        says=tensors.get("says"),
        grids=None if grids is None else grids.tolist(),
    )
