from m3ae_fast.ops.restore_tokens.op import restore_tokens

__all__ = ["restore_tokens"]
