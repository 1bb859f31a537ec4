"""Keywords of model cards, and checkpoints of another kind: taken, or a reason that helps."""

import json
import shutil

import pytest
import torch
from published_layout import write_published
from safetensors.torch import save_file

from internvl_engine.checkpoint import CheckpointError, check_takes
from internvl_engine.configuration import InternVisionConfig
from internvl_engine.modeling import InternVisionModel, InternVL_C, InternVL_G, InternVLModel
from internvl_engine.modeling.lora import QLLAMA_LORA, VISION_LORA
from internvl_engine.modeling.qllama import LlamaForCausalLM

FP32 = {"dtype": torch.float32}
MODEL_CARD = {
    "low_cpu_mem_usage": True, "trust_remote_code": True, "use_flash_attn": True,
    "load_in_8bit": False, "load_in_4bit": False, "resume_download": True, "use_fast": False,
    "attn_implementation": "flash_attention_2", "torch_dtype": torch.float32,
    "quantization_config": None, "use_safetensors": True, "force_download": False,
    "offload_state_dict": True, "use_auth_token": None, "from_tf": False, "variant": None,
    "ignore_mismatched_sizes": False, "state_dict": None, "_fast_init": True, "proxies": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", [InternVL_G, InternVisionModel])
def test_keywords_of_model_cards_change_nothing(published, golden_g, kind):
    model = kind.from_pretrained(published, **MODEL_CARD)
    prefix = "vision_model." if kind is InternVisionModel else ""
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, golden_g.state[prefix + name]), name


@pytest.mark.parametrize(
    "keyword, reason",
    [
        ({"load_in_4bit": True}, "load_in_4bit=True is not supported: .*quantize='int8'"),
        ({"load_in_8bit": True}, "load_in_8bit=True is not supported"),
        (
            {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
            r"quantization_config \(bitsandbytes, 4 bits\) is not supported",
        ),
        ({"gguf_file": "model.gguf"}, "GGUF files cannot be read"),
        ({"ignore_mismatched_sizes": True}, "a weight of another shape is always an error"),
        ({"state_dict": {"a": torch.ones(1)}}, "state_dict is not supported: .*load_state_dict"),
        ({"from_tf": True}, "only PyTorch's and safetensors' files"),
        ({"variant": "fp16"}, "variant='fp16' is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_not_happen_is_refused(published, keyword, reason):
    with pytest.raises(ValueError, match=reason):
        InternVL_G.from_pretrained(published, **keyword)


def test_a_configuration_object_of_bitsandbytes(published):
    from transformers import BitsAndBytesConfig

    with pytest.raises(ValueError, match=r"\(bitsandbytes, 8 bits\)"):
        InternVL_G.from_pretrained(
            published, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


@pytest.fixture
def folder(tmp_path, published):
    return shutil.copytree(published, tmp_path / "checkpoint")


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


CONFIGS = {
    "chat": (
        {"model_type": "internvl_chat", "vision_config": {}, "llm_config": {}},
        "this is a chat checkpoint .*, not an InternVL-14B checkpoint; VisionLanguageModel and ",
    ),
    "chat of transformers": (
        {"model_type": "internvl", "vision_config": {}, "text_config": {}},
        "a chat checkpoint in transformers' layout .*VisionLanguageModel and InternVLChat take it",
    ),
    "ViT": (
        {"model_type": "intern_vit_6b", "hidden_size": 8},
        "this is an InternViT vision tower alone, not an InternVL-14B.*; InternVisionModel takes",
    ),
    "ViT of transformers": (
        {"model_type": "internvl_vision", "hidden_size": 8},
        "InternViT vision tower alone, in transformers' layout",
    ),
    "something else": (
        {"model_type": "clip"},
        "it has model_type 'clip': another architecture, not an InternVL-14B checkpoint",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_other_kinds_of_checkpoints_are_called_so(tmp_path, name):
    values, message = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    for kind in (InternVLModel, InternVL_C):
        with pytest.raises(CheckpointError, match=message):
            kind.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_takes(tmp_path, InternVLModel)


def test_a_configuration_of_another_class_in_place_of_the_file(published):
    with pytest.raises(CheckpointError, match="config: not a InternVLConfig: this is an InternViT"):
        InternVL_G.from_pretrained(published, config=InternVisionConfig())


def test_a_language_model_has_no_vision_tower_and_the_other_way_round(tmp_path, published):
    InternVisionModel.from_pretrained(published, **FP32).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="vision tower alone.*, not a language model"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_what_it_takes_is_taken(published):
    assert check_takes(published, InternVLModel).folder == published
    assert check_takes(published, InternVisionModel, revision=None).folder == published


def test_a_peft_adapter_alone(tmp_path):
    adapter = {
        "base_model_name_or_path": "OpenGVLab/InternVL-14B-224px", "peft_type": "LORA", "r": 16,
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)},
        tmp_path / "adapter_model.safetensors",
    )
    for call in (InternVL_G.from_pretrained, lambda f: check_takes(f, InternVLModel)):
        with pytest.raises(
            CheckpointError,
            match=r"a peft adapter \(LORA, rank 16\).* Load OpenGVLab/InternVL-14B-224px with ",
        ):
            call(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("place", ["model", "model.qllama", "model.vision_model"])
def test_an_adapter_as_peft_saves_it(tmp_path, published, golden_g, place):
    """What the message says is what works."""
    peft = pytest.importorskip("peft")
    model = InternVL_G.from_pretrained(published, **FP32)
    targets = [*VISION_LORA, *QLLAMA_LORA]
    adapted = peft.get_peft_model(
        model.get_submodule(place.removeprefix("model").lstrip(".")),
        peft.LoraConfig(r=4, target_modules=targets),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path)
    image = golden_g.inputs["image"]
    with torch.no_grad():  # peft adapts the modules in place
        expected = model.eval().encode_image(image)
    with pytest.raises(CheckpointError, match="a peft adapter") as error:
        InternVL_G.from_pretrained(tmp_path)
    advice = str(error.value).partition("then ")[2]
    assert advice == f"{place} = peft.PeftModel.from_pretrained({place}, folder)"
    names = {"model": InternVL_G.from_pretrained(published, **FP32), "folder": tmp_path}
    exec(advice, names | {"peft": peft}, names)
    with torch.no_grad():
        actual = names["model"].eval().encode_image(image)
    assert torch.equal(actual, expected)
    assert not torch.equal(
        actual, InternVL_G.from_pretrained(published, **FP32).encode_image(image)
    )


QUANTIZED = {
    "AWQ, 4 bits": (
        {"quant_method": "awq", "bits": 4, "group_size": 128},
        ["qweight", "qzeros", "scales"], torch.int32,
    ),
    "GPTQ, 4 bits": (
        {"quant_method": "gptq", "bits": 4}, ["qweight", "qzeros", "g_idx", "scales"], torch.int32,
    ),
    "bitsandbytes, 4 bits": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"],
        torch.uint8,
    ),
    "bitsandbytes, 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True}, ["weight", "SCB"], torch.int8,
    ),
    "fp8": ({"quant_method": "fp8"}, ["weight", "weight_scale_inv"], torch.float8_e4m3fn),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"}, ["weight_packed", "weight_scale"], torch.int32,
    ),
}  # fmt: skip
LINEAR = "qllama.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "unstated"])
@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_checkpoints_are_called_so(tmp_path, golden_g, method, stated):
    config, endings, dtype = QUANTIZED[method]
    state = {name: tensor for name, tensor in golden_g.state.items() if not name.startswith(LINEAR)}
    state |= {f"{LINEAR}.{ending}": torch.ones(4).to(dtype) for ending in endings}
    write_published(tmp_path, golden_g, state)
    if stated:
        edit(tmp_path, quantization_config=config)
    kind = method if stated else ""
    with pytest.raises(CheckpointError, match=f"quantized with .*{kind}.*not supported: take the"):
        InternVL_G.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="quantized with"):
        InternVL_G.from_pretrained(tmp_path, quantization_config=None)
    InternVisionModel.from_pretrained(tmp_path)  # the tower beside it is not quantized


def test_a_configuration_that_asks_for_quantization(tmp_path, folder, golden_g):
    edit(folder, quantization_config={"load_in_4bit": True})
    with pytest.raises(
        CheckpointError,
        match=r"config.json has a quantization_config, bitsandbytes, 4 bits.*quantization_config=N",
    ):
        InternVL_G.from_pretrained(folder)
    model = InternVL_G.from_pretrained(folder, quantization_config=None, **FP32)
    assert torch.equal(model.query_tokens, golden_g.state["query_tokens"])
    model.save_pretrained(tmp_path / "out")  # what is saved does not ask again
    InternVL_G.from_pretrained(tmp_path / "out")
    tower = InternVisionModel.from_pretrained(folder, **FP32)  # it is not what was asked about
    tower.save_pretrained(tmp_path / "tower")
    edit(tmp_path / "tower", quantization_config={"load_in_8bit": True})
    with pytest.raises(CheckpointError, match="has a quantization_config, bitsandbytes, 8 bits"):
        InternVisionModel.from_pretrained(tmp_path / "tower")
