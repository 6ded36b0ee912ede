from m3ae_fast.ops.assemble_tokens.op import assemble_tokens

__all__ = ["assemble_tokens"]
