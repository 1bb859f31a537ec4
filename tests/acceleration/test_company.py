"""Accelerated models in company: autocast, recorders, checkpointing, FSDP and backward hooks."""

import copy

import pytest
import torch
from foreign_towers import vision_tower
from published_model import modeling_internvl
from torch.utils.checkpoint import checkpoint

from internvl_engine import accelerate, kernels
from internvl_engine.generation import KVCache

from models import decoder, model, pixels

IDS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 2, 0, 0]])
PROMPT = torch.tensor([[1, 9, 17, 5]])


def features(built, x):
    return built.encode_image(x), built.get_image_features(x)[1], built.encode_text(IDS)


def gradients(built):
    return {
        name.replace("_checkpoint_wrapped_module.", ""): p.grad.double()
        for name, p in built.named_parameters()
        if p.grad is not None
    }


def distance(found, expected):
    squares = [(found[key].double() - expected[key]).square().sum() for key in expected]
    return torch.stack(squares).sum().sqrt()


def assert_same_gradients(fused, eager):
    found, expected = gradients(fused), gradients(eager)
    assert found.keys() == expected.keys() and expected
    scale = torch.stack([grad.square().sum() for grad in expected.values()]).sum().sqrt()
    assert distance(found, expected) <= 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["inference", "training"])
@torch.no_grad()
def test_autocast_rounds_as_eager(mode, dtype):
    eager, x = model(), pixels(2)
    fused = copy.deepcopy(eager)
    accelerate(fused, mode)
    truth = features(copy.deepcopy(eager).double(), x.double())
    with torch.autocast("cpu", dtype):
        expected, found = features(eager, x), features(fused, x)
    for ours, theirs, right in zip(found, expected, truth, strict=True):
        assert ours.dtype == theirs.dtype
        # Of a few dozen numbers the error is a draw: a quarter more than eager's is the usual bound
        # of this suite for tensors of thousands, half more is one for these.
        assert (ours - right).norm() <= 1.5 * (theirs - right).norm()
    plain = zip(features(fused, x), features(eager, x), strict=True)
    for ours, theirs in plain:  # nothing that was rounded is kept
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_autocast_generates_as_eager(beams):
    # Images whose captions hang on no near tie: packed weights are not rounded to bfloat16 first.
    eager, x = model(), pixels(4)[2:]
    fused = copy.deepcopy(eager)
    accelerate(fused)
    arguments = {"max_new_tokens": 6, "num_beams": beams, "eos_token_id": None}
    with torch.autocast("cpu", torch.bfloat16):
        expected = eager.generate(x, PROMPT, **arguments)
        for cache in (None, KVCache(eager.config.qllama_config, 5)):
            found = fused.generate(x, PROMPT, **arguments, past_key_values=cache)
            assert torch.equal(found, expected)


def test_autocast_trains_as_eager():
    eager, x = model(), pixels(2)
    fused, truth = copy.deepcopy(eager), copy.deepcopy(eager).double()
    accelerate(fused, "training")
    for one in (truth, eager, fused):
        with torch.autocast("cpu", torch.bfloat16, enabled=one is not truth):
            features_ = one.train().encode_image(x.to(one.dtype)), one.encode_text(IDS)
        sum(each.square().sum() for each in features_).backward()
    right, theirs, ours = (gradients(one) for one in (truth, eager, fused))
    assert ours.keys() == theirs.keys() == right.keys()
    assert distance(ours, right) <= 1.25 * distance(theirs, right)


@pytest.fixture
def fused_calls(monkeypatch):
    """Counts the vision attentions that are computed fused."""
    calls, attention = [], kernels.qk_norm_attention
    monkeypatch.setattr(
        kernels, "qk_norm_attention", lambda *args: calls.append(1) or attention(*args)
    )
    return calls


@pytest.mark.parametrize("first", ["eager", "fused"])
@torch.no_grad()
def test_recorders_are_served_and_forgotten(first, fused_calls):
    built, x = vision_tower(), torch.randn(2, 3, 28, 28)
    built.config.output_hidden_states = True
    expected = copy.deepcopy(built)(x).hidden_states
    if first == "eager":  # transformers 5 installs its recorders for good
        built(x)
    accelerate(built)
    fused_calls.clear()
    found = built(x).hidden_states
    assert len(found) == len(expected) == 3 + 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert len(fused_calls) == 3  # states of layers need no attention of the eager module
    built.config.output_hidden_states = False
    built(x)
    assert len(fused_calls) == 6


@torch.no_grad()
def test_the_tower_of_a_composite_stays_fused(fused_calls):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = vision_tower().config.to_dict()
    llm = {
        "model_type": "qwen2", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    built = InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=llm, image_token_id=60)
    ).eval()
    ids = torch.cat((torch.full((1, 4), 60), torch.randint(3, 60, (1, 3))), 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}
    expected = copy.deepcopy(built)(**inputs).logits
    accelerate(built)
    fused_calls.clear()
    for count in (3, 6):
        torch.testing.assert_close(built(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert len(fused_calls) == count


def per_layer(reentrant):
    def run(built, x):
        hidden = built.vision_model.embeddings(x)
        for layer in built.vision_model.encoder.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=reentrant)
        return hidden

    return run


def wrapped(built, x):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = built.vision_model.encoder.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    return built.vision_model(x).last_hidden_state


RECOMPUTED = {"reentrant": per_layer(True), "not reentrant": per_layer(False), "wrapped": wrapped}


@pytest.mark.parametrize("how", RECOMPUTED)
def test_checkpointing_of_ones_own_trains_alike(how):
    eager, x = model(), pixels(2)
    fused = copy.deepcopy(eager)
    accelerate(fused, "training")
    for one in (eager, fused):
        one.train().gradient_checkpointing_disable()
        RECOMPUTED[how](one, x).square().sum().backward()
    assert_same_gradients(fused, eager)


def test_an_encoder_that_recomputes_its_layers_itself_trains_alike():
    eager, x = modeling_internvl.InternVLModel(decoder().config).train(), torch.randn(2, 17, 48)
    fused = copy.deepcopy(eager)
    accelerate(fused, "training")
    for one in (eager, fused):
        one.vision_model(pixel_embeds=x).last_hidden_state.square().sum().backward()
    assert_same_gradients(fused, eager)


def test_transformers_layers_are_recomputed_where_it_says_so(monkeypatch):
    built, x, calls = vision_tower().train(), torch.randn(2, 3, 28, 28), []
    report = accelerate(built, "training")
    built.gradient_checkpointing_enable({"use_reentrant": False})
    attention = kernels.qk_norm_attention
    monkeypatch.setattr(
        kernels, "qk_norm_attention", lambda *args: calls.append(1) or attention(*args)
    )
    built(x).last_hidden_state.sum().backward()
    assert len(calls) == 2 * 3
    report.undo()
    assert all(layer.gradient_checkpointing for layer in built.encoder.layer)
    built(x).last_hidden_state.sum().backward()


def test_backward_hooks_are_called_inside_and_after_undo():
    built, x, calls = model(), pixels(2), []
    report = accelerate(built, "training")
    layer = built.vision_model.encoder.layers[0]
    layer.register_full_backward_hook(lambda *_: calls.append("layer"))
    layer.mlp.register_full_backward_pre_hook(lambda *_: calls.append("mlp"))
    for _ in range(2):
        calls.clear()
        built.encode_image(x).sum().backward()
        assert sorted(calls) == ["layer", "mlp"]
        report.undo()


def test_fully_sharded_layers_stay_fused(fused_calls, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        eager, x = model(), pixels(2)
        fused, mesh = copy.deepcopy(eager), init_device_mesh("cpu", (1,))
        accelerate(fused, "training")
        for layer in fused.vision_model.encoder.layers:
            fully_shard(layer, mesh=mesh)
        expected = eager.train().vision_model(x).last_hidden_state
        found = fully_shard(fused.vision_model, mesh=mesh).train()(x).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        assert len(fused_calls) == 2
        found.sum().backward()
        grad = fused.vision_model.encoder.layers[0].mlp.fc1.weight.grad
        assert grad.full_tensor().norm() > 0
    finally:
        dist.destroy_process_group()
