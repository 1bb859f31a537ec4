"""The published QLLaMA: the stand-in is ours, and its attentions may be replaced."""

import copy

import pytest
import torch
from foreign_decoders import close, published
from torch import nn

from internvl_engine import accelerate

from models import decoder

PADDING = torch.tensor([[1] * 8, [1] * 6 + [0, 1]])  # between the queries and the text


@torch.no_grad()
def test_the_stand_in_is_the_model_of_the_description():
    ours, theirs = decoder(), published()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    embeds, image = torch.randn(6, 11, 64), torch.randn(2, 17, 48)
    inputs = {"inputs_embeds": embeds, "use_zero_attention_mask": True, "use_cache": True}
    inputs |= {"vision_hidden_states": image, "repeat_time": 3}
    first, second = ours(**inputs), theirs(**inputs)
    close(second.logits, first.logits)
    padding = torch.ones(6, 12)
    padding[1::2, 6:9] = 0
    for mask in (None, padding):
        step = {"input_ids": torch.randint(3, 61, (6, 1)), "attention_mask": mask}
        outputs = (
            one(past_key_values=past.past_key_values, use_cache=True, **step).logits
            for one, past in ((ours, copy.deepcopy(first)), (theirs, second))
        )
        close(*outputs)


@torch.no_grad()
def test_the_published_cache_is_a_pair_of_tensors():
    built = published()
    fused = copy.deepcopy(built)
    accelerate(fused)
    embeds, image = torch.randn(2, 8, 64), torch.randn(2, 9, 48)
    ids = torch.randint(3, 61, (2, 7))
    found = []
    for one in (built, fused):
        inputs = {"vision_hidden_states": image, "use_cache": True}
        start = {"inputs_embeds": embeds, "attention_mask": PADDING}
        output = one(**start, **inputs, use_zero_attention_mask=True)
        found.append([output.logits[PADDING.bool()], output.past_key_values])
        # One token, then a chunk that is long enough to read the image again (quirk K4).
        for new, seen in ((1, 9), (7, 16)):
            inputs["attention_mask"] = nn.functional.pad(PADDING, (0, seen - 8), value=1)
            cache = output.past_key_values
            output = one(input_ids=ids[:, :new], past_key_values=cache, **inputs)
            found[-1] += [output.logits, output.past_key_values]
    close(found[1], found[0])
    assert found[1][1][0][1].is_contiguous()  # v; not a view that holds q and k


@torch.no_grad()
def test_published_probabilities_and_tiled_keys():
    built = published()
    fused = copy.deepcopy(built)
    accelerate(fused)
    inputs = {"inputs_embeds": torch.randn(4, 7, 64), "vision_hidden_states": torch.randn(2, 9, 48)}
    ours, theirs = (one(**inputs, output_attentions=True, repeat_time=2) for one in (fused, built))
    close(ours.attentions, theirs.attentions)
    states, image = inputs["inputs_embeds"][:, :6], inputs["vision_hidden_states"]
    ours, theirs = (
        one.model.layers[0].cross_attn(states, image, repeat_time=2, use_cache=True)
        for one in (fused, built)
    )
    close(ours, theirs)
    assert ours[2][0].shape == (4, 4, 9, 16)
    ours, theirs = (
        one.model.layers[0].cross_attn(states, image, repeat_time=2, output_attentions=True)
        for one in (fused, built)
    )
    close(ours[:2], theirs[:2])
    with pytest.raises(RuntimeError, match="must match"):  # the eager module's own
        fused.model.layers[0].cross_attn(states, image)
