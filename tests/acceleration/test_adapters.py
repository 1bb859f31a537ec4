"""Adapters on an accelerated model: they train and nothing else does, whatever peft does then."""

import copy

import pytest
import torch
from company import (
    PAIRS,
    assert_same_outputs,
    assert_same_weights,
    call,
    close,
    eager,
    put,
    run,
    step,
    trainable,
)

from internvl_engine import accelerate

peft = pytest.importorskip("peft")


pytestmark = pytest.mark.filterwarnings("ignore")


TARGETS = {
    "ours": ["qkv", "fc1", "q_proj", "down_proj"],
    "chat": ["q_proj", "fc1", "down_proj"],
    "published": ["qkv", "fc2", "v_proj", "gate_proj"],
}


def lora(kind, **options):
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS[kind], **options)


ADAPTERS = {
    "LoRA": lora,
    "LoRA with dropout": lambda kind: lora(kind, lora_dropout=0.3),
    "DoRA": lambda kind: lora(kind, use_dora=True),
    "rsLoRA": lambda kind: lora(kind, use_rslora=True),
    "modules_to_save": lambda kind: lora(kind, modules_to_save=["fc2"]),
    "IA3": lambda kind: peft.IA3Config(
        target_modules=TARGETS[kind], feedforward_modules=[TARGETS[kind][-1]]
    ),
    "LoHa": lambda kind: peft.LoHaConfig(r=2, target_modules=TARGETS[kind]),
    "OFT": lambda kind: peft.OFTConfig(
        oft_block_size=8, target_modules=TARGETS[kind], use_cayley_neumann=False
    ),
}


def adapted(built, config):
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(built, config)
    with torch.no_grad():  # adapters begin with zeros, which would hide what they do
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrapped


def trained(built, seed=2):
    """After three steps of what an optimizer finds to train."""
    torch.manual_seed(seed)
    wanted = [p for p in built.parameters() if p.requires_grad]
    step(built.train(), torch.optim.SGD(wanted, lr=0.02), 3)
    return built


CASES = [("chat", name) for name in ADAPTERS] + [(k, "LoRA") for k in ("ours", "published")]


@pytest.mark.parametrize("state", ["inference", "training", "in train()"])
@pytest.mark.parametrize("kind, adapter", CASES)
def test_adapters_train_and_nothing_else(kind, adapter, state):
    expected, built = eager(kind), put(eager(kind), state)
    config = ADAPTERS[adapter](kind)
    expected, built = adapted(expected, config), adapted(built, copy.deepcopy(config))
    assert trainable(built) == trainable(expected)
    base = {k: t.clone() for k, t in built.state_dict().items() if k not in trainable(built)}
    assert_same_weights(trained(built), trained(expected))
    now = built.state_dict()
    assert all(torch.equal(now[name], t) for name, t in base.items())
    assert_same_outputs(built, expected)


@pytest.mark.parametrize("adapter", ["prefix", "prompt"])
def test_prefixes_and_prompts_train_and_nothing_else(adapter, state):
    expected, built = eager("llm"), put(eager("llm"), state)
    cls = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[adapter]
    models = []
    for one in (expected, built):
        torch.manual_seed(3)
        config = cls(task_type="CAUSAL_LM", num_virtual_tokens=3)
        models.append(trained(peft.get_peft_model(one, config)))
    assert trainable(models[0]) == trainable(models[1])
    assert_same_weights(*reversed(models))


@pytest.mark.parametrize("after", ["merge", "unmerge", "set_adapter", "unload", "merge_and_unload",
                                   "disable_adapter", "delete_adapter"])  # fmt: skip
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("kind, state", PAIRS[:2] + PAIRS[4:5])
@torch.no_grad()
def test_what_peft_does_to_weights_is_what_computes(kind, used, after, state):
    """Equal to a model that was never accelerated, with and without a run between."""
    outputs = []
    for one in (eager(kind), put(eager(kind), state)):
        one = adapted(one, lora(kind)).eval()
        one.add_adapter("other", lora(kind, init_lora_weights=False))
        if used:
            run(one)
        one = PEFT[after](one, used)
        outputs.append(run(one))
        if isinstance(one, peft.PeftModel) and used:
            one.unmerge_adapter()
            outputs.append(run(one))
    half = len(outputs) // 2
    for theirs, ours in zip(outputs[:half], outputs[half:], strict=True):
        close(ours, theirs)


def _merge(one, used):
    one.merge_adapter()
    return one


def _unmerge(one, used):
    one.merge_adapter()
    if used:
        run(one)
    one.unmerge_adapter()
    return one


def _set_adapter(one, used):
    one.set_adapter("other")
    return one


def _disable(one, used):
    with one.disable_adapter():
        run(one)
    return one


def _delete(one, used):
    one.set_adapter("other")
    one.delete_adapter("default")
    return one


PEFT = {
    "merge": _merge,
    "unmerge": _unmerge,
    "set_adapter": _set_adapter,
    "unload": lambda one, used: one.unload(),
    "merge_and_unload": lambda one, used: one.merge_and_unload(),
    "disable_adapter": _disable,
    "delete_adapter": _delete,
}


@pytest.mark.parametrize("mode", ["inference", "training"])
@torch.no_grad()
def test_undo_gives_the_objects_back_after_an_adapter_came_and_went(mode):
    built = eager("chat")
    expected, objects = run(built), dict(built.named_modules())
    report = accelerate(built, mode)
    run(built)
    wrapped = adapted(built, lora("chat", modules_to_save=["fc2"]))
    merged = wrapped.unload()
    assert merged is built
    assert report.replaced
    report.undo()
    assert not report.replaced
    now = dict(built.named_modules())
    kept = {name for name in objects if "fc2" not in name}  # which peft put elsewhere itself
    assert all(now[name] is objects[name] for name in kept)
    assert not [m for m in built.modules() if "internvl_engine" in type(m).__module__]
    close(run(built), expected)


def test_our_own_lora_is_merged_into_what_computes(state):
    models = [eager("ours"), put(eager("ours"), state)]
    (pixels, _), _ = call(models[0])
    outputs = []
    for one in models:
        torch.manual_seed(4)
        one.wrap_qllama_lora(r=2, lora_alpha=4, lora_dropout=0.0)
        wanted = [p for p in one.parameters() if p.requires_grad]
        step(one.train(), torch.optim.SGD(wanted, lr=0.5))
        one.eval().qllama = one.qllama.merge_and_unload()
        with torch.no_grad():
            outputs.append(one.encode_image(pixels))
    close(*reversed(outputs))
    with torch.no_grad():
        assert (eager("ours").encode_image(pixels) - outputs[0]).norm() > 1e-3
