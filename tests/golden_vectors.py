"""Reads the recorded outputs of the published implementation (tests/golden/README.md)."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
FP32_TOLERANCE = 2e-5  # of unit-scale tensors: GEMMs of another build sum in another order
MIN_COSINE = 0.9999  # of 16-bit outputs against those of the same dtype
# By case "generate_<name>": what else was asked of `generate`, beside its inputs.
GENERATE = {
    "greedy": {"max_new_tokens": 8},
    "greedy_batch": {"max_new_tokens": 8},
    "greedy_min_new": {"max_new_tokens": 10, "min_new_tokens": 10},
    "left_padded_batch": {"max_new_tokens": 6},
    "right_padded_quirk": {"max_new_tokens": 4, "align_prompts": False},
    "beam5": {"num_beams": 5},
    "beam5_fp16": {"num_beams": 5},
    "beam3_batch": {"num_beams": 3},
    "repetition_ngram": {
        "max_new_tokens": 8, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2,
    },
}  # fmt: skip


@dataclass
class Golden:
    """One case: inputs and outputs by name, the configuration and the weights it ran with."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    config: dict
    state: dict[str, Tensor]
    dtype: torch.dtype

    def listed(self, prefix: str) -> list[Tensor]:
        """The outputs `prefix.0`, `prefix.1`, ... in order."""
        names = [name for name in self.outputs if name.rpartition(".")[0] == prefix]
        return [self.outputs[f"{prefix}.{index}"] for index in range(len(names))]


def load_golden(case: str) -> Golden:
    """Reads a case; its weights are cast to the dtype it ran in."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    with safe_open(GOLDEN / f"{case}.safetensors", "pt") as file:
        metadata = file.metadata()
    dtype = getattr(torch, metadata.get("state_dtype", "float32"))
    state = {}
    if "state" in metadata:
        state = load_file(GOLDEN / "states" / f"{metadata['state']}.safetensors")
        if metadata["state_keys"] != "all":
            kept = json.loads(metadata["state_keys"])
            state = {name: state[name] for name in kept}
    return Golden(
        inputs={n.removeprefix("in."): t for n, t in tensors.items() if n.startswith("in.")},
        outputs={n.removeprefix("out."): t for n, t in tensors.items() if n.startswith("out.")},
        config=json.loads(metadata["config"]),
        state={name: tensor.to(dtype) for name, tensor in state.items()},
        dtype=dtype,
    )


def assert_golden(actual: Tensor, expected: Tensor) -> None:
    """fp32 within 2e-5 of its scale; 16-bit outputs by cosine."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{actual.dtype}, not {expected.dtype}"
    ours, theirs = actual.double().flatten(), expected.double().flatten()
    if expected.dtype == torch.float32:
        error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
        assert error <= FP32_TOLERANCE, f"largest error {error:.2e} of the scale"
    else:
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
        assert cosine > MIN_COSINE, f"cosine {cosine:.6f}"
