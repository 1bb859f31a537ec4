"""LoRA on chat models: which linears, under which names, and what it leaves alone."""

from pathlib import Path

import pytest
import torch
from assembled import FP32, assemble, example, language
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from internvl_engine import VisionLanguageConfig, VisionLanguageModel

from models import QLLAMA, VISION

peft = pytest.importorskip("peft")

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
SEPARATE = {f"self_attn.{n}_proj" for n in "qkvo"} | {
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
}
TARGETS = {
    "llama": SEPARATE,
    "qwen2": SEPARATE,
    "qwen3": SEPARATE,
    "mistral": SEPARATE,
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
}
VISION_TARGETS = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


def chat(kind="llama"):
    fields = {"num_key_value_heads": 2, "head_dim": 16}
    llm = AutoConfig.for_model(kind, **(QLLAMA | fields))
    config = VisionLanguageConfig(vision_config=VISION, llm_config=llm, img_context_token_id=60)
    return VisionLanguageModel(config).eval()


def adapted(built):
    """The ends of the names of the linears with LoRA, without the number of the layer."""
    found = (n.partition(".layers.")[2] for n, _ in built.named_modules() if n.endswith(".lora_A"))
    return {n.partition(".")[2].removesuffix(".lora_A") for n in found}


@pytest.mark.parametrize("kind", TARGETS)
def test_the_linears_of_every_layer_are_adapted(kind):
    built = chat(kind)
    built.wrap_llm_lora(r=4)
    assert adapted(built) == TARGETS[kind]
    assert len([n for n, _ in built.named_modules() if n.endswith(".lora_A")]) == 3 * len(
        TARGETS[kind]
    )
    built.wrap_backbone_lora(r=2)
    assert adapted(built.vision_model) == VISION_TARGETS
    names = [n for n, _ in built.named_parameters() if ".lora_" in n]
    start = "language_model.base_model.model.model.layers.0.self_attn.o_proj"
    assert f"{start}.lora_A.default.weight" in names
    assert "vision_model.base_model.model.encoder.layers.1.mlp.fc1.lora_B.default.weight" in names
    assert f"{start}.base_layer.weight" in built.state_dict()


def test_internlm2_is_adapted_as_the_llama_that_it_is_here():
    built = VisionLanguageModel.from_pretrained(GOLDEN / "internlm2_300m_dynamic", **FP32)
    built.wrap_llm_lora(r=2)
    assert adapted(built) == SEPARATE


def test_ranks_alphas_and_dropout():
    built = chat()
    built.wrap_backbone_lora(r=3)
    built.wrap_llm_lora(r=4, lora_alpha=5, lora_dropout=0.25)
    config = built.config
    assert (config.use_backbone_lora, config.backbone_lora_alpha) == (3, 6)
    assert (config.use_llm_lora, config.llm_lora_alpha) == (4, 5)
    settings = built.language_model.peft_config["default"]
    assert (settings.task_type, settings.lora_dropout) == ("CAUSAL_LM", 0.25)
    assert built.vision_model.peft_config["default"].lora_dropout == 0.05
    assert built.vision_model.peft_config["default"].task_type is None
    again = VisionLanguageModel(config)  # as before loading a checkpoint with LoRA
    assert again.state_dict().keys() == built.state_dict().keys()
    assert again.language_model.peft_config["default"].lora_alpha == 5


def test_the_rest_of_the_tower_is_frozen_and_the_projector_is_not():
    built = chat()
    built.wrap_llm_lora(r=4)
    frozen = {n for n, p in built.named_parameters() if not p.requires_grad}
    assert frozen == {
        n
        for n, _ in built.named_parameters()
        if n.startswith("language_model.") and "lora_" not in n
    }
    embeds = built.language_model.get_input_embeddings()(torch.tensor([[1, 2]]))
    assert embeds.requires_grad  # for recomputed layers
    assert not built.language_model.get_input_embeddings().weight.requires_grad


def test_an_evaluated_model_stays_so():
    built = chat()
    built.wrap_llm_lora(r=4)
    built.wrap_backbone_lora(r=4)
    assert not any(module.training for module in built.modules())
    built = chat().train()
    built.wrap_llm_lora(r=4)
    assert all(module.training for module in built.language_model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_merged_it_is_twice_its_product_with_the_weights(context):
    built = assemble(language=language())
    inputs = example(built)
    built.wrap_llm_lora(r=4)
    built.wrap_backbone_lora(r=4)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    with context():
        logits = built(**inputs).logits
        answer = built.generate(**inputs, max_new_tokens=4, do_sample=False)
    linear = built.language_model.get_base_model().model.layers[0].mlp.up_proj
    a, b = linear.lora_A["default"].weight, linear.lora_B["default"].weight
    expected = linear.base_layer.weight + 2 * b @ a
    built.language_model = built.language_model.merge_and_unload()
    built.vision_model = built.vision_model.merge_and_unload()
    merged = built.language_model.model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(merged, expected)
    with context():
        torch.testing.assert_close(built(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
        again = built.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, answer)


def test_what_cannot_be_wrapped():
    built = chat()
    for rank in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="rank r must be a whole number from 1"):
            built.wrap_llm_lora(r=rank)
    built.wrap_llm_lora(r=2)
    with pytest.raises(ValueError, match="LlamaForCausalLM has LoRA already: merge it first"):
        built.wrap_llm_lora(r=2)
    assert built.config.use_llm_lora == 2
    fields = {"vocab_size": 61, "n_embd": 32, "n_layer": 1, "n_head": 2}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **fields))
    assert isinstance(other, nn.Module)
    built = assemble(language=other, tokenizer=None)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none of the linears self_attn.q"):
        built.wrap_llm_lora(r=2)
    assert built.language_model is other
    assert built.config.use_llm_lora == 0
