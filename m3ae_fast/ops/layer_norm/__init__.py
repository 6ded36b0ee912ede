from m3ae_fast.ops.layer_norm.op import layer_norm

__all__ = ["layer_norm"]
