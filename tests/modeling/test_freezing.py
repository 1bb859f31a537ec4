"""`freeze` sets what it says: by parts, with adapters, and whatever the model has become."""

import copy

import pytest
import torch
from foreign_towers import composite
from published_model import modeling_internvl
from torch import nn
from transformers import AutoConfig

from internvl_engine import VisionLanguageConfig, VisionLanguageModel, accelerate, freeze

from models import QLLAMA, VISION, decoder, model

ALL = {"vision_model", "mlp1", "language_model"}


def chat(tie=False, layers=3, kind="qwen2", drop_path=0.0, **changes):
    """A small chat model, in training."""
    llm = AutoConfig.for_model(
        kind, **(QLLAMA | {"num_key_value_heads": 2, "tie_word_embeddings": tie})
    )
    vision = VISION | {"num_hidden_layers": layers, "drop_path_rate": drop_path}
    config = VisionLanguageConfig(vision_config=vision, llm_config=llm, **changes)
    return VisionLanguageModel(config).train()


def training(built):
    """The names of what trains."""
    return {name for name, p in built.named_parameters() if p.requires_grad}


def below(built, *prefixes):
    return {name for name, _ in built.named_parameters() if name.startswith(prefixes)}


def size(built, names):
    return sum(p.numel() for name, p in built.named_parameters() if name in names)


def check(built, report, names):
    """That exactly these train, and that the report counts them."""
    assert training(built) == names
    assert report.trainable == size(built, names)
    assert report.trainable + report.frozen == sum(p.numel() for p in built.parameters())


LAYERS = "vision_model.encoder.layers.{}."
HEAD, WORDS = "language_model.lm_head.", "language_model.model.embed_tokens."
CHAT = {
    "nothing said": ({}, ("mlp1.",)),
    "projector": ({"projector": True}, ()),
    "vision": ({"vision": False}, ("mlp1.", "vision_model.")),
    "language": ({"language": False}, ("mlp1.", "language_model.")),
    "all": ({"vision": False, "language": False}, ("",)),
    "lm_head": ({"lm_head": True}, ("mlp1.", HEAD)),
    "embeddings": ({"embeddings": True, "projector": True}, (WORDS,)),
    "last layers": ({"last_vision_layers": 2}, ("mlp1.", *(LAYERS.format(i) for i in (1, 2)))),
    "every layer": ({"last_vision_layers": 3}, ("mlp1.", "vision_model.encoder.")),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAT)
def test_what_trains_in_a_chat_model(case):
    options, prefixes = CHAT[case]
    built = chat()
    built.requires_grad_(False)  # nothing of what was before remains
    check(built, freeze(built, **options), below(built, *prefixes) if prefixes else set())


def test_only_the_frozen_language_model_goes_to_eval():
    built = chat(drop_path=0.5)
    report = freeze(built)
    assert built.vision_model.training
    assert built.mlp1.training
    assert not any(module.training for module in built.language_model.modules())
    assert (report["vision"].mode, report["language"].mode) == ("train", "eval")
    built.train()
    assert built.language_model.training
    freeze(built, language=False)
    assert built.language_model.training


@pytest.mark.parametrize("argument", ["lm_head", "embeddings"])
def test_tied_head_and_embeddings_train_together_and_count_once(argument):
    built = chat(tie=True)
    assert built.language_model.lm_head.weight is built.language_model.model.embed_tokens.weight
    assert "tied" in str(freeze(built))
    report = freeze(built, projector=True, **{argument: True})
    check(built, report, below(built, WORDS))
    assert "lm_head and embeddings are one tensor (tied): both train" in str(report)


def test_adapters_stay_trainable_and_are_counted_apart():
    pytest.importorskip("peft")
    built = chat()
    built.wrap_backbone_lora(r=2)
    built.wrap_llm_lora(r=4)
    lora = {name for name, _ in built.named_parameters() if ".lora_" in name}
    report = freeze(built)
    check(built, report, below(built, "mlp1.") | lora)
    vision = {name for name in lora if name.startswith("vision_model.")}
    assert report["vision adapters"].trainable == size(built, vision)
    assert report["language adapters"].trainable == size(built, lora - vision)
    check(built, freeze(built, adapters=False), below(built, "mlp1."))
    report = freeze(built, last_vision_layers=1, lm_head=True)
    last = {n for n in below(built, "vision_model.") if ".encoder.layers.2." in n}
    head = {n for n in below(built, "language_model.") if ".lm_head." in n}
    assert last and head
    check(built, report, below(built, "mlp1.") | lora | last | head)


def test_dropout_of_adapters_stays_on_in_a_frozen_language_model():
    pytest.importorskip("peft")
    built = chat()
    built.wrap_llm_lora(r=2, lora_dropout=0.5)
    built.train()
    freeze(built)
    modes = {name: m.training for name, m in built.language_model.named_modules()}
    dropouts = {name for name in modes if name.endswith("lora_dropout.default")}
    assert dropouts == {n for n, m in built.language_model.named_modules() if type(m) is nn.Dropout}
    assert {name for name in modes if modes[name]} >= dropouts
    assert not modes[""] and not modes["base_model.model.model.layers.0"]


def test_only_the_active_adapter_trains():
    peft = pytest.importorskip("peft")
    built = chat()
    built.wrap_llm_lora(r=2)
    built.language_model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    freeze(built)
    assert not {name for name in training(built) if ".second." in name}
    built.language_model.set_adapter("second")
    freeze(built)
    adapted = training(built) - below(built, "mlp1.")
    assert adapted == {n for n, _ in built.named_parameters() if ".second." in n}


def test_a_copy_that_peft_trains_stands_in_for_the_head():
    peft = pytest.importorskip("peft")
    built = chat()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    built.language_model = peft.get_peft_model(built.language_model, config)
    freeze(built, projector=True)
    names = training(built)
    assert {name for name in names if "lora_" not in name} == {
        "language_model.base_model.model.lm_head.modules_to_save.default.weight"
    }


@pytest.mark.parametrize("kind", ["prompt", "tokens", "IA3"])
def test_adapters_of_other_kinds_train(kind):
    peft = pytest.importorskip("peft")
    config = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "tokens": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[4]),
        "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    }[kind]()
    built = chat()
    built.language_model = peft.get_peft_model(built.language_model, config)
    wanted = {n for n in training(built) if n.startswith("language_model.")}
    assert wanted
    report = freeze(built, projector=True)
    check(built, report, wanted)
    check(built, freeze(built, projector=True, adapters=False), set())


@pytest.mark.parametrize(
    "parts, rows",
    [("vision", {"vision", "projector"}), ("language", {"embeddings", "language", "lm_head"})],
)
def test_a_model_with_parts_of_it_loaded(parts, rows, tmp_path):
    chat().save_pretrained(tmp_path)
    built = VisionLanguageModel.from_pretrained(tmp_path, parts=parts)
    assert set(freeze(built).parts) == rows
    missing = {"lm_head": True} if parts == "vision" else {"projector": True}
    with pytest.raises(ValueError, match=f"has no {next(iter(missing))}, or was loaded without"):
        freeze(built, **missing)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
@pytest.mark.parametrize("build", [chat, composite, model], ids=["chat", "transformers", "14B"])
def test_a_wrapped_model_has_the_parts_of_the_model(wrap, build):
    expected, wrapped = build(), wrap(build())
    reports = [freeze(each, lm_head=True, last_vision_layers=1) for each in (expected, wrapped)]
    assert reports[1].rows == reports[0].rows
    assert reports[0]["lm_head"].trainable > 0
    assert {n.partition(".")[2] for n in training(wrapped)} == training(expected)


QLLAMA_PARTS = {
    "nothing said": ({}, ()),
    "cross-attention": ({"cross_attention": True}, ("cross_attn",)),
    "head": ({"lm_head": True}, ("lm_head",)),
    "no queries": ({"queries": False}, ()),
    "no poolers": ({"poolers": False}, ()),
    "no heads": ({"heads": False}, ()),
}
OTHERS = {
    "queries": {"query_tokens"},
    "poolers": {"clip_projector", "clip_projector2"},
    "heads": {"text_projection", "itm_head", "logit_scale"},
}


@pytest.mark.parametrize("case", QLLAMA_PARTS)
def test_what_trains_in_an_internvl_14b(case):
    options, marks = QLLAMA_PARTS[case]
    built = model().train()
    wanted = {n for n, _ in built.named_parameters() if set(n.split(".")) & set(marks)}
    for part, names in OTHERS.items():
        if options.get(part, True):
            wanted |= {n for n, _ in built.named_parameters() if n.split(".")[0] in names}
    report = freeze(built, **options)
    check(built, report, wanted)
    assert not built.vision_model.training and not built.qllama.training
    assert built.clip_projector.training


def test_layers_that_train_keep_their_mode_in_a_frozen_vision_tower():
    built = model(vision_config=VISION | {"drop_path_rate": 0.5}).train()
    freeze(built, last_vision_layers=1)
    first, last = built.vision_model.encoder.layers
    assert last.training and last.drop_path1.training
    assert not first.training and not built.vision_model.training


def test_published_and_transformers_models_have_the_same_parts():
    theirs = composite().train()
    names = {n for n, _ in theirs.named_parameters() if "multi_modal_projector" in n}
    check(theirs, freeze(theirs), names)
    assert theirs.model.vision_tower.training and not theirs.model.language_model.training
    report = freeze(theirs, projector=True, lm_head=True, last_vision_layers=1)
    wanted = {n for n, _ in theirs.named_parameters() if "lm_head" in n or ".layer.1." in n}
    check(theirs, report, wanted)
    published = modeling_internvl.InternVLModel(decoder().config, layers=2)
    report = freeze(published, cross_attention=True)
    assert {n for n in training(published) if n.startswith("qllama.")} == {
        f"qllama.{n}" for n, _ in published.qllama.named_parameters() if "cross_attn" in n
    }


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("first", [True, False], ids=["accelerate, freeze", "freeze, accelerate"])
@pytest.mark.parametrize("options", [{}, {"last_vision_layers": 1, "lm_head": True},
                                     {"vision": False, "cross_attention": True}])  # fmt: skip
def test_an_accelerated_model_has_the_gradients_of_the_eager_one(options, mode, first):
    expected = model(vision_config=VISION | {"drop_path_rate": 0.0})
    built = copy.deepcopy(expected)
    if first:
        accelerate(built, mode)
    freeze(built, **options)
    if not first:
        accelerate(built, mode)
    freeze(expected, **options)
    pixels, ids = torch.randn(2, 3, 28, 28), torch.tensor([[1, 5, 9, 30, 2], [1, 7, 8, 9, 2]])
    for one in (built, expected):
        assert not one.vision_model.training
        sum(logits.square().mean() for logits in one(pixels, ids)).backward()
    theirs = {n: p.grad for n, p in expected.named_parameters() if p.grad is not None}
    ours = {n: p.grad for n, p in built.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() <= training(expected)
    largest = max(gradient.norm() for gradient in theirs.values())
    for name, gradient in theirs.items():
        # Roundings of fused layers: some gradients are zero but for them. What is left out shows
        # as 1.
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5 * largest, name


def test_a_frozen_parameter_loses_its_gradient():
    built = chat()
    sum(p.square().sum() for p in built.parameters()).backward()
    before = built.language_model.lm_head.weight.clone()
    freeze(built)
    assert {n for n, p in built.named_parameters() if p.grad is not None} == training(built)
    torch.optim.SGD(built.parameters(), lr=1.0).step()
    assert torch.equal(built.language_model.lm_head.weight, before)


def test_the_table_prints_well():
    report = freeze(chat(), lm_head=True)
    lines = str(report).splitlines()
    assert lines[0] == "20,800 of 182,400 parameters train (11.40%)"
    assert lines[1].split() == ["part", "trains", "frozen", "mode"]
    assert [line.split()[0] for line in lines[2:]] == [row.name for row in report]
    assert len({len(line.rsplit("  ", 1)[0]) for line in lines[2:3]}) == 1
    assert repr(report) == str(report)
    assert report.parts["lm_head"].trainable == 61 * 64


def test_layers_that_are_not_read_are_named():
    report = freeze(chat(select_layer=-2), last_vision_layers=1)
    assert "the last 1 vision layers are not read (select_layer -2)" in str(report)


@pytest.mark.parametrize(
    "build, options, error, message",
    [
        (chat, {"cross_attention": True}, ValueError, "cross_attention is a part of .*14B.*chat"),
        (chat, {"poolers": False}, ValueError, "poolers is a part of"),
        (chat, {"heads": True}, ValueError, "heads is a part of an InternVL-14B; this is a chat"),
        (chat, {"last_vision_layers": 4}, ValueError, "from 0 to the 3 layers.*got 4"),
        (chat, {"last_vision_layers": -4}, ValueError, "got -4"),
        (chat, {"last_vision_layers": True}, TypeError, "number of layers, got True"),
        (chat, {"vision": "yes"}, TypeError, "vision must be True or False, got 'yes'"),
        (model, {"projector": True}, ValueError, "has no projector"),
        (lambda: nn.Linear(2, 2), {}, TypeError, "needed a chat model.*got Linear"),
    ],
)
def test_what_a_model_lacks_is_an_error_and_changes_nothing(build, options, error, message):
    built = build().train()
    built.requires_grad_(False)
    with pytest.raises(error, match=message):
        freeze(built, **options)
    assert not training(built)
    assert all(module.training for module in built.modules())


def test_a_quantized_weight_cannot_train():
    built = chat()
    linear = built.language_model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.char(), requires_grad=False)
    freeze(built)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is torch\.int8"):
        freeze(built, language=False)
