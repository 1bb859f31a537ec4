"""`accelerate` on decoders that are not ours: the published QLLaMA, transformers' LLaMA and kin."""

import copy
import re
from collections import Counter

import pytest
import torch
from foreign_decoders import DECODERS, LEFT, close, states
from tensor_bytes import tensor_bytes

from internvl_engine import accelerate


@pytest.fixture(params=DECODERS)
def name(request):
    return request.param


@pytest.fixture
def built(name):
    return DECODERS[name]()


@torch.no_grad()
def test_everything_is_replaced_and_the_numbers_stay(name, built):
    masks = (None, LEFT, LEFT.flip(1))
    expected = [states(built, mask) for mask in masks]
    report = accelerate(built, strict=True)
    kinds = Counter(entry.fused for entry in report.entries)
    if name == "published":
        attention = {"FusedPublishedAttention": 3, "FusedCrossAttention": 2}
        assert kinds == attention | {"FusedLlamaMLP": 3, "FusedRMSNorm": 7}
    else:
        assert kinds == {"FusedLlamaLayer": 3, "FusedRMSNorm": 1}
    assert re.search(r"3 x (\w+) -> Fused\w+$", str(report), re.MULTILINE)
    for mask, logits in zip(masks, expected, strict=True):
        close(states(built, mask), logits)


@pytest.mark.parametrize(
    "mode, dtype", [("inference", torch.bfloat16), ("training", torch.float32)]
)
@torch.no_grad()
def test_every_weight_exists_once_and_comes_back(built, mode, dtype):
    built.to(dtype)
    state, modules = copy.deepcopy(built.state_dict()), dict(built.named_modules())
    expected, before = states(built), tensor_bytes()
    report = accelerate(built, mode)
    fused = states(built)
    assert tensor_bytes() - before - fused.nbytes <= 0.01 * sum(
        p.nbytes for p in built.parameters()
    )
    copied = copy.deepcopy(built)
    for one in (built, copied):
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[key]) for key, t in one.state_dict().items())
    report.undo()
    assert dict(built.named_modules()) == modules
    assert all(torch.equal(t, state[key]) for key, t in built.state_dict().items())
    assert torch.equal(states(built), expected)
    for parameter in built.parameters():
        parameter.zero_()
    assert torch.equal(states(copied), fused)  # a copy shares nothing


@pytest.mark.parametrize("order", ["lora first", "accelerate first"])
def test_lora_survives(built, order):
    peft = pytest.importorskip("peft")

    def adapted(one):
        targets = ["q_proj", "v_proj", "o_proj"]
        one = peft.get_peft_model(one, peft.LoraConfig(r=2, target_modules=targets))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in one.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2)
        return one.eval()

    with torch.no_grad():
        plain = states(built)
        eager = adapted(copy.deepcopy(built))
        if order == "accelerate first":
            accelerate(built)
            states(built)
            built = adapted(built)
        else:
            built = adapted(built)
            accelerate(built)
        expected = states(eager.base_model.model)
        close(states(built.base_model.model), expected)
        assert (expected - plain).abs().max() > 1e-2
        close(states(built.merge_and_unload()), expected)


@pytest.mark.parametrize("inner", ["self_attn.v_proj", "self_attn.o_proj", "self_attn", "mlp"])
@torch.no_grad()
def test_hooks_see_and_change_what_they_did(built, inner):
    fused = copy.deepcopy(built)
    accelerate(fused)
    plain = states(fused)

    def double(module, args, output):
        return (
            tuple(x if x is None else x * 2 for x in output) if inner == "self_attn" else 2 * output
        )

    for one in (built, fused):
        handle = one.model.layers[1].get_submodule(inner).register_forward_hook(double)
    changed = states(fused)
    close(changed, states(built))
    assert (changed - plain).abs().max() > 1e-2
    handle.remove()
    close(states(fused), plain)


@torch.no_grad()
def test_what_hooks_move_is_left_alone(built):
    hooks = pytest.importorskip("accelerate.hooks")
    expected = states(built)
    attention = built.model.layers[1].self_attn
    hooks.add_hook_to_module(attention, hooks.AlignDevicesHook("cpu", offload=True))
    report = accelerate(built)
    assert list(report.kept) == ["model.layers.1.self_attn"]
    assert "device_map" in report.kept["model.layers.1.self_attn"]
    assert built.model.layers[1].self_attn is attention
    close(states(built), expected)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["open", "padded"])
def test_training_has_the_eager_gradients(built, mask):
    fused, gradients = copy.deepcopy(built), []
    accelerate(fused, "training")
    for one in (built, fused):
        states(one.train(), mask).square().mean().backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7
