"""varlen_attention on the CPU: csrc/ops/varlen_attention."""

from m3ae_fast._cpp import _C


def forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, out, stats):
    _C.varlen_attention(
        q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k, scale=scale, out=out, stats=stats
    )  # fmt: skip


def backward(dout, dlse, q, k, v, out, stats, cu_q, cu_k, max_q, max_k, scale, dq, dk, dv):
    _C.varlen_attention_backward(
        dout=dout, dlse=dlse, q=q, k=k, v=v, out=out, stats=stats, cu_q=cu_q, cu_k=cu_k, scale=scale, dq=dq, dk=dk,
        dv=dv,
    )  # fmt: skip
