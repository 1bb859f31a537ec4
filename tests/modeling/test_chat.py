"""What chat models compute beyond the recorded cases: features, placeholders, loss, gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM

from internvl_engine import VisionLanguageModel
from internvl_engine.modeling.pixel_shuffle import pixel_shuffle
from internvl_engine.modeling.vision import interpolate_positions

from chat_goldens import CHAT, load_chat
from chat_models import IMAGE, TOKENS, chat_model, ids, tiles


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("side, factor", [(4, 2), (6, 3), (4, 1)])
def test_pixel_shuffle_by_its_definition(version, side, factor):
    width, blocks = 5, side // factor
    states = torch.randn(2, side * side, width)
    shuffled = pixel_shuffle(states, factor, version)
    assert shuffled.shape == (2, blocks * blocks, factor * factor * width)
    for row in range(side):
        for column in range(side):
            block, i = divmod(row, factor)
            other, j = divmod(column, factor)
            token = block * blocks + other if version == "v2" else other * blocks + block
            start = (factor * i + j) * width
            found = shuffled[:, token, start : start + width]
            equal(found, states[:, row * side + column])


@torch.no_grad()
@pytest.mark.parametrize("layer", [-1, 3, 0, -2, -4])
def test_the_selected_layer(layer):
    model = chat_model(select_layer=layer)
    pixels = tiles(2)
    states = model.vision_model(pixels, output_hidden_states=True, return_dict=True).hidden_states
    assert len(states) == 4
    expected = model.mlp1(pixel_shuffle(states[layer][:, 1:], 2, "v2"))
    equal(model.extract_feature(pixels), expected)


@torch.no_grad()
def test_tiles_of_another_size_have_interpolated_positions():
    model, pixels = chat_model(force_image_size=56), tiles(1, side=56)
    assert model.num_image_token == 16
    features = model.extract_feature(pixels)
    assert features.shape == (1, 16, 48)
    table = model.vision_model.embeddings.position_embedding
    model.vision_model.embeddings.position_embedding.data = interpolate_positions(table, 8, 8)
    equal(model.extract_feature(pixels), features)


@torch.no_grad()
def test_features_fill_the_placeholders_row_after_row():
    model, pixels = chat_model(), tiles(3)
    input_ids, mask = ids([3, "image", 4], [5, 6], ["image", 7, "image"])
    embeds = model.embed(pixels, input_ids)
    where = input_ids == IMAGE
    equal(embeds[where], model.extract_feature(pixels).flatten(0, 1))
    equal(embeds[~where], model.get_input_embeddings()(input_ids[~where]))
    logits = model(pixels, input_ids, mask).logits
    equal(logits, model.language_model(inputs_embeds=embeds, attention_mask=mask).logits)
    assert logits.shape == (3, input_ids.shape[1], 64)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_flags_choose_the_tiles(shape):
    model, pixels = chat_model(), tiles(3)
    input_ids, mask = ids(["image", 3], [4, "image"])
    flags = torch.tensor([1, 0, 1]).reshape(shape)
    chosen = model(pixels, input_ids, mask, image_flags=flags).logits
    close(chosen, model(pixels[::2], input_ids, mask).logits)
    equal(model(pixels[:2], input_ids, mask).logits,
          model(pixels[:2], input_ids, mask, image_flags=torch.ones(2)).logits)  # fmt: skip


def test_a_row_of_text_is_the_bare_language_model_and_gives_zero_gradients():
    model, pixels = chat_model().train(), tiles(1)
    input_ids, _ = ids([3, 4, 5, 6])
    outputs = model(pixels, input_ids, image_flags=torch.tensor([0]), labels=input_ids)
    equal(outputs.logits, model.language_model(input_ids).logits)
    outputs.loss.backward()
    for tower in (model.vision_model, model.mlp1):
        for name, parameter in tower.named_parameters():
            assert parameter.grad is not None and parameter.grad.eq(0).all(), name
    assert model.get_input_embeddings().weight.grad.ne(0).any()


@torch.no_grad()
def test_embeddings_in_place_of_ids():
    model, pixels = chat_model(), tiles(1)
    input_ids, _ = ids([3, "image", 4])
    own = torch.randn(1, input_ids.shape[1], 48)
    mixed = model.embed(pixels, input_ids, inputs_embeds=own)
    where = input_ids == IMAGE
    equal(mixed[~where], own[~where])
    equal(mixed[where], model.extract_feature(pixels)[0])
    embeds = model.embed(pixels, input_ids)
    equal(model(inputs_embeds=embeds).logits, model(pixels, input_ids).logits)


@torch.no_grad()
def test_the_loss_by_its_definition():
    model = chat_model()
    input_ids, _ = ids([3, 4, 5, 6, 7])
    labels = torch.tensor([[-100, -100, 5, 6, 7]])
    outputs = model(input_ids=input_ids, labels=labels)
    terms = F.cross_entropy(outputs.logits[0, 1:4], labels[0, 2:], reduction="none")
    close(outputs.loss, terms.mean())
    weight = torch.tensor([[9.0, 1.0, 0.5, 2.0, 0.25]])  # the first predicts nothing
    weighted = model(input_ids=input_ids, labels=labels, loss_weight=weight).loss
    close(weighted, (terms * weight[0, 2:]).sum() / weight[0, 1:].sum())
    equal(model(input_ids=input_ids, labels=labels, loss_weight=weight.tolist()).loss, weighted)
    nothing = torch.full_like(labels, -100)
    assert model(input_ids=input_ids, labels=nothing).loss.isnan()
    assert model(input_ids=input_ids).loss is None
    as_tuple = model(input_ids=input_ids, labels=labels, return_dict=False)
    equal(as_tuple[0], outputs.loss)


@torch.no_grad()
def test_logits_of_the_last_tokens_only():
    model = chat_model()
    input_ids, _ = ids([3, 4, 5, 6])
    whole = model(input_ids=input_ids).logits
    close(model(input_ids=input_ids, logits_to_keep=2).logits, whole[:, -2:])
    close(model(input_ids=input_ids, logits_to_keep=torch.tensor([0, 2])).logits, whole[:, [0, 2]])


@torch.no_grad()
def test_decoding_goes_on_from_the_cache():
    model, pixels = chat_model(), tiles(2)
    input_ids, _ = ids([3, "image", 4, 5, "image", 6])
    whole = model(pixels, input_ids).logits
    cut = 1 + TOKENS + 1
    first = model(pixels[:1], input_ids[:, :cut], use_cache=True)
    rest = model(pixels[1:], input_ids[:, cut:], past_key_values=first.past_key_values)
    close(torch.cat((first.logits, rest.logits), dim=1), whole)


@torch.no_grad()
def test_weights_in_bfloat16_take_float_tiles_and_give_float_logits():
    model = chat_model().bfloat16()
    input_ids, _ = ids([3, "image", 4])
    logits = model(tiles(1), input_ids).logits
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert model.extract_feature(tiles(1).double()).dtype == torch.bfloat16


@torch.no_grad()
def test_norms_in_float32_inside_a_bfloat16_tower():
    for norms in ({"norm_type": "layer_norm"}, {"norm_type": "rms_norm", "qk_normalization": True}):
        tower = chat_model(vision=norms).vision_model
        pixels = tiles(1)
        exact = tower(pixels)[0]
        tower.bfloat16()
        for name, module in tower.named_modules():
            if name.endswith(("norm", "norm1", "norm2")):
                module.float()
        states = tower(pixels.bfloat16())[0]
        assert states.dtype == torch.bfloat16
        torch.testing.assert_close(states.float(), exact, rtol=0.05, atol=0.2)


def test_both_towers_are_recomputed():
    model = chat_model().train()
    input_ids, _ = ids([3, "image", 4])
    pixels, calls = tiles(1), []
    layers = [model.vision_model.encoder.layers[0], model.language_model.model.layers[0]]
    for layer in layers:
        layer.mlp.register_forward_pre_hook(lambda module, _: calls.append(module))

    def gradients():
        model.zero_grad()
        calls.clear()
        model(pixels, input_ids, labels=input_ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model.gradient_checkpointing_disable()
    plain = gradients()
    assert len(calls) == 2
    model.gradient_checkpointing_enable()
    again = gradients()
    assert [calls.count(layer.mlp) for layer in layers] == [2, 2]
    for name, gradient in plain.items():
        close(again[name], gradient)


def test_the_state_dict_decides_on_the_head():
    tied = chat_model(llm={"model_type": "qwen3", "architectures": None,
                           "tie_word_embeddings": True})  # fmt: skip
    language = tied.language_model
    state = {name: tensor.clone() for name, tensor in tied.state_dict().items()}
    del state["language_model.lm_head.weight"]
    tied.load_state_dict(state)
    assert language.lm_head.weight is language.model.embed_tokens.weight

    state["language_model.lm_head.weight"] = torch.randn(64, 48)
    tied.load_state_dict(state)
    equal(language.lm_head.weight.data, state["language_model.lm_head.weight"])
    equal(
        language.model.embed_tokens.weight.data, state["language_model.model.embed_tokens.weight"]
    )
    assert not tied.config.tie_word_embeddings


def test_names_and_structure():
    model = chat_model()
    names = model.state_dict().keys()
    roots = {name.split(".")[0] for name in names}
    assert roots == {"vision_model", "language_model", "mlp1"}
    assert {n for n in names if n.startswith("mlp1")} == {
        f"mlp1.{layer}.{end}" for layer in (0, 1, 3) for end in ("weight", "bias")
    }
    assert model.mlp_projector is model.mlp1 and model.num_image_token == TOKENS
    assert {"InternVisionEncoderLayer", "LlamaDecoderLayer"} <= set(model._no_split_modules)
    assert model.get_input_embeddings() is model.language_model.model.embed_tokens
    model.resize_token_embeddings(70)
    assert model.config.llm_config.vocab_size == 70
    assert model.get_output_embeddings().weight.shape == (70, 48)
    linear = model.mlp1[3].weight  # PyTorch's own initialisation: uniform within 1 / sqrt(width)
    assert linear.abs().max() <= 48**-0.5 and linear.std() > 0.4 * 48**-0.5


def test_copies_are_models_of_their_own():
    model = chat_model()
    input_ids, _ = ids([3, "image", 4])
    pixels = tiles(1)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.language_model.config is copied.config.llm_config
        copied.load_state_dict(model.state_dict())
        with torch.no_grad():
            equal(copied(pixels, input_ids).logits, model(pixels, input_ids).logits)


@pytest.mark.parametrize("case", ["internlm2_300m_dynamic", "qwen3_300m_tied"])
def test_an_offloaded_model_answers_the_same(case, tmp_path):
    golden = load_chat(case)
    offloaded = VisionLanguageModel.from_pretrained(
        golden.path, dtype=torch.float32, device_map={"": "disk"}, offload_folder=tmp_path
    )
    offloaded.img_context_token_id = golden.about["img_context_token_id"]
    prompts = golden.prompts("batch")
    expected = golden.model().generate(**prompts, max_new_tokens=4)
    equal(offloaded.generate(**prompts, max_new_tokens=4), expected)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_auto_classes_serve_a_published_folder(auto):
    folder = CHAT / "qwen3_300m_tied"  # its auto_map names remote code
    assert type(auto.from_pretrained(folder, dtype=torch.float32)) is VisionLanguageModel


def test_any_language_model():
    for model_type in ("gpt_neox", "phi", "gemma"):
        llm = {"model_type": model_type, "architectures": None, "head_dim": 12}
        model = chat_model(llm=llm)
        input_ids, mask = ids([3, "image", 4])
        with torch.no_grad():
            logits = model(tiles(1), input_ids, mask).logits
        assert logits.shape == (1, 6, 64) and logits.isfinite().all()
        assert model.generate(tiles(1), input_ids, max_new_tokens=3).shape == (1, 3)
