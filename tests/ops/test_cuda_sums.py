"""Sums over rows in CUDA: in one launch, whose last blocks add up what all have left (csrc/cuda/partials.cuh)."""

import ctypes
import itertools

import pytest
import torch

from m3ae_fast import SeqLens, _backends, assemble_tokens, layer_norm, masked_mse, restore_tokens, testing

PAIRS = [(device, impl) for device in testing.devices() for impl in testing.impls("layer_norm", device)]
pytestmark = [
    pytest.mark.parametrize(("device", "impl"), [pair for pair in PAIRS if pair[1] == "cuda"]),
    pytest.mark.usefixtures("poison"),
]


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def norm(rows, width):
    return layer_norm, testing.Call((random(rows, width), random(width, seed=1), random(width, seed=2)))


def restore(rows, width):
    places = torch.arange(rows)
    kept = torch.where(places % 3 == 0, places // 3, -1).int()
    names = "image_mask_token", "text_mask_token", "image_type", "text_type"
    params = {name: random(width, seed=i) for i, name in enumerate(names)}
    positions = {name: random(4, width) for name in ("image_position", "text_position")}
    call = testing.Call((random(-(-rows // 3), width), kept, (places % 8).int()), params | positions)
    return restore_tokens, call


def assemble(rows, width):
    options = {name: random(width, seed=i) for i, name in enumerate(("cls_token", "image_type", "text_type"))}
    options |= {"cu_image": SeqLens([rows - 12, 4]), "cu_text": SeqLens([3, 3])}
    return assemble_tokens, testing.Call((random(rows - 8, width), random(6, width)), options)


def mse(rows, width):
    images = torch.randint(0, 256, (1, width, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ids = (torch.arange(rows) % 9).int()
    call = testing.Call((random(rows, width), images, ids, SeqLens([rows])), {"patch_size": 1, "reduction": "sum"})
    return masked_mse, call


# A block's rows: layer_norm 8 (one at a time where they have more than 1280 columns, or no multiple of 4), tokens 64,
# masked_mse 4 at a time in at most 1320 blocks. Sixteen blocks are a group.
SIZES = {
    "no row": (norm, 0, 8),
    "one block": (norm, 7, 8),
    "one group": (norm, 8 * 15 + 1, 8),
    "a full group": (norm, 8 * 16, 8),
    "three groups, the last incomplete": (norm, 8 * 36 + 5, 132),
    "sixteen groups, blocks of more rows": (norm, 8 * 300, 4),
    "threes": (norm, 8 * 36 + 5, 7),
    "wide": (norm, 8 * 17 + 1, 1284),
    "restore: one block": (restore, 64, 40),
    "restore: three groups, two tiles": (restore, 64 * 35 + 3, 132),
    "restore: three groups, threes": (restore, 64 * 35 + 3, 35),
    "assemble: one block": (assemble, 64, 40),
    "assemble: three groups, two tiles": (assemble, 64 * 35 + 3, 132),
    "assemble: three groups, threes": (assemble, 64 * 35 + 3, 35),
    "mse: one block": (mse, 3, 3),
    "mse: blocks of one turn": (mse, 1001, 8),
    "mse: rows in turn": (mse, 1320 * 4 + 11, 3),
}


def zeros(device):
    """Whether all that the stream's blocks count with is zero: only the emulator's memory can be looked at."""
    from m3ae_fast import _cuda_module

    address, _ = _cuda_module.counters(torch.empty(0, device=device), 256)
    return not _backends.EMULATED or not any((ctypes.c_uint32 * 256).from_address(address))


@pytest.mark.parametrize("name", SIZES)
def test_sums_are_right_and_always_the_same(device, impl, name):
    make, rows, width = SIZES[name]
    function, call = make(rows, width)
    call = call.on(device)
    first = call.run(function, impl=impl)
    references = (each.run(function, impl="reference") for each in (call, call.to(torch.float64)))
    testing.assert_error_rules(first, *references)
    assert zeros(device)
    assert_same_bits(first, call.run(function, impl=impl))
    if _backends.EMULATED:  # the first block is the last to finish
        import _cuda_emulated

        _cuda_emulated.reverse(True)
        try:
            assert_same_bits(first, call.run(function, impl=impl))
        finally:
            _cuda_emulated.reverse(False)
    assert zeros(device)


def assert_same_bits(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True))


@pytest.mark.parametrize("name", ["three groups, the last incomplete", "restore: three groups, two tiles"])
def test_a_launch_may_have_counters_of_its_own(device, impl, name, monkeypatch):
    from m3ae_fast import _cuda_module

    make, rows, width = SIZES[name]
    function, call = make(rows, width)
    call = call.on(device)
    expected = call.run(function, impl=impl)
    monkeypatch.setattr(_cuda_module._cuda, "counters", lambda device, stream, count: 0)
    assert_same_bits(expected, call.run(function, impl=impl))


def test_graphs_and_streams_do_not_share_counters(device, impl):
    if _backends.EMULATED:
        pytest.skip("CUDA graphs need a GPU")
    function, call = norm(8 * 36 + 5, 132)
    call = call.on(device)
    cotangent = testing.cotangent(call.args[0].detach())

    def run():
        y = function(*call.args, impl=impl)
        return [y], list(torch.autograd.grad(y, call.leaves(), cotangent))

    expected, graph = run(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    for _ in range(2):
        for x in result[0] + result[1]:
            x.data.fill_(torch.nan)
        graph.replay()
        assert_same_bits(expected, result)
        assert_same_bits(expected, run())


def test_every_stream_has_counters_of_its_own(device, impl):
    from m3ae_fast._cuda_module import _cuda

    if not _backends.EMULATED:
        pytest.skip("streams that do not exist")
    rows = [_cuda.counters(7, stream, 256) for stream in range(100, 357)]
    assert all(later - row == 1024 for row, later in itertools.pairwise(rows[:256]))
    assert rows[256] == 0 and _cuda.counters(7, 103, 1) == rows[3] and _cuda.counters(7, 103, 257) == 0
    assert _cuda.counters(8, 2, 1) == 0 != _cuda.counters(8, 0, 1)  # cudaStreamPerThread is many streams
