"""Writes checkpoints as they are published, from the recorded states of tiny models."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from golden_vectors import Golden

# What old transformers wrote into every nested configuration.
LEGACY = {
    "add_cross_attention": False, "bad_words_ids": None, "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "diversity_penalty": 0.0,
    "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0,
    "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_attentions": False,
    "output_hidden_states": False, "output_scores": False, "prefix": None, "problem_type": None,
    "pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0,
    "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0,
    "tf_legacy_loss": False, "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50,
    "top_p": 1.0, "torch_dtype": "bfloat16", "torchscript": False, "transformers_version": "4.36.2",
    "typical_p": 1.0, "use_bfloat16": True,
}  # fmt: skip


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a published directory: no tie flag, the frequency nested only."""
    frequency = config.get("cross_attention_frequency", 2)
    hoisted = ("cross_attention_frequency", "tie_word_embeddings")
    values = {name: value for name, value in config.items() if name not in hoisted}
    nested = {"num_query_token": values["num_query_token"], "cross_attention_frequency": frequency}
    return {
        **values,
        "_commit_hash": None,
        "_name_or_path": "OpenGVLab/InternVL-14B-224px",
        "architectures": ["InternVLModel"],
        "auto_map": {"AutoConfig": "configuration_internvl.InternVLConfig"},
        "hidden_size": values["qllama_config"]["hidden_size"],
        "initializer_range": 0.02,
        "max_txt_len": 32,
        "model_type": "internvl",
        "qllama_config": {**LEGACY, **values["qllama_config"], **nested, "model_type": "llama"},
        "torch_dtype": "bfloat16",
        "transformers_version": None,
        "use_cache": True,
        "vision_config": {**LEGACY, **values["vision_config"], "model_type": "intern_vit_6b"},
    }


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(published_config(config), indent=2))


def write_published(
    folder: Path, golden: Golden, state: Mapping[str, Tensor] | None = None, shards: int = 3
) -> Path:
    """config.json, shards and index; one file without an index for shards=1. Returns folder."""
    write_config(folder, golden.config)
    state = golden.state if state is None else state
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    write_index(folder, tensors, "model-{}.safetensors", "model.safetensors.index.json", shards)
    return folder


def write_bin(folder: Path, golden: Golden, shards: int = 1) -> Path:
    """The same as PyTorch's own files."""
    write_config(folder, golden.config)
    if shards == 1:
        torch.save(golden.state, folder / "pytorch_model.bin")
    else:
        write_index(
            folder, golden.state, "pytorch_model-{}.bin", "pytorch_model.bin.index.json", shards
        )
    return folder


def write_index(
    folder: Path, state: Mapping[str, Tensor], pattern: str, index: str, shards: int
) -> None:
    names = sorted(state)
    weight_map = {}
    for number in range(shards):
        file = pattern.format(f"{number + 1:05d}-of-{shards:05d}")
        part = {name: state[name] for name in names[number::shards]}
        (save_file if file.endswith("s") else torch.save)(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in state.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / index).write_text(json.dumps(content))


def write_sparse(path: Path, shapes: Mapping[str, list[int]]) -> int:
    """Zeros in bfloat16 that take no room on disk. Returns the bytes of the tensors."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def write_sparse_shards(folder: Path, shapes: Mapping[str, list[int]]) -> list[int]:
    """The same in shards of at most 10 GB with their index. Returns the bytes of each."""
    shards: list[dict] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + 2 * math.prod(shape) > 10e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    sizes = [write_sparse(folder / name, part) for name, part in zip(names, shards, strict=True)]
    weight_map = {key: name for name, part in zip(names, shards, strict=True) for key in part}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sizes
