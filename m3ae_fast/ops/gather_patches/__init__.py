from m3ae_fast.ops.gather_patches.op import gather_patches

__all__ = ["gather_patches"]
