"""The ops. A folder each: op.py (public function, validation, autograd), reference.py (the definition), backends."""

from m3ae_fast.ops.restore_tokens import restore_tokens

__all__ = [
    "restore_tokens",
]
