import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import qk_norm_attention

from kernel_runs import backend_in_use
from numerics import (
    assert_as_accurate_as_eager,
    assert_gradient_as_accurate_as_eager,
    assert_written,
)

EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTERPRETED = [torch.float32, torch.float16]  # bf16 is wrong there: triton issue 11584
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it compiled")


def inputs(shape, dtype=torch.float32, device="cpu", norm=True, outliers=0):
    B, N, H, D = shape
    qkv = torch.randn(B, N, 3, H, D, device=device)
    if outliers:  # of q and k: activations of 1000 times the typical size in a few channels
        qkv.view(B, N, 3, -1)[:, :, :2, torch.randperm(H * D)[:outliers]] *= 1000
    weights = [None, None]
    if norm:
        weights = [(torch.rand(H * D, device=device) + 0.5).to(dtype) for _ in range(2)]
    floats = [x if x is None else x.requires_grad_() for x in (qkv.to(dtype), *weights)]
    return *floats, EPS


@pytest.fixture
def triton_small_tiles(monkeypatch):
    """Triton on CPU tensors, in tiles so small that few tokens are several tiles and blocks."""
    module = pytest.importorskip("internvl_engine.kernels.triton.qk_norm_attention")
    config = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    for table in ("FORWARD", "QUERIES", "KEYS"):
        small = dict.fromkeys(("wide", "narrow", "fp32"), {"sm90": config})
        monkeypatch.setattr(module, table, small)
    with backend_in_use("qk_norm_attention", "triton"):
        yield


def check(*args) -> None:
    out = qk_norm_attention(*args)
    assert_written(out)
    assert_as_accurate_as_eager(out, reference.qk_norm_attention, *args)
    assert_gradient_as_accurate_as_eager(qk_norm_attention, reference.qk_norm_attention, *args)


# The model's token count, an odd head size, and tokens that are less than a tile.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 257, 4, 64), (1, 70, 3, 40), (2, 5, 2, 128)])
@pytest.mark.parametrize("norm", [True, False])
def test_matches_reference(shape, dtype, norm, device):
    check(*inputs(shape, dtype, device, norm))


@pytest.mark.parametrize("shape", [(2, 257, 3, 128), (1, 70, 3, 40), (3, 1, 2, 16)])
@pytest.mark.parametrize("norm", [True, False])
def test_inference_in_bfloat16(shape, norm, device):
    """Without a gradient the CPU has another backend, which rounds as eager does."""
    args = inputs(shape, torch.bfloat16, device, norm)
    with torch.no_grad():
        out = qk_norm_attention(*args)
    assert out.is_contiguous()
    assert_as_accurate_as_eager(out, reference.qk_norm_attention, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 15, 16, 32, 33, 65])
def test_heads_of_64_without_norms(tokens, dtype, device):
    """Around whole vectors and panels of keys, whose rest must not count; large scores."""
    qkv, *rest = inputs((2, tokens, 3, 64), dtype, device, norm=False)
    qkv = torch.cat((qkv[:, :, :2] - 3, qkv[:, :, 2:]), 2)  # every score far above 0
    for x in (qkv.detach(), qkv.detach() * 0):
        out = qk_norm_attention(x, *rest)
        assert_written(out)
        assert_as_accurate_as_eager(out, reference.qk_norm_attention, x, *rest)
    x = qkv.detach() * torch.tensor([-1.0, 1, 1], device=device).to(dtype).view(3, 1, 1)  # below 0
    out = qk_norm_attention(x, *rest)
    assert_as_accurate_as_eager(out, reference.qk_norm_attention, x, *rest)
    x[0, 0, 0, 0, 0] = torch.nan
    assert qk_norm_attention(x, *rest).isnan().any(-1).sum() == 1


@interpreted
@pytest.mark.parametrize("dtype", INTERPRETED)
@pytest.mark.parametrize(
    "tokens, heads, dim, norm",
    [
        (33, 2, 32, True),  # one key more than whole blocks, and a tail tile of one row
        (49, 1, 16, False),  # a key more than whole blocks of 16, half a tile of rows more
        (45, 2, 24, True),  # nothing divides, nor is the head size a power of two
        (32, 1, 128, True),  # everything divides
    ],
)
def test_triton_interpreted(tokens, heads, dim, norm, dtype, triton_small_tiles):
    check(*inputs((1, tokens, heads, dim), dtype, norm=norm))


@interpreted
def test_triton_reads_as_many_images_at_a_time_as_the_cache_holds(triton_small_tiles, monkeypatch):
    """The norms of two images, their attention, those of the next two: the last is one alone."""
    module = pytest.importorskip("internvl_engine.kernels.triton.qk_norm_attention")
    image = 3 * 9 * 2 * 16 * 4
    monkeypatch.setattr(module, "cache_bytes", lambda device: 3 * image)
    steps, statistics = [], module._statistics

    def spy(qkv, rstd, eps, *images):
        steps.append(images)
        statistics(qkv, rstd, eps, *images)

    monkeypatch.setattr(module, "_statistics", spy)
    check(*inputs((5, 9, 2, 16)))
    assert set(steps) == {(0, 2), (2, 2), (4, 1)}
    steps.clear()
    monkeypatch.setattr(module, "cache_bytes", lambda device: 1)
    check(*inputs((2, 9, 2, 16)))
    assert set(steps) == {(0, 1), (1, 1)}


@interpreted
def test_triton_interpreted_one_token(triton_small_tiles):
    """Its softmax is 1 whatever q and k are, so only v has a gradient."""
    qkv, *rest = inputs((3, 1, 2, 16))
    out = qk_norm_attention(qkv, *rest)
    torch.testing.assert_close(out, qkv[:, :, 2])
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    torch.testing.assert_close(grad[:, :, 2], torch.ones_like(out))
    assert grad[:, :, :2].abs().max() < 1e-5


@interpreted
def test_triton_default_tiles_at_257_tokens():
    """128 rows x 64 keys: two whole tiles, a tail of 16 rows, a peeled key."""
    args = inputs((1, 257, 1, 16), torch.float16)
    with kernels.prefer("qk_norm_attention", "triton"):
        out = qk_norm_attention(*args)
    assert_as_accurate_as_eager(out, reference.qk_norm_attention, *args)


@interpreted
def test_outlier_channels_in_fp16(triton_small_tiles):
    """One outlier dominates a weight's gradient and its error is one draw: sums over seeds."""
    ours, eager = torch.zeros(4), torch.zeros(4)
    for seed in range(4):
        torch.manual_seed(seed)
        args = inputs((1, 37, 2, 32), torch.float16, outliers=8)
        wide = [x.detach().double().requires_grad_() for x in args[:3]]
        grad = torch.randn(1, 37, 2, 32, dtype=torch.float16)

        def run(function, leaves, grad=grad):
            out = function(*leaves, EPS)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

        truth = run(reference.qk_norm_attention, wide)
        for errors, function in ((ours, qk_norm_attention), (eager, reference.qk_norm_attention)):
            for index, (x, true) in enumerate(zip(run(function, args[:3]), truth, strict=True)):
                errors[index] += ((x.double() - true).norm() / true.norm()).float()
    assert (ours <= 1.25 * eager).all(), (ours, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outlier_channels(dtype, device):
    args = inputs((1, 257, 4, 32), dtype, device, outliers=3)
    assert_as_accurate_as_eager(qk_norm_attention(*args), reference.qk_norm_attention, *args)


@interpreted
def test_triton_twice_the_same_bits(triton_small_tiles):
    args = inputs((1, 45, 2, 16), torch.float16)
    runs = [qk_norm_attention(*args) for _ in range(2)]
    grads = [torch.autograd.grad(out.sum(), args[:3]) for out in runs]
    assert torch.equal(*runs)
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@interpreted
def test_triton_reads_a_slice_of_a_larger_tensor(triton_small_tiles):
    qkv, *weights = inputs((3, 24, 2, 16), torch.float16)
    slice_of_tokens = qkv.detach()[1:2, 3:20].requires_grad_()  # 17 of 24 tokens of one image
    check(slice_of_tokens, *weights)
    check(qkv.detach()[:1].transpose(3, 4).contiguous().transpose(3, 4).requires_grad_(), *weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_weights_give_nan(dtype, device):
    qkv, q_weight, k_weight, *rest = inputs((1, 20, 2, 16), dtype, device)
    out = qk_norm_attention(qkv, torch.full_like(q_weight, float("nan")), k_weight, *rest)
    assert out.isnan().all()


@interpreted
def test_triton_reads_weights_of_any_stride(triton_small_tiles):
    qkv, *_ = inputs((1, 33, 2, 16), torch.float16)
    weights = (torch.rand(32, 2) + 0.5).half().requires_grad_()
    check(qkv, weights[:, 0], weights[:, 1], EPS)


@pytest.mark.parametrize("shape", [(0, 257, 2, 16), (2, 0, 2, 16)])
@pytest.mark.parametrize("backend", ["native", "sdpa", "triton"])
def test_empty(shape, backend):
    if backend not in kernels.backends("qk_norm_attention")["CPU"]:
        pytest.skip("triton is not interpreted here")
    with kernels.prefer("qk_norm_attention", backend):
        args = inputs(shape)
        out = qk_norm_attention(*args)
        assert out.shape == shape
        grads = torch.autograd.grad(out.sum(), args[:3])
        assert all(g.shape == x.shape for g, x in zip(grads, args, strict=False))
        assert not grads[1].any()


def test_compiles_without_graph_breaks(device):
    args = inputs((2, 17, 2, 16), device=device)
    compiled = torch.compile(qk_norm_attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*args), qk_norm_attention(*args)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), args[:3]) for x in (out, expected)]
    torch.testing.assert_close(*grads)


def test_saves_nothing_where_no_gradient_is_needed():
    args = inputs((2, 9, 2, 16))
    with torch.no_grad():
        out, lse, rstd = torch.ops.internvl.qk_norm_attention(*args, 0.25, False)
    assert lse.numel() == rstd.numel() == 0
    torch.testing.assert_close(out, qk_norm_attention(*args))


def test_fp32_weights_promote_and_autocast_lowers(device):
    qkv, q_weight, k_weight, eps = inputs((2, 20, 2, 32), torch.bfloat16, device)
    args = qkv, q_weight.float(), k_weight.float(), eps
    out = qk_norm_attention(*args)
    assert out.dtype == torch.float32
    assert_as_accurate_as_eager(out, reference.qk_norm_attention, *args)
    with torch.autocast(device, torch.bfloat16):
        assert qk_norm_attention(*args).dtype == torch.bfloat16


def test_rejects_what_does_not_fit():
    qkv, q_weight, k_weight, _ = inputs((2, 9, 2, 16))
    with pytest.raises(ValueError, match=r"\(B, N, 3, H, D\)"):
        qk_norm_attention(qkv[:, :, 0], q_weight, k_weight)
    with pytest.raises(ValueError, match="or neither"):
        qk_norm_attention(qkv, q_weight, None)
    with pytest.raises(ValueError, match=r"k_weight must be .* shape \(32,\)"):
        qk_norm_attention(qkv, q_weight, k_weight[:31])
    with pytest.raises(ValueError, match="scale must be positive"):
        qk_norm_attention(qkv, q_weight, k_weight, scale=-1.0)
