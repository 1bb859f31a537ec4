"""A checkpoint of InternVL-14B at any size with random weights, never held in memory.

    wide    normal, of variance 1 / columns in products, layer scales of 0.1, norms of 1
    int8    levels of the same distribution, and the scales of its rows
    int4    the same with the scales of groups

Values come from one block of random numbers, read from another place for every weight: they are
as good for time and memory, and take 14 GB as fast as a disk does. The head says only what the
tokenizer beside it knows.
"""

import json
import math
import shutil
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl_engine.assets import nano_directory
from internvl_engine.checkpoint.forms import rules_of
from internvl_engine.checkpoint.quantized import FIELD, stated
from internvl_engine.checkpoint.quantizing import Quantizing
from internvl_engine.checkpoint.saving import write_weights
from internvl_engine.checkpoint.writing import Planned, add_to_json
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G
from internvl_engine.processing import InternVLProcessor
from internvl_engine.schemes import Rule, Scheme, scheme_of
from internvl_engine.weights import KINDS

BLOCK = (1 << 22) + 77  # values that all weights are taken from
SPREAD = {"int8": 127 / 4.5, "int4": 8 / 3}  # levels in a standard deviation
WIDE = torch.bfloat16
HEAD = "qllama.lm_head.weight"


def write_random(
    folder: str | Path,
    quantize: str | Scheme | None = None,
    config: InternVLConfig | None = None,
    max_shard_size: int | str = "10GB",
) -> Path:
    """Writes a checkpoint whose weights are random.

    Args:
        folder: made where it is not there.
        quantize: "int8", "int4", or a Scheme of these forms; None writes bfloat16.
        config: of the model; None is the 14B.
        max_shard_size: bytes or "10GB".

    Returns:
        folder.

    Raises:
        CheckpointError: there is no room.
    """
    folder, config = Path(folder), config or InternVLConfig()
    with torch.device("meta"):
        model = InternVL_G(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    planned = [Planned(name, shape, WIDE) for name, shape in shapes.items()]
    scheme = None if quantize is None else scheme_of(quantize)
    rules = {} if scheme is None else rules_of(scheme, model, planned)
    pieces = len(_tokenizer())
    files = Quantizing(
        planned,
        lambda name: _wide(name, shapes[name], pieces),
        rules,
        lambda name: _inner(name, shapes[name], rules[name], pieces),
    )
    write_weights(folder, files.planned, files.read, max_shard_size, files.alignment)
    config.architectures, config.dtype = [InternVL_G.__name__], WIDE
    config.save_pretrained(folder)
    if scheme is not None:
        add_to_json(folder / "config.json", {FIELD: stated(scheme, "bfloat16")})
    _write_processor(folder, config)
    return folder


def _tokenizer() -> Any:
    return InternVLProcessor.from_pretrained(nano_directory()).tokenizer


def _write_processor(folder: Path, config: InternVLConfig) -> None:
    """That of the embedded model, for pictures of the size that this one takes."""
    shutil.copyfile(nano_directory() / "tokenizer.model", folder / "tokenizer.model")
    path = nano_directory() / "processor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["image_processor"]["size"] = config.image_size
    text = json.dumps(values, indent=2) + "\n"
    (folder / "processor_config.json").write_text(text, encoding="utf-8")


@cache
def _block(kind: str) -> Tensor:
    """Random numbers: normal, or levels of a form."""
    generator = torch.Generator("cpu").manual_seed(0)
    normal = torch.randn(BLOCK, generator=generator, dtype=torch.float32, device="cpu")
    if kind == "wide":
        return normal
    levels = (normal * SPREAD[kind]).round_()
    if kind == "int8":
        return levels.clamp_(-127, 127).to(torch.int8)
    halves = (levels.clamp_(-8, 7) + 8).to(torch.uint8)
    return halves | (halves.roll(1) << 4)


def _drawn(block: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """Values of a block for a weight, from a place that its name tells."""
    count = math.prod(shape)
    rounds = block.roll(zlib.crc32(name.encode()) % BLOCK).repeat(-(-count // BLOCK))
    return rounds[:count].view(shape)


def _deviation(name: str, shape: tuple[int, ...]) -> float:
    is_table = "embed" in name or name.endswith(("query_tokens", "class_embedding"))
    return 0.02 if is_table or len(shape) < 2 else math.prod(shape[1:]) ** -0.5


def _wide(name: str, shape: tuple[int, ...], pieces: int) -> Tensor:
    """A weight in WIDE."""
    if name.endswith("logit_scale"):
        return torch.full(shape, math.log(100), dtype=WIDE, device="cpu")
    if name.endswith((".ls1", ".ls2")):
        return torch.full(shape, 0.1, dtype=WIDE, device="cpu")
    if len(shape) == 1:
        value = 1.0 if name.endswith("weight") else 0.0
        return torch.full(shape, value, dtype=WIDE, device="cpu")
    weight = _drawn((_block("wide") * _deviation(name, shape)).to(WIDE), name, shape)
    if name == HEAD:
        weight[pieces:] = 0
    return weight


def _inner(name: str, shape: tuple[int, ...], rule: Rule, pieces: int) -> Mapping[str, Tensor]:
    """The inner tensors of a weight in a form."""
    layout = KINDS[rule.form].inner_layout(shape, **rule.options)
    packed = _drawn(_block(rule.form), name, layout["packed"][0])
    absent = -shape[0] % packed.shape[2]
    if absent:
        packed[-1, :, -absent:] = 0 if rule.form == "int8" else 0x88  # the level 0
    step = _deviation(name, shape) / SPREAD[rule.form]
    scale_shape, dtype = layout["scales"]
    scales = torch.full(scale_shape, step, dtype=dtype, device="cpu")
    inner = {"packed": packed, "scales": scales}
    if "sums" in layout:
        sums = packed.sum((1, 3), dtype=torch.int32)
        inner["sums"] = sums.flatten()[: shape[0]].contiguous()
    if name == HEAD and rule.form == "int8":
        scales[pieces:] = 0
    return inner
