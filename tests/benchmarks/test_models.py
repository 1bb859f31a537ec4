"""The encoder and single layers: every form computes the same, and one that does not is found."""

import dataclasses

import torch
from benchmark_cases import measured, tiny_vision
from transformers import LlamaConfig

from internvl_engine import kernels
from internvl_engine.benchmarks import chat, decoder, encoder, layers, quantized, timing
from internvl_engine.configuration import VisionLanguageConfig


@torch.no_grad()
def test_the_encoder_is_timed_in_every_form(device):
    config = tiny_vision()
    some = list(encoder.cases(device, (1, 2), config=config, layers=3, compiles=False))
    assert [case.shape for case in some] == [(1, 3, 28, 28), (2, 3, 28, 28)]
    forms = {"ours (accelerated)", "eager", "transformers, SDPA"}
    forms |= {"ours (CUDA graph)"} if device == "cuda" else set()
    for images, case in enumerate(some, 1):
        assert set(case.providers) == forms and not timing.failures(case)
        assert case.images == images and f"{images} image" in case.label
        layer = 2 * 17 * 64 * (4 * 64 + 2 * 160) + 2 * 2 * 17 * 17 * 64
        assert case.flops == images * (3 * layer + 2 * 16 * 64 * 3 * 7 * 7)
        # per layer: products, their biases but qkv's, and six vectors of norms and scales
        weights = 64 * (4 * 64 + 2 * 160) + (64 + 160 + 64) + 6 * 64
        weights = 3 * weights + 64 * 3 * 49 + 64 + 64 + 17 * 64
        assert case.bytes == 2 * (weights + images * (3 * 28 * 28 + 17 * 64))


@torch.no_grad()
def test_another_encoder_is_found_out():
    """One vector, norm or product changed in one of three layers; weights are not shared then."""
    config = tiny_vision()
    for name in ("layers.1.ls2", "layers.2.attn.q_norm.weight", "layers.0.norm1.weight"):
        towers = encoder.Towers(config, encoder.random_state(config, "cpu"))
        shared = towers.eager.get_parameter(f"encoder.{name}")
        parameter = towers.accelerated.get_parameter(f"encoder.{name}")
        assert parameter.data_ptr() == shared.data_ptr()
        parameter.data = torch.linspace(0, 2, 64).to(parameter.dtype)
        case = towers.case("encoder", "", torch.randn(1, 3, 28, 28).bfloat16(), compiles=False)
        assert set(timing.failures(case)) == {"ours (accelerated)"}, name


@torch.no_grad()
def test_layers_are_timed_beside_their_products(device):
    text = LlamaConfig(
        hidden_size=64, num_attention_heads=2, intermediate_size=96, num_query_token=5,
        vision_hidden_size=48,
    )  # fmt: skip
    vision = layers.vision(device, 2, tiny_vision(), compiles=False)
    qllama = layers.qllama(device, 2, text)
    found = measured(vision, qllama)
    assert not found.failed
    by_name = {row.provider: row for row in found.rows if row.operator == "vision_layer"}
    assert set(by_name) >= {
        layers.PRODUCTS, "ours (accelerated)", "eager", "eager, float32", "transformers, SDPA",
    }  # fmt: skip
    has_packed = kernels.layout_of(torch.zeros(64, 64, dtype=torch.bfloat16, device=device))
    assert ("four products, packed" in by_name) == (has_packed is not None)
    assert by_name[layers.PRODUCTS].speed == 1.0 and by_name[layers.PRODUCTS].share_of_peak is None
    assert all(row.baseline == layers.PRODUCTS for row in by_name.values())
    assert vision.flops == 2 * (2 * 17 * 64 * (4 * 64 + 2 * 160) + 2 * 2 * 17 * 17 * 64)
    own = 2 * 5 * 64 * (4 * 64 + 3 * 96) + 2 * 2 * 5 * 5 * 64
    cross = 2 * 5 * 64 * 2 * 64 + 2 * 257 * 48 * 2 * 64 + 2 * 2 * 5 * 257 * 64
    assert qllama.flops == 2 * (own + cross)


def tiny_decoder():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 50}
    return decoder.qwen2_05b(**sizes)


@torch.no_grad()
def test_decoder_layers_are_timed_with_and_without_a_cache(device):
    some = list(decoder.cases(device, tiny_decoder(), tokens=13, compiles=False))
    assert [case.shape for case in some[:4]] == [(1, 13, 64), (2, 13, 64), (1, 1, 64), (2, 1, 64)]
    forms = {"ours (accelerated)", "eager", decoder.SDPA}
    products = 2 * 64 * (2 * 64 + 2 * 32 + 3 * 96)
    for case in some:
        decodes = "decode" in case.label
        assert set(case.providers) == forms | ({"ours (KVCache)"} if decodes else set())
        assert not timing.failures(case) and not timing.failures(case)  # the caches stay
        rows, queries, _ = case.shape
        pairs = 14 if decodes else 13 * 13
        assert case.flops == rows * (queries * products + 4 * pairs * 64)
    weights = 64 * (2 * 64 + 2 * 32 + 3 * 96) + (64 + 2 * 32) + 2 * 64
    assert some[2].bytes == 4 * (weights + 2 * 64 + 2 * 13 * 32)


@torch.no_grad()
def test_another_decoder_is_found_out():
    layers_ = decoder.Layers(tiny_decoder(), torch.float32, "cpu")
    layers_.models["ours"].layers[0].self_attn.v_proj.bias.add_(1)
    for queries in (13, 1):
        case = layers_.case("padded", 2, queries, 13, True, compiles=False)
        assert set(timing.failures(case)) >= {"ours (accelerated)"}


@torch.no_grad()
def test_a_whole_chat_model_is_timed_beside_transformers(device):
    vision = tiny_vision(
        num_hidden_layers=2, norm_type="layer_norm", qk_normalization=False, qkv_bias=True
    )
    language = decoder.qwen2_05b(
        hidden_size=64, num_attention_heads=4, intermediate_size=96, vocab_size=50,
        num_hidden_layers=2, tie_word_embeddings=False,
    )  # fmt: skip
    config = VisionLanguageConfig(
        vision, language, ps_version="v2", force_image_size=28, img_context_token_id=40
    )
    for dtype in (torch.float32, torch.bfloat16):
        first, behind = chat.cases(device, dtype, config, tiles=2)
        forms = {"ours (accelerated)", "eager", decoder.SDPA}
        assert set(first.providers) == forms and first.shape == (1, 2 * 4 + 20)
        assert set(behind.providers) == forms | {"ours (KVCache)"}
        assert behind.shape == (1, chat.ANSWER) and behind.tokens == chat.ANSWER
        assert behind.bytes < chat.ANSWER * first.bytes  # without the vision tower
        for case in (first, behind, behind):  # the cache is put back
            assert not timing.failures(case)


@torch.no_grad()
def test_quantized_layers_are_timed_beside_wide_ones(device):
    case = quantized.vision(device, 2, tiny_vision(), compiles=False)
    forms = {"ours, bfloat16", "ours, int8", "eager", "transformers, SDPA"}
    assert forms <= set(case.providers) and not timing.failures(case)
    assert case.providers["ours, int8"].error == quantized.ERRORS["int8"]
    text = LlamaConfig(hidden_size=128, num_attention_heads=4, intermediate_size=192)
    for rows, case in zip((1, 3), quantized.decode(device, (1, 3), text), strict=True):
        assert case.tokens == rows and case.shape == (rows, 1, 128)
        assert {"ours, bfloat16", "ours, int8", "ours, int4", "eager"} <= set(case.providers)
        assert not timing.failures(case)
        assert case.flops == 2 * rows * (4 * 128 * 128 + 3 * 128 * 192) + 4 * rows * 128


@torch.no_grad()
def test_a_wrong_quantized_layer_is_found_out():
    case = quantized.vision("cpu", 1, tiny_vision(), compiles=False)
    right = case.providers["ours, int8"].run()
    case.providers["ours, int8"] = dataclasses.replace(
        case.providers["ours, int8"], run=lambda: right * 1.2
    )
    assert set(timing.failures(case)) == {"ours, int8"}
