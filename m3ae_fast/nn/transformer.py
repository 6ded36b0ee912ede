"""The Transformer of MAE and M3AE over packed sequences, with LayerNorms before the branches; or BERT's."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3ae_fast.nn import block_node
from m3ae_fast.nn.attention import Attention, CrossAttention
from m3ae_fast.nn.linear import LayerNorm, Linear
from m3ae_fast.nn.rows import take_rows
from m3ae_fast.ops.linear.op import ACTIVATIONS
from m3ae_fast.seqlens import SeqLens


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))); of the hidden rows only fc1(x) is stored, except with "quick_gelu".

    Args:
        width: of the input and output rows. hidden: of the rows between.
        activation: "gelu_tanh" (M3AE), "gelu" (erf: MAE, timm) or "quick_gelu" (x sigmoid(1.702 x): OpenAI's CLIP; in
            operations of PyTorch, which keep three times as much).
    """

    def __init__(self, width: int, hidden: int, *, activation: str = "gelu_tanh"):
        super().__init__()
        self.quick_gelu = activation == "quick_gelu"
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width, input_activation=None if self.quick_gelu else activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        hidden = self.fc1(x)
        return self.fc2(hidden * (1.702 * hidden).sigmoid() if self.quick_gelu else hidden)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)); every residual add happens inside the LayerNorm that follows it.

    With `post_norm`, y = norm1(x), y = norm2(y + attn(y)), then y + mlp(y): the outputs of the LayerNorms are added to
    the branches, as in BERT. A layer of BERT begins after norm1: its last LayerNorm is the norm1 of the next block, or
    that of the Transformer.

    The backward pass recomputes the outputs of the LayerNorms: two passes over memory, which save a sixth of what a
    block would store.

    Args:
        width: D, a multiple of heads. mlp_ratio: hidden rows of the MLP, as a multiple of the width.
        activation: of the MLP, as of `Mlp`. eps: of the LayerNorms. post_norm: BERT's order.

    Attributes:
        drop_path: probability that a sequence skips attn and, drawn separately, that it skips the mlp, in training; it
            may be set at any time, for a whole Transformer by `drop_paths`.
    """

    def __init__(
        self, width: int, heads: int, *, mlp_ratio: float = 4.0, activation: str = "gelu_tanh", eps: float = 1e-6,
        post_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), activation=activation)
        self.drop_path = 0.0

    def forward(
        self,
        x: Tensor,
        seqlens: SeqLens,
        update: Tensor | None = None,
        rows: Tensor | None = None,
        rows_seqlens: SeqLens | None = None,
        apart: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [T, D], packed sequences of `seqlens` -> [T, D].

        Args:
            update: [T, D]: the block is applied to x + update; norm1 makes the sum.
            rows, rows_seqlens: (see Attention.forward) the result is of those rows alone; the others serve as keys and
                values.
            apart: return (x, update), whose sum is the result: the norm1 of the next block makes it.
        """
        asked = (x, seqlens) if rows is None else (rows, rows_seqlens)
        scales = self._scale(*asked), self._scale(*asked)
        layers = self._layers() if rows is None and not torch.compiler.is_compiling() else ()
        parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
        if parameters and block_node.takes(x, update, seqlens, parameters, self.attn.heads):
            settings = self.attn.heads, (self.norm1.eps, self.norm2.eps), self.mlp.fc2.input_activation or ""
            x, y = block_node.apply(x, update, seqlens, parameters, scales, settings)
            return (x, y) if apart else x + y
        if update is None:
            y = self.norm1(x)
        else:
            y, x = self.norm1(update, residual=x)
        goes_on = y if self.post_norm else x
        with self.norm1.recomputed(y, x):
            y = self.attn(y, seqlens, rows, rows_seqlens)
        residual = goes_on if rows is None else take_rows(goes_on, rows)
        y, x = self.norm2(block_node.scaled(y, scales[0]), residual=residual)
        goes_on = y if self.post_norm else x
        with self.norm2.recomputed(y, x):
            y = self.mlp(y)
        y = block_node.scaled(y, scales[1])
        return (goes_on, y) if apart else goes_on + y

    def _layers(self) -> tuple[LayerNorm | Linear, ...]:
        """norm1, qkv, proj, norm2, fc1, fc2, where calling the block's parts is calling these; else nothing."""
        untouched, attn, mlp = block_node.untouched, self.attn, self.mlp
        if self.post_norm or mlp.quick_gelu or not (untouched(attn, Attention) and untouched(mlp, Mlp)):
            return ()
        norms, linears = (self.norm1, self.norm2), (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        if not (all(untouched(x, LayerNorm) for x in norms) and all(untouched(x, Linear) for x in linears)):
            return ()
        if any(x.activation or (x.input_activation and x is not mlp.fc2) for x in linears):
            return ()
        if mlp.fc2.input_activation not in ACTIVATIONS:
            return ()
        return self.norm1, attn.qkv, attn.proj, self.norm2, mlp.fc1, mlp.fc2

    def _scale(self, rows: Tensor, seqlens: SeqLens) -> Tensor | None:
        """[T, 1]: 0 in some sequences, the others larger by as much as that costs in the mean (arXiv:1603.09382)."""
        if not self.training or not self.drop_path:
            return None
        kept = torch.rand(len(seqlens), device=rows.device) >= self.drop_path
        return (kept / (1 - self.drop_path)).repeat_interleave(seqlens.cu.diff(), output_size=len(rows))[:, None]


class CrossBlock(Block):
    """x + attn(norm1(x), context), then x + mlp(norm2(x)): rows attend to a context, never to one another.

    Args:
        width, heads, options: as of `Block`. context_width: of the context's rows, which are not normalized here.
    """

    def __init__(self, width: int, heads: int, *, context_width: int, **options):
        super().__init__(width, heads, **options)
        self.attn = CrossAttention(width, heads, context_width=context_width)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        seqlens: SeqLens,
        context_seqlens: SeqLens,
        update: Tensor | None = None,
        apart: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [T, D], context [S, context_width]: sequence b of one attends to sequence b of the other -> [T, D].

        Args:
            update, apart: as of `Block.forward`.
        """
        scales = self._scale(x, seqlens), self._scale(x, seqlens)
        if update is None:
            y = self.norm1(x)
        else:
            y, x = self.norm1(update, residual=x)
        with self.norm1.recomputed(y, x):
            y = self.attn(y, context, seqlens, context_seqlens)
        y, x = self.norm2(block_node.scaled(y, scales[0]), residual=x)
        with self.norm2.recomputed(y, x):
            y = self.mlp(y)
        y = block_node.scaled(y, scales[1])
        return (x, y) if apart else x + y


class Transformer(nn.Module):
    """`depth` blocks and a final LayerNorm.

    Args:
        width, heads, options: of each `Block`.

    Attributes:
        checkpoint: store only the input of each block, and run the block again in the backward pass: less memory, a
            third more work, the same bits. It may be set at any time, for a whole model by `checkpoint_blocks`.
    """

    BLOCK: ClassVar[type[Block]] = Block

    def __init__(self, width: int, depth: int, heads: int, **options):
        super().__init__()
        self.blocks = nn.ModuleList(self.BLOCK(width, heads, **options) for _ in range(depth))
        self.norm = LayerNorm(width, options.get("eps", 1e-6))
        self.checkpoint = False

    def forward(
        self, x: Tensor, seqlens: SeqLens, rows: Tensor | None = None, rows_seqlens: SeqLens | None = None
    ) -> Tensor:
        """x [T, D], packed sequences of `seqlens` -> [T, D], normalized.

        With `rows` [R] (ascending rows of x, `rows_seqlens` of them in each sequence) -> [R, D], those rows of the
        output: the last block computes no other.
        """
        update = None
        *first, last = self.blocks if len(self.blocks) else [None]
        for block in first:
            x, update = self._run(block, x, seqlens, update)
        if last is not None:
            x, update = self._run(last, x, seqlens, update, rows, rows_seqlens)
        elif rows is not None:
            x = take_rows(x, rows)
        return self.norm(x) if update is None else self.norm(update, residual=x)[0]

    def _run(self, block: Block, *args) -> tuple[Tensor, Tensor]:
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, apart=True, use_reentrant=False)
        return block(*args, apart=True)


class CrossTransformer(Transformer):
    """`depth` blocks whose rows attend to a context, and a final LayerNorm. A row's output depends on no other row.

    Args:
        width, heads, options: of each `CrossBlock`: context_width is one of them.
    """

    BLOCK = CrossBlock

    def forward(self, x: Tensor, context: Tensor, seqlens: SeqLens, context_seqlens: SeqLens) -> Tensor:
        """x [T, D], context [S, context_width]: sequence b of one attends to sequence b of the other -> [T, D]."""
        update = None
        for block in self.blocks:
            x, update = self._run(block, x, context, seqlens, context_seqlens, update)
        return self.norm(x) if update is None else self.norm(update, residual=x)[0]


def checkpoint_blocks(module: nn.Module, enabled: bool = True) -> None:
    """Gradient checkpointing: less memory for more work, the same bits.

    Args:
        module: a model, whose Transformers get `checkpoint = enabled`.
        enabled: False turns it off.
    """
    for each in module.modules():
        if isinstance(each, Transformer):
            each.checkpoint = enabled


def drop_paths(transformer: Transformer, rate: float) -> None:
    """Stochastic depth: the probability of skipping a block's branches grows over the blocks, from 0 to `rate`.

    Args:
        transformer: whose blocks are set. Which sequences skip a branch is drawn from torch's generator.
        rate: of the last block, in [0, 1); 0: none.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    for number, block in enumerate(transformer.blocks):
        block.drop_path = rate * number / max(len(transformer.blocks) - 1, 1)
