"""Self- and cross-attention over packed sequences."""

from __future__ import annotations

from torch import Tensor, nn

from m3ae_fast.nn.linear import Linear
from m3ae_fast.nn.rows import take_rows
from m3ae_fast.ops import linear, varlen_attention, varlen_attention_qkvpacked
from m3ae_fast.seqlens import SeqLens


def _head_dim(width: int, heads: int) -> int:
    if heads < 1 or width % heads:
        raise ValueError(f"width must be a multiple of heads, got width {width} and {heads} heads")
    return width // heads


class Attention(nn.Module):
    """Multi-head self-attention; parameters named and shaped as timm's (`qkv` [3D, D], `proj` [D, D]).

    Args:
        width: D, a multiple of heads. qkv_bias: whether the first product has a bias.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True):
        super().__init__()
        self.heads, self.head_dim = heads, _head_dim(width, heads)
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(
        self, x: Tensor, seqlens: SeqLens, rows: Tensor | None = None, rows_seqlens: SeqLens | None = None
    ) -> Tensor:
        """x [T, D], packed sequences of `seqlens` -> [T, D].

        With `rows` [R] (ascending rows of x, `rows_seqlens` of them in each sequence) only those rows are queries, over
        all keys: -> [R, D], the same numbers as `forward(x, seqlens)[rows]` for less work.
        """
        if rows is None:
            qkv = self.qkv(x).view(-1, 3, self.heads, self.head_dim)
            return self.proj(varlen_attention_qkvpacked(qkv, seqlens).flatten(1))
        width = self.heads * self.head_dim
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            (None, None) if p is None else p.split([width, 2 * width]) for p in (self.qkv.weight, self.qkv.bias)
        )
        q = linear(take_rows(x, rows), q_weight, q_bias).view(-1, self.heads, self.head_dim)
        k, v = linear(x, kv_weight, kv_bias).view(-1, 2, self.heads, self.head_dim).unbind(1)
        return self.proj(varlen_attention(q, k, v, rows_seqlens, seqlens).flatten(1))


class CrossAttention(nn.Module):
    """Queries from one packed batch, keys and values from another: sequence b attends to context sequence b.

    Args:
        width: D of the queries, a multiple of heads. context_width: of the context rows, default D.
        qkv_bias: whether the products that make queries, keys and values have biases.
    """

    def __init__(self, width: int, heads: int, *, context_width: int | None = None, qkv_bias: bool = True):
        super().__init__()
        self.heads, self.head_dim = heads, _head_dim(width, heads)
        self.q = Linear(width, width, bias=qkv_bias)
        self.kv = Linear(context_width or width, 2 * width, bias=qkv_bias)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, seqlens: SeqLens, context_seqlens: SeqLens) -> Tensor:
        """x [T, D], context [S, Dc] -> [T, D]."""
        q = self.q(x).view(-1, self.heads, self.head_dim)
        k, v = self.kv(context).view(-1, 2, self.heads, self.head_dim).unbind(1)
        return self.proj(varlen_attention(q, k, v, seqlens, context_seqlens).flatten(1))
