from m3ae_fast.ops.masked_mse.op import masked_mse

__all__ = ["masked_mse"]
