"""m3ae_fast under the names and types of other libraries. Import the one you need; none imports the library it is for.

`flash_attn`: FlashAttention-2's functions over packed sequences. `xformers`: memory-efficient attention under a
BlockDiagonalMask. `nested`: jagged nested tensors in and out.
"""
