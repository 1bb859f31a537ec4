import json
import os
import subprocess
import sys

import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import _library

from kernel_runs import backend_in_use

OPERATORS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
OPERATORS += ("rotary", "rotary_append", "swiglu")
interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not interpreted")


def python(code: str, **environment: str) -> str:
    """The output of a fresh interpreter."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout


def norm(x, weight):
    return kernels.rms_norm(x, weight, 1e-6)


def test_importing_the_operators_imports_no_triton():
    loaded = python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import internvl_engine.kernels\n"
        "print([m for m in set(sys.modules) - before if m.split('.')[0] == 'triton'\n"
        "       or m.startswith('internvl_engine.kernels.triton')])"
    )
    assert loaded.strip() == "[]"


def test_works_without_triton_and_without_native_modules():
    """The reference serves every operator then, and says so."""
    report = python(
        "import sys, json\n"
        "for name in ('internvl_engine._native', 'internvl_engine._native_cuda'):\n"
        "    sys.modules[name] = None\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import torch\n"
        "from internvl_engine import kernels, reference\n"
        "x, w = torch.randn(2, 8), torch.ones(8)\n"
        "assert torch.equal(kernels.rms_norm(x, w, 1e-6), reference.rms_norm(x, w, 1e-6))\n"
        "print(json.dumps(kernels.implementations()))"
    )
    found = json.loads(report)
    assert all(found[name] == {"CPU": "reference", "CUDA": "reference"} for name in OPERATORS)


@pytest.mark.skipif(_library.native is None, reason="built without a C++ compiler")
@pytest.mark.parametrize("isa", ["avx512", "portable"])
def test_every_instruction_set_gives_the_right_result(isa):
    """The tests elsewhere run on the best one, and in CI on avx2 too; these are the others."""
    code = (
        "import sys, torch\n"
        "from internvl_engine import _native, kernels, reference\n"
        "try: name = _native.instruction_set()\n"
        "except ValueError: print('skip'); sys.exit()\n"
        "torch.manual_seed(0)\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    x, r = (torch.randn(9, 83, dtype=dtype).requires_grad_() for _ in range(2))\n"
        "    w = torch.randn(83, dtype=dtype).requires_grad_()\n"
        "    tolerance = dict(rtol=0, atol=(8 if dtype == torch.float32 else 16) * 4 *\n"
        "                     torch.finfo(dtype).eps)\n"
        "    def check(ours, theirs, leaves, *args):\n"
        "        a, b = ours(*args), theirs(*args)\n"
        "        a, b = (o if isinstance(o, tuple) else (o,) for o in (a, b))\n"
        "        torch.testing.assert_close(a, b, **tolerance)\n"
        "        g = [torch.randn_like(o) for o in a]\n"
        "        torch.testing.assert_close(torch.autograd.grad(a, leaves, g),\n"
        "                                   torch.autograd.grad(b, leaves, g), **tolerance)\n"
        "    check(kernels.rms_norm, reference.rms_norm, (x, w), x, w, 1e-6)\n"
        "    check(kernels.add_rms_norm, reference.add_rms_norm, (x, r, w), x, r, w, w, 1e-6)\n"
        "    check(kernels.layer_norm, reference.layer_norm, (x, w), x, w, w, 1e-6)\n"
        "    check(kernels.add_layer_norm, reference.add_layer_norm, (x, r, w),\n"
        "          x, r, w, w, w, 1e-6)\n"
        "    check(kernels.swiglu, reference.swiglu, (r,), r[:, :82])\n"
        "    q = torch.randn(2, 3, 4, 22, dtype=dtype).requires_grad_()\n"
        "    table = reference.rotary_table(9, 22, 10000.0, dtype, 'cpu')\n"
        "    positions = torch.arange(8).view(2, 4)\n"
        "    check(kernels.rotary, reference.rotary, (q,), q, q, *table, positions)\n"
        "print(name)"
    )
    found = python(code, INTERNVL_ISA=isa).strip()
    if found == "skip":
        pytest.skip(f"this processor has no {isa}")
    assert found == isa


def test_implementations_name_every_operator():
    found = kernels.implementations()
    assert set(OPERATORS) <= set(found)
    assert not [name for name in found if name.endswith("_backward")]


def test_prefer_chooses_acts_at_once_and_restores(monkeypatch):
    before = kernels.backends("rms_norm")
    calls = []
    order = _library._ORDER["rms_norm"]["CPU"]
    spy = ("spy", lambda *args: calls.append(args) or reference.rms_norm(*args))
    monkeypatch.setitem(_library._ORDER["rms_norm"], "CPU", order)
    order.append(spy)
    try:
        x, weight = torch.randn(2, 8), torch.randn(8)
        norm(x, weight)
        assert not calls
        with kernels.prefer("rms_norm", "spy"):
            assert kernels.implementations()["rms_norm"]["CPU"] == "spy"
            norm(x, weight)
        assert len(calls) == 1
        norm(x, weight)
        assert len(calls) == 1
        kernels.prefer("rms_norm", "spy")
        norm(x, weight)
        assert len(calls) == 2
    finally:
        order[:] = [entry for entry in order if entry is not spy]
        order.sort(key=lambda entry: before["CPU"].index(entry[0]))
    assert kernels.backends("rms_norm") == before


def test_a_backend_that_cannot_serve_passes_on_to_the_next():
    """There is no native kernel for float16: the result is the reference's, bit by bit."""
    x, weight = torch.randn(3, 64, dtype=torch.float16), torch.randn(64, dtype=torch.float16)
    assert torch.equal(norm(x, weight), reference.rms_norm(x, weight, 1e-6))
    gate_up = torch.randn(3, 64, dtype=torch.float16)
    assert torch.equal(kernels.swiglu(gate_up), reference.swiglu(gate_up))


def test_prefer_moves_the_gradient_along_and_all_operators_with_a_star():
    with kernels.prefer("*", "reference"):
        assert all(devices["CPU"][0][0] == "reference" for devices in _library._ORDER.values())
    assert kernels.backends("rms_norm_backward")["CPU"][0] != "reference" or not _library.native


@pytest.mark.parametrize("first, second", [("cpu", "meta"), ("meta", "cpu")])
def test_tensors_on_two_devices_are_refused(first, second):
    """Each alone has an implementation: without a check one would answer with unwritten memory."""
    x, weight = torch.randn(4, 64, device=first), torch.ones(64, device=second)
    with pytest.raises(RuntimeError, match=f"on one device, got {first} and {second}"):
        kernels.rms_norm(x, weight)


def test_forward_mode_is_an_error_and_not_zeros():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(NotImplementedError, match="rms_norm: no forward-mode derivative"):
        torch.func.jvp(lambda x: kernels.rms_norm(x, weight), (x,), (torch.ones_like(x),))


def test_prefer_says_what_there_is():
    with pytest.raises(ValueError, match="no operator 'rms'; there are .*rms_norm"):
        kernels.prefer("rms", "native")
    with pytest.raises(ValueError, match="rms_norm has no backend 'flash' on this machine; there"):
        kernels.prefer("rms_norm", "flash")


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """Tensors on cuda:1 while cuda:0 is current: the launch happens inside a switch to cuda:1."""
    current, seen = [0], []

    class Switch:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, current[0] = current[0], self.device.index

        def __exit__(self, *exception):
            current[0] = self.before

    class OnSecondDevice:
        device = torch.device("cuda", 1)

        def get_device(self):
            return 1

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Switch)
    run = _library._on_the_tensors_device(lambda tensor, *args: seen.append(current[0]))
    run(OnSecondDevice(), 1.0)
    assert seen == [1] and current == [0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_second_gpu():
    x, weight = torch.randn(3, 64, device="cuda:1"), torch.randn(64, device="cuda:1")
    with torch.cuda.device(0):
        torch.testing.assert_close(norm(x, weight), reference.rms_norm(x, weight, 1e-6))


def operators_together(x, residual, scale, weight, cos, sin, positions):
    y, residual = kernels.add_rms_norm(x, residual, scale, weight)
    z = kernels.swiglu(kernels.rms_norm(y, weight)) + residual[..., : residual.shape[-1] // 2]
    q = z.unflatten(-1, (2, -1)).transpose(1, 2)
    q, k = kernels.rotary(q, q, cos, sin, positions)
    return (q * k).sum()


def test_compiles_whole_with_gradients_and_a_batch_that_changes(device):
    """No graph break, and one graph serves every batch size after the second."""
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounterWithBackend

    reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operators_together, fullgraph=True, backend=counter)
    table = reference.rotary_table(9, 8, 10000.0, torch.float32, device)
    for batch in (2, 3, 5, 8):
        x, residual = (torch.randn(batch, 4, 32, device=device) for _ in range(2))
        scale, weight = (torch.randn(32, device=device) for _ in range(2))
        leaves = [t.requires_grad_() for t in (x, residual, scale, weight)]
        args = (*leaves, *table, torch.arange(4, device=device)[None])
        ours, expected = compiled(*args), operators_together(*args)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(
            torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves)
        )
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for 4 batch sizes"


def test_compiled_code_follows_prefer(device):
    """The choice is made inside the operator at each call, not when compiling."""
    x, weight = torch.randn(3, 40, device=device), torch.randn(40, device=device)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    compiled(x, weight)
    with backend_in_use("rms_norm", "reference"):
        assert torch.equal(compiled(x, weight), reference.rms_norm(x, weight, 1e-6))


def test_autocast_lowers_what_asks_for_it():
    """As it does for matrix products; with gradients in the dtype of the inputs."""
    _library.define(
        "test_product(Tensor a, Tensor b, bool flag=False) -> Tensor",
        reference=lambda a, b, flag=False: a @ b,
        fake=lambda a, b, flag=False: a.new_empty(a.shape[0], b.shape[1]),
        lower_in_autocast=True,
    )
    try:
        a, b = (torch.randn(3, 3).requires_grad_() for _ in range(2))
        product = torch.ops.internvl.test_product
        assert product(a, b).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            y = product(a, b)
            assert torch.equal(y, a @ b) and y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().sum(), (a, b))
        assert all(grad.dtype == torch.float32 for grad in grads)
    finally:
        del _library._ORDER["test_product"]


def test_call_overhead_is_near_that_of_torch():
    """The goal is F.rms_norm's call + 2 us on an idle machine; here, a bound that noise leaves."""
    from time import perf_counter

    x, weight = torch.randn(1, 64), torch.randn(64)
    runs = {
        "ours": lambda: norm(x, weight),
        "torch": lambda: torch.nn.functional.rms_norm(x, (64,), weight, 1e-6),
    }
    best = dict.fromkeys(runs, float("inf"))
    with torch.inference_mode():
        for _ in range(30):
            for name, run in runs.items():
                start = perf_counter()
                for _ in range(50):
                    run()
                best[name] = min(best[name], (perf_counter() - start) / 50)
    assert best["ours"] <= best["torch"] + 10e-6, best
