"""A module with int8 or int4 weights as other packages compute it on a CPU.

    torchao        int8 weights and activations by rows; as it is and compiled
    ONNX Runtime   quantize_dynamic: int8 weights by channel, one scale for all activations
    OpenVINO       nncf's compressed int8 weights, activations in groups of 32
    PyTorch int4   its own product with int4 weights in groups of 64; torchao 0.18 has none for x86

A rival whose packages are missing (onnxruntime, onnx, onnxscript; openvino, nncf; torchao) is left
out with a line that says so.
"""

import copy
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Provider, Run, absent, rival

# How far a layer may be from eager's; what is wrong is off by 1 or more.
INT8_ERROR, INT4_ERROR = 0.1, 0.4
GROUP = 64  # columns that share an int4 scale


def int8(module: nn.Module, x: Tensor, compiles: bool = True) -> dict[str, Provider]:
    """Everybody who computes module(x), with a Tensor as result, with int8 weights.

    Args:
        module: in evaluation, on the CPU; it stays as it is.
        x: its input.
        compiles: torchao's compiled form, too.
    """
    wide = copy.deepcopy(module).float()
    found: dict[str, Provider] = {}
    for name, make in (
        ("torchao int8", partial(torchao_int8, module, x)),
        ("ONNX Runtime int8", partial(onnx_runtime_int8, wide, x.float())),
        ("OpenVINO int8", partial(openvino_int8, wide, x.float())),
    ):
        found |= _made(name, make, INT8_ERROR)
    if compiles and "torchao int8" in found:
        make = partial(torchao_int8, module, x, compiles=True)
        found |= _made("torchao int8, compiled", make, INT8_ERROR)
    return found


def int4(module: nn.Module, x: Tensor) -> dict[str, Provider]:
    """PyTorch's own product with int4 weights, for a module with a Tensor as result."""
    return _made("PyTorch int4", partial(pytorch_int4, module, x), INT4_ERROR)


def torchao_int8(module: nn.Module, x: Tensor, compiles: bool = False) -> Run:
    """A copy of the module, quantized by torchao."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    theirs: Any = copy.deepcopy(module)
    quantize_(theirs, Int8DynamicActivationInt8WeightConfig())
    if compiles:
        torch._dynamo.reset()
        theirs = torch.compile(theirs, dynamic=False)
    return partial(theirs, x)


def pytorch_int4(module: nn.Module, x: Tensor) -> Run:
    """A copy of the module, every Linear of whole groups replaced."""
    theirs = copy.deepcopy(module)
    for path, linear in list(theirs.named_modules()):
        if type(linear) is nn.Linear and linear.in_features % GROUP == 0:
            owner, _, name = path.rpartition(".")
            setattr(theirs.get_submodule(owner), name, Int4Linear(linear))
    return partial(theirs, x)


class Int4Linear(nn.Module):
    """A Linear through torch._weight_int4pack_mm_for_cpu."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        groups = weight.unflatten(1, (-1, GROUP))
        scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
        values = ((groups / scales).round() + 8).clamp(0, 15).flatten(1).int()
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 2)
        zeros = torch.zeros_like(scales)
        self.scales = torch.cat((scales, zeros), -1).transpose(0, 1).contiguous()
        self.scales = self.scales.to(linear.weight.dtype)
        self.bias, self.out_features = linear.bias, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., F)."""
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        y = product(x.reshape(-1, x.shape[-1]), self.packed, GROUP, self.scales)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def onnx_runtime_int8(module: nn.Module, x: Tensor) -> Run:
    """Exported to ONNX, with its weights quantized by channel."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder, "wide.onnx"), Path(folder, "int8.onnx")
        torch.onnx.export(module, (x,), wide, dynamo=True, verbose=False)
        quantize_dynamic(
            wide, narrow, weight_type=QuantType.QInt8, per_channel=True,
            use_external_data_format=True,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(narrow, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino_int8(module: nn.Module, x: Tensor) -> Run:
    """Converted, with compressed weights and activations quantized as it comes."""
    import nncf
    import openvino

    model = openvino.convert_model(module, example_input=x)
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: torch.from_numpy(compiled(x.numpy())[0])


def _made(name: str, make: Callable[[], Run], error: float) -> dict[str, Provider]:
    """The provider that `make` gives; none where a package is missing or breaks."""
    said = StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):  # the packages print tables of their own
            run = make()
    except Exception as problem:  # noqa: BLE001  rows of the others are still good
        return absent(name, problem)
    return rival(name, run, error=error)
