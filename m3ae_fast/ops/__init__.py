"""The ops. A folder each: op.py (public function, validation, autograd), reference.py (the definition), backends."""

from m3ae_fast.ops.linear import linear
from m3ae_fast.ops.linear_cross_entropy import linear_cross_entropy
from m3ae_fast.ops.restore_tokens import restore_tokens

__all__ = [
    "linear",
    "linear_cross_entropy",
    "restore_tokens",
]
