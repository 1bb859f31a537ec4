import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as StockLlama

from internvl_engine.modeling.masks import AttentionMask
from internvl_engine.modeling.qllama import (
    FixedLlamaRotaryEmbedding,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    _expand_mask,
    _make_causal_mask,
)
from internvl_engine.modeling.vision import InternRMSNorm

from models import QLLAMA, decoder


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("grad" in request.keywords):
        yield


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def test_without_images_it_is_a_stock_llama():
    ours = decoder()
    stock = StockLlama(LlamaConfig(**QLLAMA)).eval()
    state = {k: v for k, v in ours.state_dict().items() if "cross_attn" not in k}
    stock.load_state_dict(state, strict=True)
    ids = torch.randint(3, 61, (2, 9))
    close(ours(input_ids=ids).logits, stock(input_ids=ids).logits)


def queries_and_text(model, batch=2, text=5):
    embeds = torch.randn(batch, 6 + text, 64)
    return embeds, torch.randn(batch, 17, 48)


def run(model, embeds, vision, **kwargs):
    return model(
        inputs_embeds=embeds, vision_hidden_states=vision, use_zero_attention_mask=True, **kwargs
    )


@pytest.mark.parametrize("cut", [1, 3, 6, 8])
def test_a_prefill_in_chunks_is_the_prefill(cut):
    # Also where a chunk ends inside the queries or holds more than Q new positions (quirk K4).
    model = decoder()
    embeds, vision = queries_and_text(model)
    mask = AttentionMask("prefix", 11, 11, 6)
    full = run(model, embeds, vision, use_cache=True)
    # The first chunk's queries do not see the later ones: compare under a causal mask.
    whole = model(inputs_embeds=embeds, vision_hidden_states=vision, use_cache=True)
    first = model(inputs_embeds=embeds[:, :cut], vision_hidden_states=vision, use_cache=True)
    second = model(
        inputs_embeds=embeds[:, cut:], vision_hidden_states=vision,
        past_key_values=first.past_key_values, use_cache=True,
    )  # fmt: skip
    close(torch.cat((first.logits, second.logits), 1), whole.logits)
    close(run(model, embeds, vision, attention_mask=mask).logits, full.logits)
    assert (full.logits - whole.logits).abs().max() > 1e-3  # the masks do differ


def test_the_old_cache_comes_back_as_it_came():
    model = decoder()
    embeds, vision = queries_and_text(model)
    full = run(model, embeds, vision, use_cache=True)
    cache = run(model, embeds[:, :-1], vision, use_cache=True).past_key_values
    for kind in (list, tuple):
        legacy = kind((layer.keys, layer.values) for layer in cache.layers)
        outputs = run(model, embeds[:, -1:], None, past_key_values=legacy, use_cache=True)
        close(outputs.logits, full.logits[:, -1:])
        assert type(outputs.past_key_values) is kind and len(outputs.past_key_values) == 3
        assert outputs.past_key_values[0][0].shape == (2, 4, 11, 16)


def test_images_reach_only_the_queries_and_who_sees_them():
    model = decoder()
    embeds, vision = queries_and_text(model)
    with_image, without = run(model, embeds, vision), run(model, embeds, None)
    assert (with_image.logits[:, :6] - without.logits[:, :6]).abs().max() > 1e-2
    assert (with_image.logits[:, 6:] - without.logits[:, 6:]).abs().max() > 1e-2
    block = AttentionMask("block", 11, 11, 6)
    text = run(model, embeds, vision, attention_mask=block).logits[:, 6:]
    close(text, run(model, embeds, None, attention_mask=block).logits[:, 6:])


def test_repeat_time_tiles_the_images():
    model = decoder().model
    embeds, vision = queries_and_text(model, batch=6)[0], torch.randn(2, 17, 48)
    mask = AttentionMask("full", 11, 11)
    tiled = model.forward_train(
        inputs_embeds=embeds, vision_hidden_states=vision, attention_mask=mask, repeat_time=3
    )
    apart = model.forward_train(
        inputs_embeds=embeds, vision_hidden_states=vision.repeat(3, 1, 1), attention_mask=mask
    )
    close(tiled[0], apart[0])
    with pytest.raises(ValueError, match="2 x 2 images must make the 6 rows"):
        model.forward_train(inputs_embeds=embeds, vision_hidden_states=vision, repeat_time=2)


def test_forward_train_takes_published_masks():
    model = decoder().model
    ids = torch.randint(3, 61, (2, 7))
    padding = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    mask = _make_causal_mask((2, 7), torch.float32) + _expand_mask(padding, torch.float32)
    ours = model(input_ids=ids, attention_mask=padding).last_hidden_state
    close(model.forward_train(input_ids=ids, attention_mask=mask)[0], ours)
    mask = _expand_mask(padding, torch.float32)
    from_padding = model.forward_train(input_ids=ids, attention_mask=padding)[0]
    close(model.forward_train(input_ids=ids, attention_mask=mask)[0], from_padding)


def test_a_row_that_sees_nothing_attends_to_all_alike():
    model = decoder()
    ids = torch.randint(3, 61, (1, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    attention = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions[0]
    close(attention[0, :, 0], torch.full((4, 5), 0.2))
    assert attention[0, :, 3, :2].abs().max() == 0  # and a real row does not see padding


def test_attentions_and_hidden_states():
    model = decoder()
    embeds, vision = queries_and_text(model)
    outputs = run(model, embeds, vision, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 3 and len(outputs.hidden_states) == 4
    for attention in outputs.attentions:
        assert attention.shape == (2, 4, 11, 11)
        close(attention.sum(-1), torch.ones(2, 4, 11))
    assert torch.equal(outputs.hidden_states[0], embeds)
    close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)


def test_loss_predicts_the_next_token():
    model = decoder()
    ids = torch.randint(3, 61, (2, 8))
    labels = ids.clone()
    labels[0, :4] = -100
    outputs = model(input_ids=ids, labels=labels)
    scores = outputs.logits.log_softmax(-1)
    kept = [(b, t) for b in range(2) for t in range(7) if labels[b, t + 1] != -100]
    expected = -sum(scores[b, t, ids[b, t + 1]] for b, t in kept) / len(kept)
    close(outputs.loss, expected)
    with pytest.raises(ValueError, match=r"labels must be \(2, 8\)"):
        model(input_ids=ids, labels=labels[:, :-1])


@pytest.mark.parametrize("kind", [LlamaRotaryEmbedding, FixedLlamaRotaryEmbedding])
def test_rotary_tables_grow(kind):
    rotary = kind(16, max_position_embeddings=4)
    cos, sin = rotary(torch.empty(0), seq_len=9)
    assert cos.shape == sin.shape == (1, 1, 9, 16)
    angles = 5 * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    close(cos[0, 0, 5].double(), torch.cat((angles, angles)).cos())
    close(sin[0, 0, 5].double(), torch.cat((angles, angles)).sin())
    assert rotary(torch.empty(0, dtype=torch.bfloat16), 9)[0].dtype == torch.bfloat16


def test_positions_beyond_the_table():
    model = decoder()
    ids = torch.randint(3, 61, (1, 4))
    near = model(input_ids=ids, position_ids=torch.arange(4)[None]).logits
    far = model(input_ids=ids, position_ids=torch.arange(4)[None] + 90).logits
    torch.testing.assert_close(near, far, rtol=1e-3, atol=1e-3)  # rotary is relative


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_differ_only_in_mixed_precision(dtype):
    x = torch.randn(3, 64).to(dtype)
    vision, llama = InternRMSNorm(64), LlamaRMSNorm(64)
    for norm in (vision, llama):
        norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    assert vision(x).dtype == llama(x).dtype == torch.float32
    rounded = vision.weight * (llama(x) / llama.weight).to(dtype)
    close(vision(x), rounded)
    assert not torch.equal(vision(x), llama(x))
    assert torch.equal(vision.to(dtype)(x), llama.to(dtype)(x))


@pytest.mark.grad
def test_recomputation_gives_the_same_gradients():
    model = decoder().model.train()
    embeds, vision = queries_and_text(model)

    def gradients():
        model.zero_grad()
        model.forward_train(inputs_embeds=embeds, vision_hidden_states=vision)[
            0
        ].square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.gradient_checkpointing
    for ours, theirs in zip(gradients(), plain, strict=True):
        close(ours, theirs)
    model.gradient_checkpointing_disable()
    assert not model.gradient_checkpointing


@pytest.mark.grad
def test_layers_are_recomputed_under_labels_and_cached_in_evaluation():
    model, ids, calls = decoder().train(), torch.randint(3, 61, (2, 7)), []
    layer = model.model.layers[0].input_layernorm
    layer.register_forward_hook(lambda *_: calls.append(1))
    losses = []
    for recompute in (False, True):
        calls.clear()
        if recompute:
            model.gradient_checkpointing_enable()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        losses.append(output.loss)
        assert len(calls) == 1 + recompute
        assert (output.past_key_values is None) == recompute
    close(*losses)
    with torch.no_grad():
        assert model.eval()(input_ids=ids).past_key_values.get_seq_length() == 7


def test_errors_say_what_came():
    model = decoder()
    ids = torch.randint(3, 61, (1, 4))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"\(batch, 4\).*got \(1, 3\)"):
        model(input_ids=ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="keeps no cache"):
        model.model.forward_train(input_ids=ids, use_cache=True)
