from m3ae_fast.ops.linear.op import linear

__all__ = ["linear"]
