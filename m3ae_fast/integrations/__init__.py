"""m3ae_fast under the names and types of other libraries, and in their models. Import the one you need.

`flash_attn`: FlashAttention-2's functions. `xformers`: memory-efficient attention under a BlockDiagonalMask. `nested`:
jagged nested tensors in and out. None of these imports the library it is for.
`transformers`, `timm`: the models of these libraries, made faster where they stand.
"""

__all__ = ["flash_attn", "nested", "transformers", "xformers"]  # the API reference; timm needs a torchvision to be read
