import pytest
import torch
from gemv_cases import DTYPES, FORMS, dense, normed, weight_in
from host_gpu import host_gpu, needs_compiler

from internvl_engine import kernels, reference
from internvl_engine.kernels import _decoding, decode_qkv
from internvl_engine.kernels.decode_qkv import decode_qkv_cuda

from numerics import assert_as_accurate_as_eager

EPS, TABLE, SLOTS = 1e-6, 40, 12
# (rows, C, heads, key heads, head size): QLLaMA's head; fewer keys than queries; narrow heads.
SHAPES = [(2, 264, 1, 1, 128), (8, 72, 3, 1, 64)]
NARROW = (3, 40, 2, 2, 16)


def inputs(rows, columns, heads, key_heads, dim, dtype=torch.bfloat16, form="wide"):
    features = (heads + 2 * key_heads) * dim
    x = torch.randn(rows, 1, columns).to(dtype)
    parts = weight_in(form, (torch.randn(features, columns) / columns**0.5).to(dtype))
    cos, sin = reference.rotary_table(TABLE, dim, 10000.0, dtype, "cpu")
    positions, slots = torch.randint(0, TABLE, (rows, 1)), torch.randint(0, SLOTS, (rows, 1))
    # A layer of a larger storage.
    storage = torch.randn(2, rows, key_heads, SLOTS, dim).to(dtype)
    return x, parts, (cos, sin, positions, slots), storage


def run_cuda(x, parts, bias, norm, heads, rest, storage):
    three = (*parts, None, None)[:3]
    return decode_qkv_cuda(x, *three, bias, *norm, EPS, heads, *rest, *storage)


def truth(form, parts, heads, dim):
    """(q, the caches) by the references, in the dtype of x."""

    def run(x, bias, norm_weight, squares, cos, sin, positions, slots, storage):
        storage = storage.clone()
        features = (heads + 2 * storage.shape[2]) * dim
        weight = dense(form, parts, features, x.shape[-1], x.dtype)
        qkv = _decoding.norm_linear(x, weight, bias, "none", norm_weight, squares, EPS)
        counts = (heads, storage.shape[2], storage.shape[2])
        q, k, v = qkv.unflatten(-1, (-1, dim)).transpose(1, 2).split(counts, dim=1)
        rest = (cos, sin, positions, slots, *storage)
        return reference.rotary_append(q, k, v, *rest), storage

    return run


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "form, shape", [*((f, s) for f in FORMS for s in SHAPES), ("wide", NARROW)]
)
def test_the_cuda_kernel_is_as_accurate_as_eager(form, shape, dtype):
    rows, columns, heads, key_heads, dim = shape
    x, parts, rest, storage = inputs(*shape, dtype, form)
    biases = torch.randn((heads + 2 * key_heads) * dim).to(dtype)
    statistic = normed(x, torch.randn(columns).to(dtype))
    for bias, norm in ((biases, statistic), (None, (None, None))):
        written = storage.clone()
        with host_gpu() as gpu:
            q = run_cuda(x, parts, bias, norm, heads, rest, written)
        assert gpu.calls == 1 and q.is_contiguous()
        run = truth(form, parts, heads, dim)
        assert_as_accurate_as_eager((q, written), run, x, bias, *norm, *rest, storage)
        untouched = torch.ones(rows, SLOTS, dtype=torch.bool)
        untouched[torch.arange(rows), rest[-1][:, 0]] = False
        by_slot = [each.permute(1, 3, 0, 2, 4)[untouched] for each in (written, storage)]
        assert torch.equal(*by_slot)


@needs_compiler
def test_one_position_and_one_slot_of_all_rows_and_strided_caches():
    x, parts, (cos, sin, _, _), _ = inputs(*SHAPES[0])
    storage = torch.randn(SLOTS, 2, 2, 1, 128).bfloat16().permute(1, 2, 3, 0, 4)
    rest = (cos, sin, torch.tensor([[7]]), torch.tensor([3]))
    written = storage.clone(memory_format=torch.preserve_format)
    with host_gpu():
        q = run_cuda(x, parts, None, (None, None), 1, rest, written)
    expected, caches = truth("wide", parts, 1, 128)(x, None, None, None, *rest, storage)
    torch.testing.assert_close((q, written), (expected, caches), rtol=0.02, atol=0.02)


@needs_compiler
def test_positions_and_slots_may_be_written_late():
    x, parts, rest, storage = inputs(*SHAPES[1])
    expected = storage.clone()
    with host_gpu():
        q = run_cuda(x, parts, None, (None, None), 3, rest, expected)
    for index in (2, 3):
        hole = torch.full_like(rest[index], 1)
        late = (*rest[:index], hole, *rest[index + 1 :])
        written = storage.clone()
        with host_gpu(arrives=(hole, rest[index])):
            found = run_cuda(x, parts, None, (None, None), 3, late, written)
        assert torch.equal(found, q) and torch.equal(written, expected)


@pytest.mark.parametrize("change", ["two positions", "heads of 32 in panels", "heads of 24"])
def test_what_the_cuda_kernel_leaves_to_others(change):
    dim = {"two positions": 16, "heads of 32 in panels": 32, "heads of 24": 24}[change]
    form = "int8" if "panels" in change else "wide"
    x, parts, rest, storage = inputs(2, 40, 2, 2, dim, form=form)
    if change == "two positions":
        x = x.expand(2, 2, 40)
    found = run_cuda(x, parts, None, (None, None), 2, rest, storage)
    assert found is NotImplemented


@pytest.mark.parametrize("backend", kernels.backends("decode_qkv")["CPU"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_every_backend_of_the_cpu(tokens, backend):
    x, parts, (cos, sin, _, _), storage = inputs(2, 64, 4, 2, 16, torch.float32)
    x = torch.randn(2, tokens, 64)
    rest = (cos, sin, torch.randint(0, TABLE, (2, tokens)), torch.arange(tokens))
    norm, written = normed(x, torch.randn(64)), storage.clone()
    with kernels.prefer("decode_qkv", backend):
        q = decode_qkv(x, parts, None, 4, *rest, *written, *norm, EPS)
    expected, caches = truth("wide", parts, 4, 16)(x, None, *norm, *rest, storage)
    torch.testing.assert_close((q, written), (expected, caches))


def test_rejects_what_does_not_fit():
    x, parts, rest, (k, v) = inputs(*NARROW)
    with pytest.raises(ValueError, match=r"a weight \(112, 40\)"):
        decode_qkv(x, parts, None, 3, *rest, k, v)
    with pytest.raises(ValueError, match="slots"):
        decode_qkv(x, parts, None, 2, *rest[:3], torch.zeros(2), k, v)
    with pytest.raises(ValueError, match="caches must be"):
        decode_qkv(x, parts, None, 2, *rest, k, v.float())
    with pytest.raises(ValueError, match="cos and sin must be"):
        decode_qkv(x, parts, None, 2, rest[0].float(), *rest[1:], k, v)
    with pytest.raises(ValueError, match="no gradient through what it writes to"):
        decode_qkv(x.requires_grad_(), parts, None, 2, *rest, k, v)
