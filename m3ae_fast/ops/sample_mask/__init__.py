from m3ae_fast.ops.sample_mask.op import SampledMask, sample_mask

__all__ = ["SampledMask", "sample_mask"]
