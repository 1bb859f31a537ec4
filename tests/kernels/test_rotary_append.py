import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import rotary_append

from kernel_runs import backend_in_use, runs
from numerics import assert_as_accurate_as_eager

RUNS = runs("rotary_append")
TABLE, ROWS = 300, 40  # of the rotary table, of the cache
# (B, H, S, D): one token at QLLaMA's heads, a prompt, the nano model's heads, no token.
SHAPES = [(2, 32, 1, 128), (2, 4, 9, 32), (3, 4, 5, 16), (2, 4, 0, 16), (1, 9, 3, 80)]


def inputs(shape, dtype=torch.float32, device="cpu", shared=False):
    batch, heads, tokens, dim = shape
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    cos, sin = reference.rotary_table(TABLE, dim, 10000.0, dtype, device)
    positions = torch.randint(0, TABLE, (1 if shared else batch, tokens), device=device)
    slots = torch.randperm(ROWS, device=device)[:tokens]
    return q, k, v, cos, sin, positions, slots


def cache(shape, dtype, device):
    """Keys and values of one layer of a larger storage: (2, B, H, ROWS, D)."""
    batch, heads, _, dim = shape
    return torch.randn(2, batch, heads, ROWS, dim, dtype=dtype, device=device)


def functional(q, k, v, cos, sin, positions, slots, storage):
    """The reference, returning what it wrote."""
    storage = storage.clone()
    y = reference.rotary_append(q, k, v, cos, sin, positions, slots, *storage)
    return y, storage


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_writes_what_the_reference_writes(shape, shared, device, backend, dtype):
    args, storage = inputs(shape, dtype, device, shared), cache(shape, dtype, device)
    written = storage.clone()
    with backend_in_use("rotary_append", backend):
        y = rotary_append(*args, *written)
    assert_as_accurate_as_eager((y, written), functional, *args, storage)
    untouched = torch.ones(ROWS, dtype=torch.bool, device=device)
    untouched[args[-1]] = False
    assert torch.equal(written[..., untouched, :], storage[..., untouched, :])
    assert torch.equal(written[1][:, :, args[-1]], args[2])  # values are copied bit by bit


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_reads_a_packed_qkv_and_writes_a_layer_of_the_cache(device, backend, dtype):
    shape = (2, 4, 6, 32)
    *_, cos, sin, positions, slots = inputs(shape, dtype, device)
    q, k, v = (
        x.transpose(1, 2) for x in torch.randn(2, 6, 3, 4, 32, dtype=dtype, device=device).unbind(2)
    )
    storage = torch.randn(3, 2, 2, 4, ROWS, 32, dtype=dtype, device=device)
    written = storage.clone()
    with backend_in_use("rotary_append", backend):
        y = rotary_append(q, k, v, cos, sin, positions, slots, *written[1])
    assert_as_accurate_as_eager(
        (y, written[1]), functional, q, k, v, cos, sin, positions, slots, storage[1]
    )
    assert torch.equal(written[0], storage[0]) and torch.equal(written[2], storage[2])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_every_row_has_its_own_slots(tokens, device, backend, dtype):
    shape = (3, 4, tokens, 16)
    q, k, v, cos, sin, positions, _ = inputs(shape, dtype, device)
    slots = torch.stack([torch.randperm(ROWS, device=device)[:tokens] for _ in range(3)])
    storage = cache(shape, dtype, device)
    written = storage.clone()
    with backend_in_use("rotary_append", backend):
        y = rotary_append(q, k, v, cos, sin, positions, slots, *written)
    for row in range(3):
        one = slice(row, row + 1)
        args = (q[one], k[one], v[one], cos, sin, positions[one], slots[row])
        found = (y[one], written[:, one])
        assert_as_accurate_as_eager(found, functional, *args, storage[:, one].contiguous())


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_fewer_key_heads_than_query_heads(device, backend, dtype):
    q, k, v, *rest = inputs((2, 6, 5, 16), dtype, device)
    k, v = k[:, :2], v[:, :2]
    storage = cache((2, 2, 5, 16), dtype, device)
    written = storage.clone()
    with backend_in_use("rotary_append", backend):
        y = rotary_append(q, k, v, *rest, *written)
    assert_as_accurate_as_eager((y, written), functional, q, k, v, *rest, storage)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_more_key_heads_than_query_heads(device, backend, dtype):
    q, k, v, *rest = inputs((2, 40, 5, 16), dtype, device)
    storage = cache((2, 40, 5, 16), dtype, device)
    written = storage.clone()
    with backend_in_use("rotary_append", backend):
        y = rotary_append(q[:, :2], k, v, *rest, *written)
    assert_as_accurate_as_eager((y, written), functional, q[:, :2], k, v, *rest, storage)


def test_compiles_with_its_write_kept(device):
    args, storage = (
        inputs((2, 3, 4, 16), device=device),
        cache((2, 3, 4, 16), torch.float32, device),
    )
    expected, written = functional(*args, storage)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(k_cache, v_cache):
        y = rotary_append(*args, k_cache, v_cache)
        return y, k_cache.sum() + v_cache.sum()

    with torch.no_grad():
        y, total = step(*storage)
    torch.testing.assert_close((y, storage, total), (expected, written, written.sum()))


def test_rejects_what_does_not_fit():
    args, (k_cache, v_cache) = inputs((2, 3, 4, 16)), cache((2, 3, 4, 16), torch.float32, "cpu")
    with pytest.raises(ValueError, match="k_cache must be"):
        rotary_append(*args, k_cache[:1], v_cache)
    with pytest.raises(ValueError, match="v_cache must be"):
        rotary_append(*args, k_cache, v_cache.half())
    with pytest.raises(ValueError, match="slots of shape"):
        rotary_append(*args[:-1], args[-1][:2], k_cache, v_cache)
    with pytest.raises(ValueError, match=r"or \(2, 4\), got"):
        rotary_append(*args[:-1], args[-1].expand(3, 4), k_cache, v_cache)
    with pytest.raises(ValueError, match="no gradient through what it writes to"):
        rotary_append(args[0].requires_grad_(), *args[1:], k_cache, v_cache)


@pytest.mark.parametrize("backend", kernels.backends("rotary_append")["CPU"])
def test_an_index_outside_its_table_is_an_error(backend):
    if backend == "triton":
        pytest.skip("a GPU cannot tell, and the interpreter stands for one")
    for index, limit in ((5, TABLE), (6, ROWS)):
        args, storage = list(inputs((2, 3, 4, 16))), cache((2, 3, 4, 16), torch.float32, "cpu")
        args[index][..., 1] = limit
        with kernels.prefer("rotary_append", backend), pytest.raises(IndexError, match=str(limit)):
            rotary_append(*args, *storage)
        args[6] = args[6].expand(2, 4).clone()  # of rows, the last one's are looked at too
        with kernels.prefer("rotary_append", backend), pytest.raises(IndexError, match=str(limit)):
            rotary_append(*args, *storage)
