"""Position tables of other sizes, and layers with cross-attention: the weights decide."""

import json

import pytest
import torch
from published_layout import write_published

from internvl_engine.checkpoint import CheckpointError
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVisionModel, InternVL_G
from internvl_engine.modeling.qllama import LlamaForCausalLM
from internvl_engine.modeling.vision import interpolate_positions

from golden_vectors import assert_golden, load_golden

FP32 = {"dtype": torch.float32}
TABLE = "vision_model.embeddings.position_embedding"


@pytest.fixture(scope="module")
def large():
    """image_size 28 in the file, force_image_size 42, a table for 42, as FT-364px is published."""
    return load_golden("encode_image_G_force_size")


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.golden
@pytest.mark.filterwarnings("error:.*position table")
def test_a_forced_size_as_published(tmp_path, large):
    model = InternVL_G.from_pretrained(write_published(tmp_path / "a", large), **FP32)
    assert model.config.image_size == model.config.force_image_size == 42
    with torch.no_grad():
        embeds = model.encode_image(large.inputs["image"])
    assert_golden(embeds, large.outputs["image_embeds"])
    model.save_pretrained(tmp_path / "b")
    again = InternVL_G.from_pretrained(tmp_path / "b", **FP32)
    assert torch.equal(again.state_dict()[TABLE], large.state[TABLE])
    tower = InternVisionModel.from_pretrained(tmp_path / "a", **FP32)
    assert tower.config.image_size == 42
    assert torch.equal(tower.embeddings.position_embedding, large.state[TABLE])


def test_the_tables_rows_decide(tmp_path, large):
    folder = edit(write_published(tmp_path, large), force_image_size=None)
    with pytest.warns(UserWarning, match="says 28 px, the position table is for 42 px"):
        model = InternVL_G.from_pretrained(folder, **FP32)
    assert model.config.image_size == model.vision_model.config.image_size == 42
    assert torch.equal(model.state_dict()[TABLE], large.state[TABLE])


@pytest.mark.parametrize("size", [28, 42, 63])
def test_resizing_on_request(tmp_path, large, size):
    folder = write_published(tmp_path / "a", large)
    model = InternVL_G.from_pretrained(folder, force_image_size=size, **FP32)
    expected = interpolate_positions(large.state[TABLE], size // 7, size // 7)
    assert torch.equal(model.state_dict()[TABLE], expected)
    assert model.config.image_size == size
    model.save_pretrained(tmp_path / "b")
    again = InternVL_G.from_pretrained(tmp_path / "b", **FP32)
    assert torch.equal(again.state_dict()[TABLE], expected)
    tower = InternVisionModel.from_pretrained(folder, image_size=size, **FP32)
    assert torch.equal(tower.embeddings.position_embedding, expected)
    assert tower.config.image_size == size


def test_a_table_that_is_no_square(tmp_path, large):
    state = large.state | {TABLE: torch.zeros(1, 30, 48)}
    with pytest.raises(CheckpointError, match=r"position_embedding in .*needed shape \(1, 1 \+ s"):
        InternVL_G.from_pretrained(write_published(tmp_path, large, state))


@pytest.mark.golden
def test_the_frequency_is_read_where_it_is_written(tmp_path):
    golden = load_golden("encode_image_G_freq3")
    folder = write_published(tmp_path / "a", golden)  # nested only, as published (K2)
    model = InternVL_G.from_pretrained(folder, **FP32)
    assert model.config.cross_attention_frequency == 3
    model.save_pretrained(tmp_path / "b")
    again = InternVL_G.from_pretrained(tmp_path / "b", **FP32)
    with torch.no_grad():
        embeds = again.encode_image(golden.inputs["image"])
    assert_golden(embeds, golden.outputs["image_embeds"])
    config = json.loads((folder / "config.json").read_text())
    del config["qllama_config"]["cross_attention_frequency"]
    edit(folder, **config)  # written nowhere: the layers decide
    for kind in (InternVL_G, LlamaForCausalLM):
        loaded = kind.from_pretrained(folder, **FP32)
        decoder = getattr(loaded, "qllama", loaded)
        assert [layer.cross_attn is not None for layer in decoder.model.layers] == [
            True, False, False, True, False,
        ]  # fmt: skip
        assert decoder.config.cross_attention_frequency == 3


def test_a_wrong_frequency_is_an_error(tmp_path):
    golden = load_golden("encode_image_G_freq3")
    folder = edit(write_published(tmp_path, golden), cross_attention_frequency=2)
    with pytest.raises(
        CheckpointError,
        match="frequency 2, layers 0, 2, 4 of 5 need .* in layers 0, 3; .*frequency=3 fits",
    ):
        InternVL_G.from_pretrained(folder)
    model = InternVL_G.from_pretrained(folder, cross_attention_frequency=3)
    assert model.config.cross_attention_frequency == 3


def test_a_layer_without_its_cross_attention(tmp_path, golden_g):
    state = {n: t for n, t in golden_g.state.items() if "layers.2.cross_attn" not in n}
    with pytest.raises(CheckpointError, match="checkpoint has them in layers 0, 4"):
        InternVL_G.from_pretrained(write_published(tmp_path, golden_g, state))


def test_a_configuration_of_ones_own(tmp_path, published, golden_g):
    config = InternVLConfig(**golden_g.config, force_image_size=42)
    expected = interpolate_positions(golden_g.state[TABLE], 6, 6)
    config.save_pretrained(tmp_path)
    for given in (config, config.to_dict(), tmp_path, str(tmp_path)):
        model = InternVL_G.from_pretrained(published, config=given, **FP32)
        assert torch.equal(model.state_dict()[TABLE], expected)
    with pytest.raises(TypeError, match="config must be a InternVLConfig, a dict or a path, got i"):
        InternVL_G.from_pretrained(published, config=3)


def test_fields_of_the_configuration(published):
    model = InternVL_G.from_pretrained(published, label_smoothing=0.1, trust_remote_code=True)
    assert model.config.label_smoothing == 0.1
    model = InternVL_G.from_pretrained(published, output_hidden_states=True)  # of any model
    assert model.config.output_hidden_states is True
    with pytest.raises(TypeError, match="label_smooothing is neither an argument nor a field"):
        InternVL_G.from_pretrained(published, label_smooothing=0.1)
    with pytest.raises(CheckpointError, match=r"itm_head|shape"):
        InternVL_G.from_pretrained(published, clip_embed_dim=25)
