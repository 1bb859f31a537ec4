"""Schemes as data: which form the names of every family get."""

import pytest

from internvl_engine.schemes import SCHEMES, Rule, Scheme, scheme_of

SHAPE = (4096, 4096)
FORMS = {  # name: in int8, int4 and fp8
    "vision_model.encoder.layers.0.attn.qkv.weight": ("int8", "int8", "fp8"),
    "vision_model.encoder.layers.47.mlp.fc2.weight": ("int8", "int8", "fp8"),
    "qllama.model.layers.0.self_attn.q_proj.weight": ("int8", "int4", "fp8"),
    "qllama.model.layers.4.cross_attn.v_proj.weight": ("int8", "int4", "fp8"),
    "qllama.model.layers.31.mlp.down_proj.weight": ("int8", "int4", "fp8"),
    "qllama.model.embed_tokens.weight": ("int8", "int8", "int8"),
    "qllama.lm_head.weight": ("int8", "int8", "int8"),
    "language_model.output.weight": ("int8", "int8", "int8"),  # InternLM2's head
    "language_model.model.layers.3.mlp.gate_up_proj.weight": ("int8", "int4", "fp8"),
    "language_model.model.layers.3.self_attn.qkv_proj.weight": ("int8", "int4", "fp8"),
    "language_model.model.layers.3.attention.wqkv.weight": ("int8", "int4", "fp8"),
    "language_model.model.layers.3.feed_forward.w2.weight": ("int8", "int4", "fp8"),
    "model.vision_tower.encoder.layer.0.attention.q_proj.weight": ("int8", "int8", "fp8"),
    "vision_model.encoder.layers.1.self_attn.q_proj.weight": ("int8", "int8", "fp8"),
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": ("int8", "int4", "fp8"),
    "mlp1.1.weight": ("int8", "int8", "fp8"),
    "text_projection": ("wide",) * 3,  # a matrix, and not the weight of a Linear
    "vision_model.embeddings.position_embedding.weight": ("wide",) * 3,
    "clip_projector.cross_attn.k.weight": ("wide",) * 3,
    "clip_projector2.cross_attn.proj.weight": ("wide",) * 3,
    "qllama.base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight": ("wide",) * 3,
}


@pytest.mark.parametrize("name", FORMS)
def test_a_name_decides_the_form(name):
    found = tuple(SCHEMES[scheme].rule_for(name, SHAPE).form for scheme in ("int8", "int4", "fp8"))
    assert found == FORMS[name]


@pytest.mark.parametrize(
    "shape", [(4096,), (1, 96, 4096), (3200, 3, 14, 14), (2, 4096), (4096, 8), (0, 64)], ids=str
)
def test_other_shapes_stay_wide(shape):
    for scheme in SCHEMES.values():
        assert scheme.rule_for("qllama.model.layers.0.mlp.up_proj.weight", shape).form == "wide"


def test_the_first_rule_that_is_found_decides():
    scheme = Scheme("mine", (Rule("head", "wide"), Rule(r"layers\.0\.", "int4", group=128)))
    assert scheme.rule_for("layers.0.head.weight", SHAPE).form == "wide"
    assert scheme.rule_for("layers.0.fc1.weight", SHAPE).options == {"group": 128}
    assert scheme.rule_for("layers.1.fc1.weight", SHAPE).form == "wide"


def test_a_configuration_holds_a_scheme():
    own = Scheme("mine", (Rule("fc1", "int4", group=128), Rule("", "int8")), min_size=64)
    for scheme in (*SCHEMES.values(), own):
        assert Scheme.from_dict({"quant_method": "x", **scheme.to_dict()}) == scheme
    assert SCHEMES["int4"].to_dict() == {"scheme": "int4"}


def test_what_is_no_scheme_is_refused():
    assert scheme_of("int8") is SCHEMES["int8"] and scheme_of(SCHEMES["fp8"]) is SCHEMES["fp8"]
    with pytest.raises(ValueError, match="int8, int4, fp8 or a Scheme, got 'int3'"):
        scheme_of("int3")
    with pytest.raises(ValueError, match="form must be one of int8, int4, fp8, wide, got 'int2'"):
        Rule("", "int2")
