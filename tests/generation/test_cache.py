"""KVCache against transformers' DynamicCache, and what only it can do (see test_generate.py)."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from internvl_engine import reference
from internvl_engine.generation import KVCache

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4)


def states(batch=3, tokens=5):
    return torch.randn(batch, 4, tokens, 8)


def filled(cache, lengths=(5, 1, 3)):
    torch.manual_seed(1)
    for tokens in lengths:
        for layer in range(2):
            cache.update(states(tokens=tokens), states(tokens=tokens), layer)
    return cache


def assert_alike(ours, theirs):
    assert ours.get_seq_length() == theirs.get_seq_length()
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("max_length", [9, 64, 2])  # exact, ample, and growing twice
def test_it_holds_what_a_dynamic_cache_holds(max_length):
    ours, theirs = filled(KVCache(CONFIG, max_length)), filled(DynamicCache())
    assert_alike(ours, theirs)
    assert ours.storage.shape[:4] == (2, 2, 3, 4) and ours.storage.shape[4] >= 9
    beams = torch.tensor([2, 0, 0])
    for cache in (ours, theirs):
        cache.reorder_cache(beams)
    assert_alike(ours, theirs)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    assert_alike(ours, theirs)
    for cache in (ours, theirs):
        cache.batch_select_indices(torch.tensor([5, 1]))
    assert_alike(ours, theirs)


def test_within_its_length_it_never_moves():
    cache = KVCache(CONFIG, 9)
    cache.update(states(), states(), 0)
    address = cache.storage.data_ptr()
    filled(cache, (2, 2))
    assert cache.storage.data_ptr() == address


def test_rotary_append_is_rotary_and_update():
    ours, theirs = filled(KVCache(CONFIG, 16)), filled(DynamicCache())
    q, k, v = states(tokens=2), states(tokens=2), states(tokens=2)
    cos, sin = reference.rotary_table(32, 8, 10000.0, torch.float32, "cpu")
    positions = torch.tensor([[9, 10], [4, 5], [7, 8]])
    rotated, keys, values = ours.rotary_append(q, k, v, cos, sin, positions, 1)
    expected, rotated_k = reference.rotary(q, k, cos, sin, positions)
    expected_keys, expected_values = theirs.update(rotated_k, v, 1)
    torch.testing.assert_close(rotated, expected)
    torch.testing.assert_close(keys, expected_keys)
    assert torch.equal(values, expected_values)
    assert (ours.get_seq_length(0), ours.get_seq_length(1)) == (9, 11)


def test_it_forgets_all_or_some():
    cache = filled(KVCache(CONFIG, 16))
    kept = cache.layers[0].keys[:, :, :4].clone()
    cache.crop(4)
    assert torch.equal(cache.layers[0].keys, kept)
    cache.crop(-1)
    cache.crop(0)  # prompt lookup has nothing to drop
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.storage is not None
    filled(cache, (2, 2))
    cache.reset()
    cache.update(states(batch=1), states(batch=1), 0)  # an empty one takes another batch
    assert cache.layers[0].keys.shape[0] == 1


def test_layers_of_different_lengths_are_reordered_whole():
    cache = KVCache(CONFIG, 16)
    cache.update(states(), states(), 0)
    longer = states(tokens=7)
    cache.update(longer, longer, 1)
    cache.reorder_cache(torch.tensor([1, 0, 2]))
    assert torch.equal(cache.layers[1].keys, longer[[1, 0, 2]])
    cache.layers[1].reorder_cache(torch.tensor([1, 0, 2]))
    assert torch.equal(cache.layers[1].keys, longer)


def test_filled_in_inference_mode_it_grows_outside():
    cache = KVCache(CONFIG, 9)
    with torch.inference_mode():
        filled(cache)
    with torch.no_grad():
        cache.update(states(tokens=30), states(tokens=30), 0)
    assert cache.get_seq_length() > 30


def test_errors_say_what_came():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        KVCache(CONFIG, 0)
    cache = filled(KVCache(CONFIG, 9))
    with pytest.raises(ValueError, match=r"holds 3 rows of 4 heads of 8, .*, got \(2, 4, "):
        cache.update(states(batch=2), states(batch=2), 0)
    with pytest.raises(ValueError, match=r"got .*, torch.float16 on cpu"):
        cache.update(states().half(), states().half(), 0)
    with pytest.raises(ValueError, match="must have one shape"):
        cache.update(states(tokens=3), states(tokens=1), 0)
