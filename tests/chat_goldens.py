"""Reads the recorded chat checkpoints of the published code (tests/golden/chat/README.md)."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from internvl_engine import VisionLanguageModel

CHAT = Path(__file__).parent / "golden" / "chat"
CASES = sorted(path.parent.name for path in CHAT.glob("*/io.safetensors"))
FP32_TOLERANCE = 5e-5  # of max(1, largest value), as recorded
MIN_COSINE = 0.9997  # of 16-bit outputs


@dataclass
class ChatGolden:
    """A case: its folder, inputs and outputs by name, and what was recorded about it."""

    path: Path
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    about: dict

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.about["dtype"])

    @property
    def config(self) -> dict:
        return json.loads((self.path / "config.json").read_text())

    def forward_inputs(self) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "labels", "image_flags", "position_ids")
        return {name: self.inputs[name] for name in names if name in self.inputs}

    def prompts(self, name: str) -> dict[str, Tensor | None]:
        """Arguments of `generate` for one of the recorded sets of prompts."""
        tiles = self.inputs.get(f"gen.{name}.tiles")
        return {
            "pixel_values": None if tiles is None else self.inputs["pixel_values"][tiles],
            "input_ids": self.inputs[f"gen.{name}.input_ids"],
            "attention_mask": self.inputs[f"gen.{name}.attention_mask"],
        }

    def model(self) -> VisionLanguageModel:
        """In eval mode and the dtype of the case, with the id of the placeholder."""
        model = VisionLanguageModel.from_pretrained(self.path, dtype=self.dtype)
        model.img_context_token_id = self.about["img_context_token_id"]
        return model


def load_chat(case: str) -> ChatGolden:
    file = CHAT / case / "io.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["golden"])
    return ChatGolden(
        path=CHAT / case,
        inputs={n.removeprefix("in."): t for n, t in tensors.items() if n.startswith("in.")},
        outputs={n.removeprefix("out."): t for n, t in tensors.items() if n.startswith("out.")},
        about=about,
    )


def assert_chat(actual: Tensor, expected: Tensor) -> None:
    """fp32 within 5e-5 of its scale; 16-bit outputs by cosine."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    ours, theirs = actual.double().flatten(), expected.double().flatten()
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0)
    assert error <= FP32_TOLERANCE, f"largest error {error:.2e} of the scale"


def assert_chat_16_bit(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    ours, theirs = actual.double().flatten(), expected.double().flatten()
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
    assert cosine > MIN_COSINE, f"cosine {cosine:.6f}"


def assert_same_answers(actual: Tensor, expected: Tensor, end: int) -> None:
    """Equal ids up to the first end of every row; what fills the rest may differ."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    ended = (expected == end).long().cumsum(1)
    answer = (ended == 0) | ((ended == 1) & (expected == end))
    torch.testing.assert_close(actual[answer], expected[answer], rtol=0, atol=0)


# A stored name of transformers or of InternLM2, and ours.
_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^model\.vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.lambda_([12])$", r".ls\1"),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
)


def gradient(model: VisionLanguageModel, name: str) -> Tensor:
    """The gradient of a parameter by its published name; of packed ones put together."""
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    own = {n: p.grad for n, p in model.named_parameters()}
    if piece := re.search(r"\.attention\.([qkv])_proj\.", name):  # rows of transformers' tower
        whole = own[name.replace(piece.group(), ".attn.qkv.")]
        return whole.chunk(3)["qkv".index(piece[1])]
    if ".attention.wqkv." not in name:
        return own[name]
    llm = model.config.llm_config
    dim = llm.hidden_size // llm.num_attention_heads
    parts = [own[name.replace("attention.wqkv", f"self_attn.{p}_proj")] for p in "qkv"]
    if "lora_A" in name:
        return sum(parts)
    groups = [p.unflatten(0, (llm.num_key_value_heads, -1, dim)) for p in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)
