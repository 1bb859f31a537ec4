"""The query bridge: what QLLaMA's queries read, in front of another language model."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, LlamaConfig, Qwen2Config, Qwen2ForCausalLM

from internvl_engine import (
    InternVL_C,
    InternVL_G,
    InternVLModel,
    InternVLProcessor,
    LlavaTower,
    QueryBridge,
    accelerate,
    freeze,
)
from internvl_engine.assets import DIGITS, held_out, nano_directory
from internvl_engine.modeling.bridge import QueryBridgeConfig
from internvl_engine.modeling.image_prompt import image_prompt

from golden_vectors import assert_golden, load_golden
from models import QLLAMA, model, pixels

EXAMPLES = Path(__file__).parents[2] / "examples"


def bridge(**changes):
    fields = {"vision_hidden_size": 48, "num_query_token": 6, "output_hidden_size": 32}
    qllama = LlamaConfig(**QLLAMA)
    return QueryBridge(QueryBridgeConfig(qllama, **(fields | changes))).eval()


def language_model(width=32):
    config = Qwen2Config(
        vocab_size=40, hidden_size=width, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, num_hidden_layers=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    built = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return built


@torch.no_grad()
def test_a_bridge_of_a_model_reads_what_the_model_reads():
    whole = model()
    features, queries = whole.get_image_features(pixels())
    built = QueryBridge.from_internvl(whole, 32, pool=True)
    output = built(features, return_dict=True)
    assert torch.equal(output.query_states, queries)
    assert torch.equal(output.last_hidden_state, built.projector(queries))
    assert torch.equal(output.pooled, whole.clip_projector2(queries))
    assert torch.equal(built(features), output.last_hidden_state)
    plain = QueryBridge.from_internvl(whole)
    assert torch.equal(plain(features), queries)
    assert plain(features, return_dict=True).pooled is None


def test_weights_are_shared_unless_copied():
    whole = model()
    shared, copied = (QueryBridge.from_internvl(whole, copy_weights=c) for c in (False, True))
    theirs = dict(whole.named_parameters())
    ours = dict(shared.named_parameters())
    assert ours and all(parameter is theirs[name] for name, parameter in ours.items())
    assert not {"qllama.model.embed_tokens.weight", "qllama.lm_head.weight"} & ours.keys()
    for name, parameter in copied.named_parameters():
        assert parameter is not theirs[name]
        assert torch.equal(parameter, theirs[name])


@torch.no_grad()
def test_a_bridge_of_a_checkpoint_is_that_of_the_model():
    whole = InternVL_G.from_pretrained(nano_directory(), dtype="float32")
    features, _ = whole.get_image_features(pixels())
    expected = QueryBridge.from_internvl(whole, pool=True)
    built = QueryBridge.from_internvl(nano_directory(), pool=True, dtype="float32")
    ours, theirs = built(features, return_dict=True), expected(features, return_dict=True)
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert torch.equal(ours.pooled, theirs.pooled)
    assert QueryBridge.from_internvl(nano_directory(), 8, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_number_of_outputs_is_fixed(tokens):
    assert bridge()(torch.randn(3, tokens, 48)).shape == (3, 6, 32)


def test_every_weight_of_a_new_bridge_and_the_features_get_gradients():
    built, features = bridge(pool_dim=24, pool_heads=4, projector="mlp"), torch.randn(2, 17, 48)
    output = built(features.requires_grad_(), return_dict=True)
    (output.last_hidden_state.square().mean() + output.pooled.square().mean()).backward()
    without = {n for n, p in built.named_parameters() if p.grad is None or not p.grad.any()}
    # A bias of the keys moves every score of a query alike.
    assert without <= {"pooler.cross_attn.k_bias"}
    assert features.grad.any()


def test_new_queries_differ_from_each_other():
    built = bridge()
    states = built(torch.randn(1, 17, 48), return_dict=True).query_states[0]
    assert torch.pdist(states).min() > 1e-3


def test_saved_and_loaded_again(tmp_path):
    built, features = bridge(pool_dim=24, pool_heads=4, projector="mlp"), torch.randn(2, 17, 48)
    built.save_pretrained(tmp_path)
    for loaded in (
        QueryBridge.from_pretrained(tmp_path, dtype="float32"),
        AutoModel.from_pretrained(tmp_path, dtype="float32"),
    ):
        assert type(loaded) is QueryBridge
        assert torch.equal(loaded(features), built(features))
    with pytest.raises(ValueError, match="a query bridge.*QueryBridge takes it"):
        InternVLModel.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_accelerated(mode):
    built, features = bridge(pool_dim=24, pool_heads=4), torch.randn(2, 17, 48)
    expected = built(features, return_dict=True)
    report = accelerate(built, mode)
    assert {"FusedDecoder", "FusedDecoderLayer", "FusedAttentionPooling"} <= {
        entry.fused for entry in report.entries
    }
    output = built(features, return_dict=True)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(output.pooled, expected.pooled)


@torch.no_grad()
def test_a_bridge_of_an_accelerated_model():
    whole = model()
    features, queries = whole.get_image_features(pixels())
    accelerate(whole)
    shared = QueryBridge.from_internvl(whole)
    torch.testing.assert_close(shared(features), queries)
    copied = QueryBridge.from_internvl(whole, copy_weights=True)
    torch.testing.assert_close(copied(features), queries)


@torch.no_grad()
def test_parts_in_other_dtypes():
    built = bridge().bfloat16()
    built.projector.float()
    assert built(torch.randn(1, 17, 48)).dtype == torch.float32
    half = language_model().bfloat16()
    inputs = image_prompt(half, built(torch.randn(1, 17, 48)), torch.tensor([[1, 2, 3]]))
    assert half(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_a_prompt_puts_the_image_in_front_or_in_place_of_its_token():
    llm, image = language_model(), torch.randn(2, 6, 32)
    words = llm.get_input_embeddings()
    ids = torch.tensor([[0, 5, 9, 7], [6, 7, 9, 8]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    front = image_prompt(llm, image, ids, mask, labels=ids)
    assert torch.equal(front["inputs_embeds"], torch.cat((image, words(ids)), 1))
    assert front["attention_mask"].tolist()[0] == [1] * 6 + [0, 1, 1, 1]
    assert front["labels"].tolist()[1] == [-100] * 6 + [6, 7, 9, 8]
    within = image_prompt(llm, image, ids, mask, image_token_id=9)
    row = torch.cat((words(ids[1, :2]), image[1], words(ids[1, 3:])))
    assert torch.equal(within["inputs_embeds"][1], row)
    assert within["attention_mask"].tolist()[0] == [0] + [1] * 8
    both = llm.generate(**within, max_new_tokens=5, do_sample=False)
    assert both.shape == (2, 5)
    for i in range(2):  # left padding changes nothing
        single = image_prompt(llm, image[i : i + 1], ids[i : i + 1, 1 - i :], image_token_id=9)
        alone = llm.generate(**single, max_new_tokens=5, do_sample=False)
        assert torch.equal(alone[0], both[i])
    with pytest.raises(ValueError, match="every row needs one image token, the rows have 0, 1"):
        image_prompt(llm, image, ids, image_token_id=6)
    with pytest.raises(ValueError, match="2 images for 3 prompts"):
        image_prompt(llm, image, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="48 wide, the embeddings of Qwen2ForCausalLM 32"):
        image_prompt(llm, torch.randn(2, 6, 48), ids)


def test_a_bridge_learns_to_tell_images_to_a_frozen_language_model():
    """The embedded model's tower in front of a language model that never changes."""
    images, pairs = held_out()
    processor = InternVLProcessor.from_pretrained(nano_directory())
    whole = InternVL_G.from_pretrained(nano_directory(), dtype="float32")
    features, _ = whole.get_image_features(processor(images[:40])["pixel_values"])
    llm = language_model().requires_grad_(False)
    built = QueryBridge.from_internvl(whole, 32, copy_weights=True)
    freeze(built, queries=True, cross_attention=True)
    frozen = {n: p.clone() for n, p in built.named_parameters() if not p.requires_grad}
    digits = torch.tensor([DIGITS.index(digit) for _, digit in pairs[:40]])
    ids = torch.stack((torch.full_like(digits, 3), 10 + digits), 1)
    labels = ids.masked_fill(ids == 3, -100)
    optimizer = torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = llm(**image_prompt(llm, built(features.detach()), ids, labels=labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    now = dict(built.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())
    assert frozen


def golden_tower(golden, **options):
    whole = InternVLModel(InternVLModel.config_class(**golden.config)).eval()
    whole.load_state_dict(golden.state, strict=False)
    return LlavaTower.from_internvl(whole, 20, **options)


@pytest.mark.golden
@pytest.mark.parametrize("select_layer", [-1, -2, 0])
@torch.no_grad()
def test_a_llava_tower_has_the_published_features(select_layer):
    golden = load_golden("llava_forward")
    tower = golden_tower(golden, select_layer=select_layer)
    patches, queries = tower.features(golden.inputs["pixel_values"])
    assert_golden(patches, golden.listed("hidden_states")[select_layer][:, 1:].contiguous())
    assert_golden(queries, golden.outputs["query_features"])
    tokens = tower(golden.inputs["pixel_values"])
    assert tokens.shape == (2, 6 + 36, 20)
    torch.testing.assert_close(tokens[:, :6], tower.projector.mlp2(queries))
    torch.testing.assert_close(tokens[:, 6:], tower.projector.mlp1(patches))
    report = accelerate(tower)
    assert len(report.replaced) == 11
    torch.testing.assert_close(tower(golden.inputs["pixel_values"]), tokens, rtol=1e-4, atol=1e-5)


def test_gradients_reach_both_projectors_and_whatever_trains():
    tower = golden_tower(load_golden("llava_forward"))
    report = freeze(tower)
    assert report["projector"].trainable == sum(p.numel() for p in tower.projector.parameters())
    freeze(tower, queries=False)
    tower(pixels(side=42)).square().mean().backward()
    grads = {n for n, p in tower.named_parameters() if p.grad is not None}
    assert grads == {f"projector.{n}" for n, _ in tower.projector.named_parameters()}
    freeze(tower, vision=False, cross_attention=True)
    tower(pixels(side=42)).square().mean().backward()
    grads = {n.split(".")[0] for n, p in tower.named_parameters() if p.grad is not None}
    assert grads == {"vision_model", "qllama", "query_tokens", "projector"}


@pytest.mark.parametrize("prefix", ["", "model.mm_projector.", "mm_projector."])
def test_a_trained_two_mlp_projector_is_loaded(prefix, tmp_path):
    golden = load_golden("llava_forward")
    expected = golden_tower(golden)
    state = {prefix + n: t for n, t in expected.projector.state_dict().items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    tower = golden_tower(golden, projector=tmp_path / "mm_projector.bin")
    images = pixels(side=42)
    with torch.no_grad():
        assert torch.equal(tower(images), expected(images))
    torch.save({"mlp1.0.weight": torch.zeros(2, 2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match="no projector: needed mlp1.0.weight, mlp1.0.bias"):
        golden_tower(golden, projector=tmp_path / "other.bin")
    state[f"{prefix}mlp2.0.weight"] = torch.zeros(20, 7)
    torch.save(state, tmp_path / "narrow.bin")
    with pytest.raises(ValueError, match=r"mlp2.0.weight must have shape \(20, 64\).*\(20, 7\)"):
        golden_tower(golden, projector=tmp_path / "narrow.bin")


@pytest.mark.parametrize("patches", [False, True], ids=["queries", "patches"])
def test_the_example_learns_and_answers(patches, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    import query_bridge

    images, pairs = held_out()
    monkeypatch.setattr(query_bridge, "held_out", lambda: (images[:12], pairs[:12]))
    monkeypatch.setattr("sys.argv", ["query_bridge.py", "--steps", "5", *["--patches"] * patches])
    query_bridge.main()
    lines = capsys.readouterr().out.splitlines()
    assert "parameters train" in lines[0]
    losses = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert len([line for line in lines if line.endswith("of the held-out pictures are right")]) == 3


def test_what_is_no_internvl_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="needed an InternVLModel or its checkpoint, got Linear"):
        QueryBridge.from_internvl(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="device: only for a checkpoint"):
        QueryBridge.from_internvl(model(), device="cpu")
    with pytest.raises(ValueError, match=r"vision_hidden_states must be \(batch, tokens, 48\)"):
        bridge()(torch.randn(2, 17, 40))
    with pytest.raises(ValueError, match="one of the 3 hidden states, got 3"):
        LlavaTower.from_internvl(model(), 32, select_layer=3)
    with pytest.raises(ValueError, match="linear or mlp, got 'conv'"):
        bridge(projector="conv")
    partial = InternVL_C.from_pretrained(nano_directory(), parts="image")
    with pytest.raises(RuntimeError, match="parts='image'"):
        QueryBridge.from_internvl(partial)
    built = copy.deepcopy(bridge())
    built.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a query bridge"):
        QueryBridge.from_internvl(tmp_path)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_all_its_weights_have_one_dtype(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        built = bridge()
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in built.parameters()} == {default}
