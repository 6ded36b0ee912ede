"""layer_norm on the CPU: csrc/ops/layer_norm."""

from m3ae_fast._cpp import _C


def forward(x, residual, weight, bias, eps, dtype, y, s, stats):
    _C.layer_norm(x=x, residual=residual, weight=weight, bias=bias, eps=eps, y=y, s=s, stats=stats)


def backward(dy, ds, s, weight, stats, need_input, need_params, dx, dparams):
    _C.layer_norm_backward(dy=dy, ds=ds, s=s, weight=weight, stats=stats, dx=dx, dparams=dparams)
