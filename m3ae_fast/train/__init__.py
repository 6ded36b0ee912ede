"""Pre-training: the trainer, its schedule, checkpoints that resume bitwise identical, metrics and pictures."""

import importlib.util

EXTRA = ("PIL", "tokenizers", "safetensors", "tqdm", "filelock", "tensorboard", "matplotlib")
_missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
if _missing:  # now, not after an hour of training
    raise ModuleNotFoundError(
        f"m3ae_fast.train needs {', '.join(_missing)}: pip install '.[train]', or 'm3ae_fast[train]'", name=_missing[0]
    )

from m3ae_fast.train.bad_steps import BadStep, load_bad_step  # noqa: E402
from m3ae_fast.train.config import RunConfig  # noqa: E402
from m3ae_fast.train.recipes import RECIPES  # noqa: E402
from m3ae_fast.train.run import Run, load_run  # noqa: E402
from m3ae_fast.train.schedule import learning_rate  # noqa: E402
from m3ae_fast.train.summary import Summary  # noqa: E402
from m3ae_fast.train.trainer import Trainer, make_optimizer, pretrain  # noqa: E402

__all__ = [
    "RECIPES",
    "BadStep",
    "Run",
    "RunConfig",
    "Summary",
    "Trainer",
    "learning_rate",
    "load_bad_step",
    "load_run",
    "make_optimizer",
    "pretrain",
]
