import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_C, InternVL_G, InternVLModel

from golden_vectors import GOLDEN
from models import QLLAMA, VISION, config, model, pixels

pytestmark = pytest.mark.filterwarnings("error:encode_text")


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


def test_the_14b_has_the_published_names_and_shapes():
    with torch.device("meta"):
        built = InternVL_G(InternVLConfig())
    ours = {name: list(tensor.shape) for name, tensor in built.state_dict().items()}
    published = json.loads((GOLDEN / "checkpoint_14b.json").read_text())
    names = published.get("tensors", published)
    assert ours == {name: list(shape) for name, shape in names.items()}
    assert len(ours) == 1048
    assert sum(p.numel() for p in built.parameters()) == 13_834_975_747
    assert sum(p.numel() for p in built.vision_model.parameters()) == 5_902_793_600


def test_the_364px_table_is_resized_at_construction():
    with torch.device("meta"):
        built = InternVLModel(InternVLConfig.from_preset("14b-ft-364px"))
    assert built.vision_model.embeddings.position_embedding.shape == (1, 677, 3200)


@torch.no_grad()
def test_the_two_forms_agree_and_an_unknown_mode_is_refused():
    base, x = model(), pixels()
    ids = torch.tensor([[1, 5, 9, 2], [1, 7, 2, 0]])
    by_mode = InternVLModel(base.config).eval()
    by_class = InternVL_C(base.config).eval()
    for other in (by_mode, by_class):
        other.load_state_dict(base.state_dict())
    assert torch.equal(by_class.encode_image(x), by_mode.encode_image(x, mode="InternVL-C"))
    assert torch.equal(base.encode_image(x), by_mode.encode_image(x, mode="InternVL-G"))
    published = by_mode(image=x, text=ids, mode="InternVL-G")
    assert torch.equal(base(x, ids)[0], published[0])
    with pytest.raises(NotImplementedError, match="InternVL-X"):
        by_mode.encode_image(x, mode="InternVL-X")


@torch.no_grad()
def test_outputs_as_tuples_and_as_dictionaries():
    built, x = model(), pixels()
    vision, queries = built.get_image_features(x)
    features = built.get_image_features(x, output_hidden_states=True, return_dict=True)
    assert torch.equal(features.backbone_embeds, vision)
    assert torch.equal(features.query_embeds, queries)
    assert len(features.vision_outputs.hidden_states) == 3
    ids = torch.tensor([[1, 5, 2]])
    output = built(x, ids, return_dict=True)
    close(output.image_embeds.norm(dim=1), torch.ones(2))
    scale = built.logit_scale.exp()
    close(output.logits_per_image, scale * output.image_embeds @ output.text_embeds.t())
    assert torch.equal(output.logits_per_text, output.logits_per_image.t())
    states = built.get_text_features(ids, torch.ones_like(ids), return_dict=True)
    assert torch.equal(states[0], built.get_text_features(ids, torch.ones_like(ids)))
    assert len(built.get_text_features(
        ids, torch.ones_like(ids), output_hidden_states=True, return_dict=True
    ).hidden_states) == 4  # fmt: skip


@torch.no_grad()
def test_a_mask_saves_texts_that_are_padded_left_or_hold_an_unknown_piece():
    built = model()
    ids = torch.tensor([[1, 5, 0, 9, 2]])  # id 0 is <unk> inside, padding outside
    expected = built.encode_text(ids, torch.ones_like(ids))
    right = torch.tensor([[1, 5, 0, 9, 2, 0, 0]])
    close(built.encode_text(right, torch.tensor([[1] * 5 + [0] * 2])), expected)
    left = torch.tensor([[0, 0, 1, 5, 0, 9, 2]])
    # Rotary positions are relative: the same text two places on.
    close(built.encode_text(left, torch.tensor([[0] * 2 + [1] * 5])), expected)
    for wrong in (ids, left):
        with pytest.raises(UserWarning, match="encode_text"):
            built.encode_text(wrong)


@torch.no_grad()
@settings(max_examples=15)
@given(
    heads=st.sampled_from([1, 2, 4]),
    queries=st.integers(1, 9),
    frequency=st.integers(1, 4),
    layers=st.integers(1, 4),
    batch=st.integers(1, 3),
    patch=st.sampled_from([4, 7, 14]),
)
def test_any_configuration_serves_a_batch_as_it_serves_one(
    heads, queries, frequency, layers, batch, patch
):
    torch.manual_seed(0)
    built = model(
        vision_config=VISION
        | {"patch_size": patch, "hidden_size": 32, "num_attention_heads": heads},
        qllama_config=QLLAMA | {"num_hidden_layers": layers},
        num_query_token=queries,
        cross_attention_frequency=frequency,
    )
    crossed = {
        int(n.split(".")[3]) for n in built.state_dict() if "cross_attn" in n and "qllama" in n
    }
    assert crossed == set(range(0, layers, frequency))
    x = pixels(batch)
    together = built.encode_image(x)
    apart = torch.cat([built.encode_image(one[None]) for one in x])
    close(together, apart)
    if batch > 1:  # the image reaches the queries, however few there are
        assert (together[0] - together[1]).abs().max() > 1e-4


def test_new_models_are_initialised_as_published():
    built = InternVLModel(config())
    assert built.query_tokens.abs().max() == 0
    assert built.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    assert built.text_projection.isfinite().all() and built.text_projection.std() > 0.01
    assert built.qllama.model.embed_tokens.weight[0].abs().max() == 0
    head, embedding = built.qllama.lm_head.weight, built.qllama.model.embed_tokens.weight
    assert head.data_ptr() != embedding.data_ptr()  # never tied (quirk K1)


def test_lora_freezes_the_tower_and_leaves_the_rest():
    pytest.importorskip("peft")
    built = model()
    built.wrap_backbone_lora(r=2)
    built.wrap_qllama_lora(r=3, lora_alpha=None)
    trained = [name for name, p in built.named_parameters() if p.requires_grad]
    adapted = [name for name in trained if name.startswith(("vision_model", "qllama"))]
    assert adapted and all("lora_" in name for name in adapted)
    assert not any("cross_attn" in name or "lm_head" in name for name in adapted)
    assert len([name for name in adapted if "vision" in name]) == 2 * 4 * 2
    assert len([name for name in adapted if "qllama" in name]) == 3 * 7 * 2
    assert {"query_tokens", "clip_projector.cross_attn.proj.weight"} <= set(trained)
    assert (built.config.backbone_lora_alpha, built.config.qllama_lora_alpha) == (256, 6)
    again = InternVL_G(built.config)
    assert again.state_dict().keys() == built.state_dict().keys()
