"""A run's numbers: `metrics.jsonl`, a row a step, and TensorBoard, which has its pictures and settings, too."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from m3ae_fast._files import naming, replacing
from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data.images import EncodedImage


class Metrics:
    """Appends a row a step to `<folder>/metrics.jsonl` and to TensorBoard (`<folder>/tensorboard`).

    A value that is not finite is None (null), and left out of TensorBoard. `bad_steps` counts the steps skipped so far.

    Args:
        folder: of the run.
        step: steps already taken: later rows, left by a run that died after its last checkpoint, are dropped.
    """

    def __init__(self, folder: Path, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        _truncate(self.path, step)
        with naming(self.path):
            self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  closed by __exit__
        self._board_path = folder / "tensorboard"
        with naming(self._board_path):
            self._board = SummaryWriter(self._board_path, purge_step=step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_) -> None:
        with naming(self.path):
            self._file.close()
        with naming(self._board_path):
            self._board.close()

    def write(self, row: dict) -> None:
        with naming(self.path):
            self._file.write(json.dumps(row) + "\n")
        with naming(self._board_path):
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row["step"])

    def describe(self, settings: dict, names: list[str]) -> None:
        """The run's hyperparameters, for TensorBoard's table of runs beside one another.

        Args:
            settings: of `RunConfig.to_dict`; those of model_config are called model.NAME.
            names: numbers of the rows that the table shows, too.
        """
        from torch.utils.tensorboard.summary import hparams

        settings = settings | {f"model.{name}": value for name, value in settings["model_config"].items()}
        shown = {name: value for name, value in settings.items() if name not in ("model_config", "options")}
        plain = {name: value if isinstance(value, str | float | int | None) else json.dumps(value)
                 for name, value in shown.items()}  # fmt: skip
        with naming(self._board_path):
            for summary in hparams(plain, dict.fromkeys(names, 0)):
                self._board.file_writer.add_summary(summary)

    def add_picture(self, kind: str, path: Path, step: int) -> None:
        """A picture of the run, into TensorBoard.

        Args:
            kind: its name there. path: of the PNG. step: steps taken.
        """
        with naming(self._board_path):
            self._board.add_image(kind, EncodedImage(path, path.name).decoded(), step, dataformats="HWC")

    def flush(self) -> None:
        """Everything written so far is on the disk: called before a checkpoint that counts on it."""
        with naming(self.path):
            self._file.flush()
            if self.path.is_file():
                os.fsync(self._file.fileno())
        with naming(self._board_path):
            self._board.flush()


def read(path: Path) -> list[dict]:
    """The whole rows of a metrics.jsonl, up to the first broken one; [] where there is no file."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a process that was killed
                break
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                break
            rows.append(row)
    return rows


def _truncate(path: Path, step: int) -> None:
    """Keep the rows of steps 1 .. step."""
    if not path.is_file() and step == 0:
        return
    kept = [row for row in read(path) if row["step"] <= step]
    if len(kept) != step:
        warnings.warn(
            f"{path} has {len(kept)} of the {step} rows that the checkpoint counts on: the rest is lost",
            M3AEFastWarning,
            stacklevel=4,
        )
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
