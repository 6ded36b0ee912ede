"""What a run computes in (RunConfig.precision): autocast, float16's loss scale, and what a device does not do well."""

from __future__ import annotations

import warnings

import torch

from m3ae_fast._warning import M3AEFastWarning

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # of products; parameters are always fp32


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass: one of DTYPES, on the device."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def loss_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """What keeps small gradients above float16's smallest number; disabled in any other precision."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def check(precision: str, device: torch.device) -> None:
    """ValueError: the device does not compute in it. A warning: it saves no time there (docs/scale.md)."""
    if device.type != "cpu" or precision == "fp32":
        return
    if precision == "fp16":
        raise ValueError("precision must be fp32 or bf16 on a CPU, for which there are no float16 kernels, got fp16")
    from m3ae_fast import _cpp

    if not _cpp.multiplies_bf16():
        warnings.warn(
            "bf16 saves no time on this CPU, which has no instructions for it (AVX512_BF16 or AMX): it takes as long "
            "as --precision fp32, or longer",
            M3AEFastWarning,
            stacklevel=3,
        )
