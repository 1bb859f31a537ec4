"""What holds for every operator of the library, whichever it is."""

from contextlib import nullcontext

import pytest
import torch
from operator_examples import WITHOUT_GRADIENT, WRITE, examples, has_packed_weight
from torch import library

from internvl_engine import kernels, reference
from internvl_engine.kernels import _library


def without_options(operator: str, arguments: tuple) -> list:
    """None for every optional tensor."""
    schema = getattr(torch.ops.internvl, operator).default._schema.arguments
    return [
        None if str(argument.type) == "Optional[Tensor]" else x
        for argument, x in zip(schema, arguments, strict=True)
    ]


@pytest.mark.parametrize("operator", ["add_rms_norm", "attention", "qk_norm_attention"])
def test_is_wellformed_without_its_optional_tensors(operator):
    arguments = [as_leaf(x) for x in without_options(operator, examples()[operator])]
    library.opcheck(getattr(torch.ops.internvl, operator).default, tuple(arguments))


@pytest.mark.parametrize("operator", sorted(_library._ORDER))
def test_every_operator_is_wellformed(operator):
    arguments = examples().get(operator)
    if arguments is None and "packed" in operator:
        pytest.skip("no packed layout for float32 here")
    assert arguments is not None, f"give {operator} an example in operator_examples.py"
    if _library.native is None and operator.endswith("_backward"):
        pytest.skip(
            "opcheck does not see through torch.func, by which the reference differentiates"
        )
    checks = ("test_faketensor",)
    if not any(is_fp8(x) for x in arguments):  # which it cannot compare
        checks += ("test_schema",)
    if not operator.endswith("_backward"):
        checks += ("test_autograd_registration", "test_aot_dispatch_dynamic")
        if operator not in WITHOUT_GRADIENT:
            arguments = [as_leaf(x) for x in arguments]
    overload = getattr(torch.ops.internvl, operator).default
    library.opcheck(overload, tuple(arguments), test_utils=checks)


ROWS = {"x", "residual", "grad", "grad_residual", "residual_out", "gate_up", "qkv", "q", "k", "v"}


def permuted(operator: str, arguments: tuple) -> list:
    """Rows as (2, rows, C), of which neighbours in memory belong to different sequences."""
    schema = getattr(torch.ops.internvl, operator).default._schema.arguments
    found = []
    for argument, x in zip(schema, arguments, strict=False):  # some end with defaults
        if argument.name in ROWS:
            x = x.repeat(2, 1, 1) if x.dim() == 2 else x
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        found.append(x)
    return found


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("operator", sorted(_library._ORDER))
def test_strides_are_those_of_the_fake_where_inputs_are_permuted(operator, backend):
    """Compiled code reads the result by the fake's strides: ((8, 40, 1) is not (24, 8, 1))."""
    if operator not in examples():
        pytest.skip("no packed layout for float32 here")
    if operator.endswith("_backward") and (backend or _library.native is None):
        pytest.skip("opcheck does not see through torch.func")
    arguments = permuted(operator, examples()[operator])
    with kernels.prefer(operator, backend) if backend else nullcontext():
        library.opcheck(
            getattr(torch.ops.internvl, operator).default,
            tuple(arguments),
            test_utils="test_faketensor",
        )


def is_fp8(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn


def as_leaf(x):
    """x with a gradient where it can have one."""
    differentiable = isinstance(x, torch.Tensor) and x.is_floating_point() and not is_fp8(x)
    return x.detach().clone().requires_grad_() if differentiable else x


def test_every_row_has_the_same_bits_in_every_batch():
    """On the CPU no order of sums depends on the batch: an image alone and among others."""
    tokens, width = 257, 4 * 128
    x, weight = torch.randn(3, tokens, width), torch.rand(width)
    q, k = torch.randn(3, 4, 96, 128), torch.randn(3, 4, tokens, 128)
    lengths = torch.tensor([140, 140, 140])
    calls = {
        "rms_norm": lambda x, q, k, n: kernels.rms_norm(x, weight.to(x.dtype), 1e-6),
        "add_rms_norm": lambda x, q, k, n: kernels.add_rms_norm(
            x, x, None, weight.to(x.dtype), 1e-6
        )[0],
        "layer_norm": lambda x, q, k, n: kernels.layer_norm(x, weight.to(x.dtype), None, 1e-6),
        "add_layer_norm": lambda x, q, k, n: kernels.add_layer_norm(
            x, x, None, weight.to(x.dtype), None, 1e-6
        )[0],
        "swiglu": lambda x, q, k, n: kernels.swiglu(x),
        "qk_norm_attention": lambda x, q, k, n: kernels.qk_norm_attention(
            torch.stack((x, x, x), 2).unflatten(-1, (4, 128)), *[weight.to(x.dtype)] * 2
        ),
        "attention": lambda x, q, k, n: kernels.attention(q, q, q, "causal"),
        "cross_attention": lambda x, q, k, n: kernels.cross_attention(q, k, k),
        "decode_attention": lambda x, q, k, n: kernels.decode_attention(q[:, :, :1], k, k, n),
        "pooling_attention": lambda x, q, k, n: kernels.pooling_attention(x[:, :4], x, 1e-5),
    }
    for dtype in (torch.float32, torch.bfloat16):
        batch = (x.to(dtype), q.to(dtype), k.to(dtype), lengths)
        for operator, call in calls.items():
            whole = call(*batch)
            for image in range(3):
                alone = call(*(tensor[image : image + 1] for tensor in batch))
                assert torch.equal(alone[0], whole[image]), (operator, dtype)


def on_gpu(operator: str, dtype: torch.dtype = torch.bfloat16) -> list:
    """The example's arguments on the GPU, floating tensors in one dtype.

    Those of attention's gradients stay as the forward pass gave them, bfloat16 and float32, and
    those of packed weights as they are packed.
    """
    stays = operator.endswith("attention_backward") or has_packed_weight(operator)

    def moved(x):
        cast = x.is_floating_point() and not stays
        return x.to("cuda", dtype if cast else x.dtype)

    return [moved(x) if isinstance(x, torch.Tensor) else x for x in examples()[operator]]


def outputs_of(operator: str, arguments: list) -> list[torch.Tensor]:
    """What it returns, and the tensors that it writes to."""
    returned = getattr(torch.ops.internvl, operator).default(*arguments)
    written = arguments[-2:] if operator in WRITE else []
    return [returned, *written] if isinstance(returned, torch.Tensor) else [*returned, *written]


ON_GPU = sorted(name for name in _library._ORDER if "packed" not in name)  # a CPU's layout


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ON_GPU)
def test_a_cuda_graph_captures_it_and_follows_its_inputs(operator):
    """Capture fails where the host waits for the device."""
    arguments, others = on_gpu(operator), on_gpu(operator)
    outputs_of(operator, arguments)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_of(operator, arguments)
    for mine, other in zip(arguments, others, strict=True):
        if isinstance(mine, torch.Tensor):
            mine.copy_(other)
    graph.replay()
    expected = outputs_of(operator, others)
    for actual, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ON_GPU)
def test_all_backends_of_a_gpu_agree(operator):
    """flash, cuDNN and CUDA C++ too: a wrong order of arguments or outputs shows. Accuracy is for
    the operators' own tests; a few roundings of bfloat16 apart is near enough here."""
    arguments = on_gpu(operator)
    with kernels.prefer(operator, "reference"):
        expected = outputs_of(operator, copies(arguments))
    for backend in kernels.backends(operator)["CUDA"]:
        with kernels.prefer(operator, backend):
            actual = outputs_of(operator, copies(arguments))
        for ours, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(
                ours,
                wanted,
                rtol=0.05,
                atol=0.05,
                equal_nan=True,
                msg=lambda m, b=backend: f"{b}: {m}",
            )


def copies(arguments: list) -> list:
    """So that what writes to a cache does not see what another wrote."""
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operator", ON_GPU)
def test_runs_on_the_second_gpu_while_the_first_is_current(operator):
    arguments = on_gpu(operator)
    there = [x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in arguments]
    expected, actual = outputs_of(operator, arguments), outputs_of(operator, there)
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.device == torch.device("cuda", 1)
        torch.testing.assert_close(ours.cuda(0), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("operator", ON_GPU)
def test_storage_that_starts_off_16_bytes(operator, dtype):
    """Another variant of a Triton kernel, and not for the kernels in CUDA C++."""
    arguments = on_gpu(operator, dtype)
    shifted = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
            x = storage[1:].view(x.shape).copy_(x)
        shifted.append(x)
    for ours, wanted in zip(
        outputs_of(operator, shifted), outputs_of(operator, arguments), strict=True
    ):
        torch.testing.assert_close(ours, wanted, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["rms_norm", "swiglu", "qk_norm_attention", "rotary"])
def test_batches_of_more_than_2_to_the_31_elements(operator):
    """The last image of a batch whose offsets need 64 bits has the bits that it has alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    width, weight = 3200, torch.ones(3200, device="cuda", dtype=torch.bfloat16)
    table = reference.rotary_table(257, 128, 10000.0, torch.bfloat16, "cuda")
    positions = torch.arange(257, device="cuda")[None]
    calls = {
        "rms_norm": lambda x: kernels.rms_norm(x, weight.repeat(3)),
        "swiglu": kernels.swiglu,
        "qk_norm_attention": lambda x: kernels.qk_norm_attention(
            x.unflatten(-1, (3, 25, 128)), weight, weight
        ),
        "rotary": lambda x: kernels.rotary(
            *(x.unflatten(-1, (3, 25, 128))[:, :, part].transpose(1, 2) for part in (0, 1)),
            *table, positions,
        )[0],
    }  # fmt: skip
    x = torch.zeros(900, 257, 3 * width, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-1].normal_()
    whole = calls[operator](x)[-1]
    assert torch.equal(whole, calls[operator](x[-1:])[0])
    assert whole.any()
