import pytest
import torch

from internvl_engine.configuration import InternVisionConfig
from internvl_engine.modeling import InternVisionModel
from internvl_engine.modeling.vision import DropPath, InternVisionEmbeddings, interpolate_positions

from models import VISION, pixels


def tower(**changes) -> InternVisionModel:
    return InternVisionModel(InternVisionConfig(**(VISION | changes))).eval()


@torch.no_grad()
def test_any_grid_by_interpolation_and_the_own_grid_untouched():
    model = tower()
    table = model.embeddings.position_embedding
    assert interpolate_positions(table, 4, 4) is table
    states = model(pixels(side=28)[:, :, :, :21]).last_hidden_state
    assert states.shape == (2, 1 + 4 * 3, 48)
    constant = torch.full_like(table, 0.5)  # bicubic weights sum to one
    torch.testing.assert_close(interpolate_positions(constant, 7, 3), torch.full((1, 22, 48), 0.5))


@torch.no_grad()
def test_resizing_starts_from_the_grid_the_table_has():
    model = tower()
    model.resize_pos_embeddings(28, 42, 7)
    once = model.embeddings.position_embedding.clone()
    model.resize_pos_embeddings(28, 42, 7)  # the published code would misread the resized table
    assert torch.equal(model.embeddings.position_embedding, once)
    assert model.config.image_size == 42 and once.shape == (1, 37, 48)


@torch.no_grad()
def test_hidden_states_start_with_the_embeddings():
    model = tower()
    x = pixels()
    outputs = model(x, output_hidden_states=True)
    assert torch.equal(outputs.hidden_states[0], model.embeddings(x))
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])
    as_tuple = model(x, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], outputs.last_hidden_state)


def test_drop_path_drops_samples_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    y = drop(torch.ones(4000, 2, 3))
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))  # whole samples
    assert abs(y.mean().item() - 1) < 0.05  # six standard deviations of 4,000 draws
    assert torch.equal(drop.eval()(y), y)
    rates = [layer.drop_path1 for layer in tower(drop_path_rate=0.3).encoder.layers]
    assert isinstance(rates[0], torch.nn.Identity) and rates[1].rate == pytest.approx(0.3)


def test_recomputation_gives_the_same_gradients_and_can_be_switched():
    model = tower().train()
    x = pixels()

    def gradients():
        model.zero_grad()
        model(x).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    assert model.encoder.gradient_checkpointing
    recomputed = gradients()
    model.gradient_checkpointing_disable()
    assert not model.encoder.gradient_checkpointing
    for ours, theirs in zip(gradients(), recomputed, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_acts_in_training_only():
    model = tower(attention_dropout=0.5, dropout=0.5)
    x = pixels()
    with torch.no_grad():
        assert torch.equal(model(x)[0], model(x)[0])
        model.train()
        assert not torch.equal(model(x)[0], model(x)[0])


def test_initialisation_by_module_type():
    embeddings = tower(initializer_range=0.02).embeddings
    assert isinstance(embeddings, InternVisionEmbeddings)
    assert embeddings.position_embedding.std().item() == pytest.approx(0.02, rel=0.2)
    layer = tower(initializer_factor=0.3).encoder.layers[0]
    assert torch.equal(layer.ls1, torch.full((48,), 0.3))
    assert layer.attn.proj.bias.abs().max() == 0 and layer.norm1.weight.min() == 1


@pytest.mark.parametrize(
    "shape, message",
    [((2, 3, 30, 28), "patch size 7"), ((2, 1, 28, 28), "got shape"), ((3, 28, 28), "got shape")],
)
def test_wrong_pixels(shape, message):
    with pytest.raises(ValueError, match=message):
        tower()(torch.zeros(shape))


def test_wrong_configurations_and_inputs():
    with pytest.raises(ValueError, match="48 and 5"):
        InternVisionConfig(**(VISION | {"num_attention_heads": 5}))
    with pytest.raises(ValueError, match="norm_type"):
        InternVisionConfig(norm_type="batch_norm")
    with pytest.raises(ValueError, match="either pixel_values or pixel_embeds"):
        tower()()
    with pytest.raises(ValueError, match="must be"):
        tower()(pixel_embeds=torch.zeros(17, 48))
