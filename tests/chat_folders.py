"""The recorded chat checkpoints (tests/golden/chat/README.md), as folders that tests may change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

CHATS = Path(__file__).parent / "golden" / "chat"
INDEX = {case["case"]: case for case in json.loads((CHATS / "index.json").read_text())}
CASES = sorted(INDEX)
PUBLISHED = [case for case in CASES if INDEX[case]["layout"] == "published"]
OF_TRANSFORMERS = [case for case in CASES if case not in PUBLISHED]
TOLERANCE = 5e-5  # of the largest value, in float32: the README of the recorded cases
WEIGHTS = "model.safetensors"


def dtype_of(case: str) -> torch.dtype:
    return getattr(torch, INDEX[case]["dtype"])


def state_of(case: str) -> dict[str, Tensor]:
    return load_file(CHATS / case / WEIGHTS)


def recorded(case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and outputs by name, and what is known of them."""
    with safe_open(CHATS / case / "io.safetensors", "pt") as file:
        return load_file(CHATS / case / "io.safetensors"), json.loads(file.metadata()["golden"])


def folder_of(
    folder: Path,
    case: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    shards: int = 1,
    **fields: Any,
) -> Path:
    """A folder with a recorded checkpoint.

    Args:
        change: of the tensors.
        shards: files that it is written in.
        fields: of config.json; those of a nested dict are changed one by one, "" for the top.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((CHATS / case / "config.json").read_text())
    for name, value in fields.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))
    if change is None and shards == 1:
        shutil.copy(CHATS / case / WEIGHTS, folder)
        return folder
    state = state_of(case) if change is None else change(state_of(case))
    state = {name: tensor.clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / WEIGHTS)
        return folder
    where = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in sorted(state)[number::shards]}
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def logits(model: Any, case: str) -> Tensor:
    """What a model makes of the recorded batch, where its mask is 1."""
    tensors, about = recorded(case)
    model.img_context_token_id = about["img_context_token_id"]
    names = ("pixel_values", "input_ids", "attention_mask", "position_ids", "image_flags")
    inputs = {name: tensors[f"in.{name}"] for name in names if f"in.{name}" in tensors}
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def assert_recorded(model: Any, case: str) -> None:
    """The recorded logits, as exactly as their README asks for."""
    tensors, _ = recorded(case)
    actual = logits(model, case).double()
    expected = tensors["out.logits"][tensors["in.attention_mask"].bool()].double()
    if dtype_of(case) == torch.float32:
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < TOLERANCE, f"{error:.1e}"
    else:
        cosine = torch.nn.functional.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)
        assert cosine > 0.9997, cosine


def assert_same_bits(folder: Path, state: dict[str, Tensor]) -> None:
    """The weights in a folder have the names, dtypes and bytes of a state."""
    stored = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
    assert set(stored) == set(state)
    for name, tensor in state.items():
        assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape, name
        assert torch.equal(stored[name].view(torch.uint8), tensor.view(torch.uint8)), name


def assert_alike(actual: Tensor, expected: Tensor) -> None:
    """Outputs of the same weights, which may lie elsewhere in memory and be summed otherwise."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < (1e-5 if actual.dtype == torch.float32 else 2e-2), f"{error:.1e}"
