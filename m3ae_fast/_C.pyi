"""Types of m3ae_fast._C, made by `python .ci/stubs.py`. Outputs are arguments; None: one is not wanted."""

from collections.abc import Sequence

from torch import Tensor

def active_isa() -> str: ...
def assemble_tokens(
    *,
    image_tokens: Tensor | None,
    text_tokens: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    cu_image: Tensor | None,
    cu_text: Tensor | None,
    cls_token: Tensor | None,
    text_embedding: Tensor | None,
    image_position: Tensor | None,
    text_position: Tensor | None,
    image_type: Tensor | None,
    text_type: Tensor | None,
    out: Tensor | None,
) -> None: ...
def assemble_tokens_backward(
    *,
    dout: Tensor | None,
    text_tokens: Tensor | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    cu_image: Tensor | None,
    cu_text: Tensor | None,
    has_cls: bool,
    image_rows: int,
    text_rows: int,
    dimage: Tensor | None,
    dtext: Tensor | None,
    dparts: Tensor | None,
    dembedding: Tensor | None,
    dimage_position: Tensor | None,
    dtext_position: Tensor | None,
) -> None: ...
def available_isas() -> list[str]: ...  # instruction sets that this build and machine have, slowest first
def feature_regression(
    *,
    pred: Tensor | None,
    target: Tensor | None,
    rows: Tensor | None,
    cu_seqlens: Tensor | None,
    distance: str,
    normalize: bool,
    eps: float,
    reduction: str,
    loss: Tensor | None,
    dpred: Tensor | None,
) -> None: ...
def gather_patches(
    *,
    images: Tensor | None,
    ids: Tensor | None,
    cu: Tensor | None,
    patch_size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    out: Tensor | None,
) -> None: ...
def gather_patches_backward(
    *,
    dout: Tensor | None,
    ids: Tensor | None,
    cu: Tensor | None,
    patch_size: int,
    scale: Sequence[float],
    dimages: Tensor | None,
) -> None: ...
def layer_norm(
    *,
    x: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor | None,
    s: Tensor | None,
    stats: Tensor | None,
) -> None: ...
def layer_norm_backward(
    *,
    dy: Tensor | None,
    ds: Tensor | None,
    s: Tensor | None,
    weight: Tensor | None,
    stats: Tensor | None,
    dx: Tensor | None,
    dparams: Tensor | None,
) -> None: ...
def linear(
    *,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    input_activation: str,
    products: int,
    y: Tensor | None,
    z: Tensor | None,
) -> None: ...
def linear_backward(
    *,
    dy: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    z: Tensor | None,
    activation: str,
    input_activation: str,
    products: int,
    dz: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None: ...
def linear_cross_entropy(
    *,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor | None,
    cu_seqlens: Tensor | None,
    class_weight: Tensor | None,
    dloss: Tensor | None,
    dlse: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    lse_square_scale: float,
    products: int,
    loss: Tensor | None,
    hit: Tensor | None,
    lse: Tensor | None,
    z_loss: Tensor | None,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
) -> None: ...
def masked_mse(
    *,
    pred: Tensor | None,
    images: Tensor | None,
    ids_mask: Tensor | None,
    cu_mask: Tensor | None,
    patch_size: int,
    norm_pix: bool,
    scale: Sequence[float],
    shift: Sequence[float],
    reduction: str,
    loss: Tensor | None,
    error: Tensor | None,
) -> None: ...
def masked_mse_backward(
    *,
    dloss: Tensor | None,
    error: Tensor | None,
    cu_mask: Tensor | None,
    reduction: str,
    dpred: Tensor | None,
) -> None: ...
def num_threads() -> int: ...  # threads a kernel may use: torch.set_num_threads rules it

openmp: bool

def philox4x32(arg0: Sequence[int], arg1: Sequence[int]) -> list[int]: ...  # the four words of a counter and a key
def products_of(
    like: Tensor | None,
    precision: str,
    intel: bool = False,
) -> int: ...  # who multiplies, and what: Products of csrc/cpu/isa.h; intel: whether the CPU is Intel's
def restore_tokens(
    *,
    kept: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    image_mask_token: Tensor | None,
    text_mask_token: Tensor | None,
    image_position: Tensor | None,
    text_position: Tensor | None,
    image_type: Tensor | None,
    text_type: Tensor | None,
    out: Tensor | None,
) -> None: ...
def restore_tokens_backward(
    *,
    dout: Tensor | None,
    rows: Tensor | None,
    slots: Tensor | None,
    kept_rows: int,
    patches: int,
    words: int,
    dkept: Tensor | None,
    dsums: Tensor | None,
    dimage_position: Tensor | None,
    dtext_position: Tensor | None,
) -> None: ...
def sample_mask(
    *,
    cu: Tensor | None,
    cu_keep: Tensor | None,
    sample_ids: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    shared: bool,
    ids_keep: Tensor | None,
    ids_mask: Tensor | None,
) -> None: ...
def set_isa(name: str) -> None: ...  # '' takes the best this machine has
def set_products(name: str) -> None: ...  # '' takes the fastest, 'torch' its, 'own' ours
def unavailable_isas() -> dict[str, str]: ...  # the other instruction sets, each with the reason
def varlen_attention(
    *,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int | None,
    max_k: int | None,
    scale: float | None,
    out: Tensor | None,
    stats: Tensor | None,
) -> None: ...
def varlen_attention_backward(
    *,
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    stats: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    scale: float | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None: ...
