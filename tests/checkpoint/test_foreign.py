"""Models that are not ours, loaded by our reader: computed buffers, and heads that are tied."""

import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from internvl_engine.checkpoint import CheckpointError, Placement, load_pretrained
from internvl_engine.checkpoint.building import build, place_buffers

IDS = torch.tensor([[1, 5, 9, 2]])
FP32 = {"dtype": torch.float32}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def llama(tie: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, num_attention_heads=4, intermediate_size=96,
        num_hidden_layers=2, tie_word_embeddings=tie,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_map": {"": "disk"}},
        {"device_map": {"": "cpu", "model.embed_tokens": "disk"}},
        {"device_map": {"": "cpu", "lm_head": "disk"}},
    ],
    ids=["here", "offloaded", "the embedding offloaded", "the head offloaded"],
)
@pytest.mark.parametrize("tie", [False, True])
def test_a_language_model_of_transformers(tmp_path, tie, options):
    saved = llama(tie)
    saved.save_pretrained(tmp_path / "a")
    loaded = load_pretrained(LlamaForCausalLM, tmp_path / "a", **FP32, **options)
    assert not any(buffer.is_meta for buffer in loaded.buffers())
    assert torch.equal(loaded(IDS).logits, saved(IDS).logits)
    if options:
        return
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie
    loaded.save_pretrained(tmp_path / "b")
    assert (HEAD in load_file(tmp_path / "b" / "model.safetensors")) != tie
    again = LlamaForCausalLM.from_pretrained(tmp_path / "b", **FP32)
    assert torch.equal(again(IDS).logits, saved(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("tie", [False, True])
def test_the_language_model_of_a_chat(tmp_path, tie):
    saved = llama(tie)
    saved.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {f"language_model.{name}": t.clone() for name, t in load_file(path).items()}
    save_file(state | {"vision_model.x": torch.ones(2), "mlp1.0.bias": torch.ones(2)}, path)
    config = {
        "model_type": "internvl_chat", "vision_config": {}, "llm_config": saved.config.to_dict(),
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    loaded = load_pretrained(LlamaForCausalLM, tmp_path, **FP32)
    assert torch.equal(loaded(IDS).logits, saved(IDS).logits)


def rewritten(folder, tie: bool, **changes):
    """A saved model whose file has some tensors more or less than its configuration says."""
    llama(tie).save_pretrained(folder)
    path = folder / "model.safetensors"
    state = load_file(path) | changes
    save_file({n: t.clone() for n, t in state.items() if t is not None}, path)
    return folder


@torch.no_grad()
def test_a_head_in_the_file_is_separate_whatever_the_configuration_says(tmp_path):
    head = torch.randn(61, 64)
    folder = rewritten(tmp_path / "a", tie=True, **{HEAD: head})
    model = load_pretrained(LlamaForCausalLM, folder, **FP32)
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.model.embed_tokens.weight, head)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "b")
    again = load_pretrained(LlamaForCausalLM, tmp_path / "b", **FP32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_head_that_no_file_has_is_the_embedding(tmp_path):
    folder = rewritten(tmp_path / "a", tie=False, **{HEAD: None})
    with pytest.warns(UserWarning, match=f"no {HEAD}, so {EMBEDDING} serves as the head too"):
        model = load_pretrained(LlamaForCausalLM, folder, **FP32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    model.save_pretrained(tmp_path / "b")
    assert HEAD not in load_file(tmp_path / "b" / "model.safetensors")


def test_other_weights_are_still_missed(tmp_path):
    folder = rewritten(tmp_path, tie=True, **{EMBEDDING: None})
    with pytest.raises(CheckpointError, match=f"2 weights are missing: {HEAD}, {EMBEDDING}"):
        load_pretrained(LlamaForCausalLM, folder)


class Computed(nn.Module):
    """Buffers of both kinds, deeper down, one of them computed from the configuration."""

    def __init__(self, config: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(config, config), nn.BatchNorm1d(config))
        self.inner.register_buffer("angles", torch.arange(config) / config, persistent=False)
        self.register_buffer("nothing", None, persistent=False)
        self.register_buffer("running", torch.zeros(config))
        self.inner.kept = self.inner.angles  # as rotary embeddings of transformers 4


def test_only_what_no_file_holds_is_computed():
    model = build(Computed, 5)
    assert torch.equal(model.inner.angles, torch.arange(5) / 5)
    assert model.inner.kept is model.inner.angles
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.nothing is None


def test_buffers_lie_beside_the_weights():
    model = build(Computed, 5)
    place_buffers(model, Placement(torch.device("cpu"), {"inner": "meta"}))
    assert model.inner.angles.is_meta


def test_models_that_other_threads_build_meanwhile_keep_their_weights():
    made: list[nn.Module] = []

    class Threaded(Computed):
        def __init__(self, config: int) -> None:
            super().__init__(config)
            thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
            thread.start()
            thread.join()

    build(Threaded, 3)
    assert len(made) == 2 and not any(p.is_meta for m in made for p in m.parameters())
    assert not nn.Linear(2, 2).weight.is_meta  # nothing is left behind
