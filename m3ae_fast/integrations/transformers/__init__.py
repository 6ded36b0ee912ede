"""Hugging Face Transformers: its own models, made faster where they stand.

    from m3ae_fast.integrations.transformers import accelerate
    accelerate(model)  # ViTMAEForPreTraining, FlavaForPreTraining, or any model that holds one of their modules

Written for transformers 5.23.
"""

from typing import TypeVar

import transformers
from torch import nn

from m3ae_fast.integrations import _swap

try:
    from m3ae_fast.integrations.transformers import flava, vit_mae
except AttributeError as error:  # a class has another name there
    raise ImportError(f"this is written for transformers 5.23, got {transformers.__version__}: {error}") from error

__all__ = ["accelerate", "restore"]

M = TypeVar("M", bound=nn.Module)

_FAST = flava.FAST | vit_mae.FAST


def accelerate(model: M) -> M:
    """Make the ViTMAE and FLAVA modules inside `model` faster, in place: same parameters, state dict, arguments and
    outputs (but for the logits that `flava.FlavaForPreTraining` leaves out of a training step).

    The classes of the modules are exchanged for subclasses of the same names; parameters, buffers, hooks, the device
    and the training mode stay as they are. What the fast modules cannot do (docs/integrations/transformers.md) they
    leave to Transformers' own code, and say so once in an `M3AEFastWarning`. Calling it twice changes nothing.

    Args:
        model: a model of ViTMAE or FLAVA, or a module that holds one or some of its layers.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` holds none of the modules that can be accelerated; subclasses of them are left alone.
    """
    _swap.accelerate(model, _FAST)
    return model


def restore(model: M) -> M:
    """Undo `accelerate`: every module gets Transformers' own class back. Returns `model` itself."""
    _swap.restore(model, _FAST)
    return model
