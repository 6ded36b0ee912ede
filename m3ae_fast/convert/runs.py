"""Converted models as what `load_run` takes: a checkpoint of step 0, or a folder of it and its vocabulary."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m3ae_fast.models import Model, ModelConfig
from m3ae_fast.models.config import SIZES

if TYPE_CHECKING:
    from m3ae_fast.data import Tokenizer


def run_fields(objective: str, config: ModelConfig) -> dict[str, Any]:
    """The fields of a RunConfig that trains nothing; its size is the one of SIZES that it has, "small" if none."""
    from m3ae_fast.train import RunConfig  # the train extra

    named = ("width", "depth", "heads")
    sizes = {name: {key: value for key, value in fields.items() if key in named} for name, fields in SIZES.items()}
    size = next((name for name, fields in sizes.items() if dataclasses.replace(config, **fields) == config), "small")
    fields = json.loads(json.dumps(config.to_dict()))  # as they will be when read back
    return RunConfig(objective=objective, model=size, model_config=fields).resolved().to_dict()


def write_run(folder: Path, objective: str, model: Model, tokenizer: Tokenizer | None) -> None:
    """Write a folder that `load_run` and `RunConfig(init=...)` take: a checkpoint of step 0, and the vocabulary.

    Args:
        folder: made if need be. tokenizer: None where the model reads no words.
    Raises:
        FileExistsError: it holds a run already. OSError: it cannot be written.
    """
    from m3ae_fast._files import naming
    from m3ae_fast.train import checkpoint, run

    run.refuse_used(folder)
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run.prepare_folder(folder, tokenizer)
    checkpoint.save(
        checkpoint.step_path(folder / "checkpoints", 0), 0, run_fields(objective, model.config), model, None
    )
