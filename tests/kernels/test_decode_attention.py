import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import decode_attention

from kernel_runs import backend_in_use
from numerics import assert_as_accurate_as_eager, assert_written

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it compiled")


def inputs(batch, heads, slots, dim, dtype=torch.float32, device="cpu", ragged=True):
    """q, and the caches as views of one storage (layer, 2, B, H, T, D), NaN behind each length."""
    storage = torch.full((2, 2, batch, heads, slots, dim), float("nan"), device=device)
    lengths = torch.randint(1, slots + 1, (batch,)) if ragged else torch.full((batch,), slots - 3)
    for row, length in enumerate(lengths.tolist()):
        storage[:, :, row, :, :length] = torch.randn(2, 2, heads, length, dim)
    q = torch.randn(batch, 1, heads, dim, device=device).to(dtype).transpose(1, 2)
    return q, *storage.to(dtype)[1], lengths.to(device)


def check(q, k, v, lengths, real=None) -> None:
    """The reference multiplies what lies behind a length by 0, so it gets zeros there."""
    out = decode_attention(q, k, v, lengths, real)
    assert_written(out)
    clean = (q, k.nan_to_num(0.0), v.nan_to_num(0.0), lengths, real)
    assert_as_accurate_as_eager(out, reference.decode_attention, *clean)


def holes(batch, slots, device="cpu"):
    real = torch.rand(batch, slots, device=device) > 0.4
    real[:, 0] = True
    return real


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4, 256, 128), (3, 2, 67, 40)])
@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_matches_reference(shape, dtype, ragged, padded, device):
    args = inputs(*shape, dtype, device, ragged)
    check(*args, holes(shape[0], shape[2], device) if padded else None)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2, 600, 128), (5, 4, 40, 24), (2, 1, 1, 16)])
@pytest.mark.parametrize("padded", [True, False])
def test_triton_interpreted(shape, dtype, padded):
    """Batch 1 splits 600 slots into parts, of which some hold nothing; 20 heads take one part."""
    with backend_in_use("decode_attention", "triton"):
        check(*inputs(*shape, dtype), holes(shape[0], shape[2]) if padded else None)


@interpreted
def test_triton_interpreted_without_lengths():
    q, k, v, _ = inputs(2, 2, 520, 64, torch.float16)
    with backend_in_use("decode_attention", "triton"):
        check(q, torch.randn_like(k), torch.randn_like(v), None)


@interpreted
def test_a_part_of_the_cache_without_a_valid_key_weighs_nothing():
    q, k, v, _ = inputs(1, 2, 600, 64, torch.float16, ragged=False)
    for length in (1, 64, 65, 330):
        lengths = torch.tensor([length])
        with backend_in_use("decode_attention", "triton"):
            check(q, k.nan_to_num(7.0), v.nan_to_num(7.0), lengths)


@interpreted
@pytest.mark.parametrize("slots, launches", [(512, 0), (513, 1)])
def test_few_slots_are_not_split(slots, launches, monkeypatch):
    """Up to 512 a second launch costs more than it saves."""
    module = pytest.importorskip("internvl_engine.kernels.triton.decode_attention")
    combined, combine = [], module.combine
    monkeypatch.setattr(module, "combine", lambda *args: combined.append(combine(*args)))
    q, k, v, lengths = inputs(1, 2, slots, 16, torch.float16, ragged=False)
    with backend_in_use("decode_attention", "triton"):
        check(q, k, v, lengths)
    assert len(combined) == launches


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_empty(backend):
    if backend not in kernels.backends("decode_attention")["CPU"]:
        pytest.skip("triton is not interpreted here")
    q, k, v, lengths = inputs(2, 2, 9, 16)
    with kernels.prefer("decode_attention", backend):
        out = decode_attention(q[:0], k[:0], v[:0], lengths[:0])
    assert out.shape == (0, 2, 1, 16)


@pytest.mark.gpu
def test_a_cuda_graph_follows_the_lengths():
    q, k, v, lengths = inputs(2, 4, 300, 128, torch.bfloat16, "cuda")
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    decode_attention(q, k, v, lengths)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths)
    lengths.fill_(77)
    graph.replay()
    torch.testing.assert_close(out, decode_attention(q, k, v, lengths), rtol=0, atol=0)


@interpreted
def test_triton_reads_lengths_of_any_stride():
    q, k, v, _ = inputs(3, 2, 40, 16, torch.float16, ragged=False)
    k, v = k.nan_to_num(0.5), v.nan_to_num(0.5)
    lengths = torch.tensor([[5, 1], [9, 1], [40, 1]])[:, 0]
    with backend_in_use("decode_attention", "triton"):
        check(q, k, v, lengths)
        check(q, k, v, lengths[1].expand(3))


def test_rejects_what_does_not_fit():
    q, k, v, lengths = inputs(2, 2, 9, 16)
    with pytest.raises(ValueError, match=r"\(B, H, 1, D\)"):
        decode_attention(q.expand(-1, -1, 2, -1), k, v, lengths)
    with pytest.raises(ValueError, match="lengths must be integers"):
        decode_attention(q, k, v, lengths.float())
    with pytest.raises(ValueError, match=r"bool of shape \(2, 9\)"):
        decode_attention(q, k, v, lengths, torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(q.half(), k, v, lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [True, False])
def test_without_lengths_every_slot_is_valid(dtype, padded, device):
    q, k, v, _ = inputs(2, 3, 67, 40, dtype, device)
    k, v = torch.randn_like(k), torch.randn_like(v)
    check(q, k, v, None, holes(2, 67, device) if padded else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_are_not_contiguous(dtype, device):
    q = torch.randn(2, 3, 16, 1, device=device).to(dtype).mT
    k, v = (torch.randn(2, 3, 16, 9, device=device).to(dtype).mT for _ in range(2))
    check(q, k, v, torch.tensor([9, 4], device=device))


@pytest.mark.parametrize("length", [0, -1, 10])
def test_a_length_outside_the_cache_is_refused(length):
    q, k = torch.randn(2, 3, 1, 16), torch.randn(2, 3, 9, 16)
    with pytest.raises(IndexError, match=rf"length {length} is outside \[1, 9\]"):
        decode_attention(q, k, k, torch.tensor([4, length]))


def test_wrong_dimensions_are_named():
    k = torch.randn(2, 3, 9, 16)
    with pytest.raises(ValueError, match=r"q must be \(B, H, 1, D\)"):
        decode_attention(torch.randn(2, 3, 16), k, k, torch.tensor([4, 4]))
