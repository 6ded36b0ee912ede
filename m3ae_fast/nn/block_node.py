"""A block as one autograd node: bitwise identical to its seven ops, at half their host time.

An op by itself checks its arguments, looks for whatever traces or wraps them, and leaves an autograd node, with views
and casts before the next. A block does all that once. One gradient is not identical: that of bfloat16 rows without an
update is a sum of two, which is rounded once, where autograd rounds one of the two and then the sum.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from m3ae_fast import _backends
from m3ae_fast._autograd import differentiable_once, link
from m3ae_fast._backends import accumulator, direct, for_product, plain, product_dtype
from m3ae_fast.ops.layer_norm.op import BACKENDS as LAYER_NORM
from m3ae_fast.ops.layer_norm.op import _layer_norm, _layer_norm_backward
from m3ae_fast.ops.linear.op import BACKENDS as LINEAR
from m3ae_fast.ops.linear.op import _linear, _linear_backward
from m3ae_fast.ops.varlen_attention.choice import pick as pick_attention
from m3ae_fast.ops.varlen_attention.op import BACKENDS as ATTENTION
from m3ae_fast.ops.varlen_attention.op import _varlen_attention, _varlen_attention_packed_backward
from m3ae_fast.seqlens import SeqLens

# Private to torch, so it may be missing: then there are taken to be hooks, always: slower, not wrong.
hooks_on_all = getattr(nn.modules.module, "_has_any_global_hook", lambda: True)
# Where the node's inputs are among those that may need a gradient: x, update, then weight and bias of each layer.
NORM1, QKV, PROJ, NORM2, FC1, FC2, INPUTS = range(2, 16, 2)


def untouched(module: nn.Module, kind: type) -> bool:
    """Whether calling the module is calling kind.forward and nothing else: a subclass or a hook may do more."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def takes(x: Tensor, update: Tensor | None, seqlens: SeqLens, parameters: list[Tensor | None], heads: int) -> bool:
    """Whether the node can take these: nothing traces or wraps them, kernels run every op, no product has to cast its
    rows, and the sizes are a block's. What it does not take goes through the ops, which say what is wrong with it."""
    rows = [x] if update is None else [x, update]
    if type(seqlens) is not SeqLens or hooks_on_all() or not plain((*rows, *parameters)):
        return False
    width, hidden = x.shape[-1] if x.dim() == 2 else 0, parameters[FC1 - NORM1].shape[0]
    sizes = (
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,),
    )  # fmt: skip
    if rows[-1].shape != x.shape or any(p is not None and p.shape != n for p, n in zip(parameters, sizes, strict=True)):
        return False
    parameters = [p for p in parameters if p is not None]
    if any(each.device != x.device for each in (*rows, *parameters, seqlens.cu)):
        return False
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    weights = tuple(p.dtype for p in parameters)
    return _kernels_take(_backends._FORCED, device, width, heads, autocast, weights, tuple(each.dtype for each in rows))


@functools.cache
def _kernels_take(
    impl: str | None, device: str, width: int, heads: int, autocast: torch.dtype | None,
    weights: tuple[torch.dtype, ...], rows: tuple[torch.dtype, ...],
) -> bool:  # fmt: skip
    dtypes = {*weights, *rows} if autocast is None else {*weights, *rows, autocast}
    if torch.float64 in dtypes and len(dtypes) > 1:
        return False
    if autocast is None and functools.reduce(torch.promote_types, dtypes) not in rows:
        return False
    if not all(dtype.is_floating_point for dtype in dtypes):
        return False
    shapes = ((LAYER_NORM, (width,)), (LINEAR, (width,)), (ATTENTION, (heads, width // heads)))
    return all(_backends.has_kernels(op, impl, device, shape, *dtypes) for op, shape in shapes)


def apply(
    x: Tensor, update: Tensor | None, seqlens: SeqLens, parameters: list[Tensor | None], scales: tuple, settings: tuple
) -> tuple[Tensor, Tensor]:
    """(s, y): s = x + update + attn(norm1(x + update)), y = mlp(norm2(s)), [T, D] each.

    Args:
        parameters: weight and bias of norm1, qkv, proj, norm2, fc1, fc2.
        scales: of the two branches, [T, 1] or None: what each is multiplied with on its way out.
        settings: heads, (eps of norm1, eps of norm2), activation on the way into fc2 ("": none).
    """
    s, y, _ = _BlockNode.apply(settings, seqlens, scales, x, update, *parameters)
    return s, y


def scaled(y: Tensor, scale: Tensor | None) -> Tensor:
    """y * scale, in y's dtype; None: y."""
    return y if scale is None else (y * scale).to(y.dtype)


class _BlockNode(torch.autograd.Function):
    """What the LayerNorms put out is not kept, but made again in the backward pass."""

    @staticmethod
    def forward(ctx, settings, seqlens, scales, x, update, *parameters):
        norm1, qkv, proj, norm2, fc1, fc2 = zip(parameters[::2], parameters[1::2], strict=True)
        norm1, norm2 = ([_cast(p, accumulator(x.dtype)) for p in norm] for norm in (norm1, norm2))
        cu, longest, (heads, eps, activation) = seqlens.cu, seqlens.max, settings

        h, s1, stats1, to_norm = _norm(x, update, *norm1, eps[0])
        h, w_qkv, to_product = _product(h, *qkv)
        packed = h.view(len(h), 3, heads, h.shape[1] // (3 * heads))
        to_attention = pick_attention(ATTENTION, None, packed, longest)
        out, stats = _varlen_attention(direct(to_attention), *packed.unbind(1), cu, None, longest, longest, None)
        h, w_proj, _ = _product(out.flatten(1), *proj)
        h, s2, stats2, _ = _norm(s1, scaled(h, scales[0]), *norm2, eps[1])
        hidden, w_fc1, _ = _product(h, *fc1)
        y, w_fc2, _ = _product(hidden, *fc2, activation)

        to_node = link(y)  # s2 would not do: it may need no gradient
        ctx.save_for_backward(s1, stats1, packed, out, stats, s2, stats2, hidden, *norm1, *norm2, w_qkv, w_proj, w_fc1,
                              w_fc2, cu, *scales, to_node)  # fmt: skip
        ctx.settings, ctx.longest, ctx.impl, ctx.others = settings, longest, to_norm, (to_product, to_attention)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, update, *parameters)]
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[3 : 3 + NORM2]):
            ctx.mark_non_differentiable(s2)
        return s2, scaled(y, scales[1]), to_node

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, ds, dy, *_):
        (s1, stats1, packed, out, stats, s2, stats2, hidden, *norms, w_qkv, w_proj, w_fc1, w_fc2, cu, scale1,
         scale2, _) = saved  # fmt: skip
        to_norm, (to_product, to_attention) = ctx.impl, map(type(ctx.impl), ctx.others)
        (_, eps, activation), need, grads = ctx.settings, ctx.needs_input_grad[3:], [None] * INPUTS

        def product(layer, dy, x, weight, activation=""):
            """The gradient of x, where something before the layer needs it; its parameters' go to grads."""
            needs = any(need[:layer]), *need[layer : layer + 2]
            dx, *grads[layer : layer + 2] = _linear_backward(
                to_product, dy.contiguous(), x, weight, None, "", activation, *needs
            )
            return dx

        def norm(layer, dy, ds, s, stats, weight):
            """The gradient of s, likewise."""
            needs = any(need[:layer]), any(need[layer : layer + 2])
            ds, params = _layer_norm_backward(to_norm, dy, _cast(ds, s.dtype), s, weight, stats, *needs)
            if needs[1]:
                grads[layer : layer + 2] = params.unbind(0)
            return ds

        def normalized(s, weight, bias, eps):
            return _layer_norm(to_norm, s, None, weight, bias, eps, packed.dtype)[0]

        if dy is not None:
            dh = product(FC2, scaled(dy, scale2), hidden, w_fc2, activation)
            if any(need[:FC2]):
                dh = product(FC1, dh, normalized(s2, *norms[2:], eps[1]), w_fc1)
            if any(need[:FC1]):
                ds = norm(NORM2, dh, ds, s2, stats2, norms[2])
        if ds is not None and any(need[:NORM2]):
            dh = product(PROJ, scaled(_cast(ds, packed.dtype), scale1), out.view_as(s1), w_proj)
            if any(need[:PROJ]):
                dpacked = _varlen_attention_packed_backward(
                    to_attention, dh.view_as(out), None, packed, out, stats, cu, ctx.longest, None
                )
                dh = product(QKV, dpacked.view(len(s1), 3 * s1.shape[1]), normalized(s1, *norms[:2], eps[0]), w_qkv)
            if any(need[:QKV]):
                ds = norm(NORM1, dh, ds, s1, stats1, norms[0])
            grads[:NORM1] = ds, ds
        grads = [_cast(g, dtype) if needed else None for g, dtype, needed in zip(grads, ctx.dtypes, need, strict=True)]
        return None, None, None, *grads


def _norm(x, update, weight, bias, eps):
    """(LayerNorm of x + update, x + update, statistics, the backend)."""
    if update is None:
        rows, residual, dtype = x.contiguous(), None, product_dtype(x)
    else:
        rows, residual, dtype = update.contiguous(), x.contiguous(), product_dtype(update, x)
    impl = _backends.pick(LAYER_NORM, None, rows)
    y, s, stats = _layer_norm(direct(impl), rows, residual, weight, bias, eps, dtype)
    return y, rows if update is None else s, stats, impl


def _product(x, weight, bias, activation=""):
    """(f(x) W^T + b, the weight as its backend takes it, the backend)."""
    impl, x, weight, bias = for_product(LINEAR, None, x, weight, bias)
    weight = weight.contiguous()
    y, _ = _linear(direct(impl), x, weight, None if bias is None else bias.contiguous(), "", activation, False)
    return y, weight, impl


def _cast(x, dtype):
    if x is None:
        return None
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()
