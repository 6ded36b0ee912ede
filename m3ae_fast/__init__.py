"""m3ae_fast: custom-kernel performance library for masked multimodal autoencoders (M3AE, MAE, MAMO).

The ops are here, with `SeqLens` and `ImageTextBatch`, which they and the models take. Layers: `m3ae_fast.nn`. Models:
`m3ae_fast.models`. Data sets: `m3ae_fast.data`. Pre-training: `m3ae_fast.train`. Tasks of a trained model:
`m3ae_fast.downstream`. Published weights: `m3ae_fast.convert`. Drop-ins for other libraries: `m3ae_fast.integrations`.
"""

import warnings

from m3ae_fast._interrupt import ends_the_command

with ends_the_command():
    try:
        import torch  # noqa: F401  before _C, so that its OpenMP symbols resolve to torch's own runtime: one thread pool
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError("m3ae_fast needs PyTorch: pip install torch (see README)", name="torch") from None

    from m3ae_fast import _backends
    from m3ae_fast._explain import __version__, explain
    from m3ae_fast._warning import M3AEFastWarning
    from m3ae_fast.batch import ImageTextBatch
    from m3ae_fast.ops import *  # noqa: F403
    from m3ae_fast.ops import __all__ as _ops
    from m3ae_fast.seqlens import SeqLens

__all__ = [*_ops, "ImageTextBatch", "M3AEFastWarning", "SeqLens", "__version__", "explain"]

_missing = _backends.LOADED["restore_tokens"].reasons.get("cpp")
if _missing:
    warnings.warn(f"every op runs on its slow reference: {_missing}", M3AEFastWarning, stacklevel=2)
