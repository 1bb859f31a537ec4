"""Chat models against transformers' own InternVLForConditionalGeneration, on the same weights."""

import pytest
import torch
import transformers
from transformers import InternVLConfig, InternVLForConditionalGeneration

from internvl_engine import VisionLanguageModel
from internvl_engine.acceleration import accelerate

IMAGE, PAD, END = 90, 0, 2
TOKENS = 4  # of a tile of 28 px in patches of 7
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": [28, 28],
    "patch_size": [7, 7],
}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": END,
    "tie_word_embeddings": False,
}
# transformers 4.57 fails at layers other than the last.
LAYER = {} if transformers.__version__.startswith("4.") else {"vision_feature_layer": -2}
SIX_B = {"norm_type": "rms_norm", "use_qk_norm": True, "layer_norm_eps": 1e-4}
THREE_HUNDRED_M = {"norm_type": "layer_norm", "attention_bias": True}
MODELS = {
    "qwen2": (SIX_B, {"model_type": "qwen2"}, {}),
    "llama": (
        THREE_HUNDRED_M,
        {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        LAYER,
    ),
    "qwen3": (THREE_HUNDRED_M, {"model_type": "qwen3", "head_dim": 16}, {}),
    "mistral": (SIX_B, {"model_type": "mistral", "sliding_window": 16}, {}),
    "larger": (
        {**SIX_B, "image_size": [56, 56]},
        {"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {},
    ),
}


def randomised(model):
    """Every weight away from its default, which would hide a misplaced one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5))
    return model


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(theirs, ours), which was loaded from what theirs saved."""
    vision, text, changes = MODELS[request.param]
    config = InternVLConfig(
        vision_config=VISION | vision,
        text_config=TEXT | text,
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
        **changes,
    )
    theirs = randomised(InternVLForConditionalGeneration(config).eval())
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, VisionLanguageModel.from_pretrained(folder, dtype=torch.float32)


def prompt(*parts):
    """Ids of a prompt: a number of tiles, or a list of ids."""
    ids = []
    for part in parts:
        ids += [IMAGE] * TOKENS * part if isinstance(part, int) else part
    return ids


BATCHES = {  # prompts: how many tiles they have
    "single": [prompt([5, 6], 1, [7, 8])],
    "several": [prompt([5], 1, [6], 1, [7, 9])],
    "tiled": [prompt([11], 3, [12])],
    "text": [[5, 6, 7, 8, 9], [11, 12]],
    "mixed": [prompt([5], 2, [6, 7]), [8, 9, 10], prompt([11, 12], 1, [13])],
}


def batch(name):
    """Left-padded inputs of one of BATCHES."""
    rows = BATCHES[name]
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    tiles = int((ids == IMAGE).sum()) // TOKENS
    pixels = {"pixel_values": torch.randn(tiles, 3, 28, 28)} if tiles else {}
    return {"input_ids": ids, "attention_mask": mask, **pixels}


def compare(theirs, ours, inputs):
    tokens = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = theirs(**inputs).logits, ours(**inputs).logits
    scale = expected[tokens].abs().max().clamp(min=1)
    assert (actual - expected)[tokens].abs().max() <= 1e-5 * scale
    options = {"max_new_tokens": 8, "do_sample": False}
    answers = theirs.generate(**inputs, **options)[:, tokens.shape[1] :]
    torch.testing.assert_close(ours.generate(**inputs, **options), answers, rtol=0, atol=0)


@pytest.mark.parametrize("name", BATCHES)
def test_the_same_logits_and_answers(pair, name):
    compare(*pair, batch(name))


@pytest.mark.parametrize("name", BATCHES)
def test_the_same_when_theirs_is_accelerated(pair, name):
    theirs, ours = pair
    report = accelerate(theirs)
    try:
        compare(theirs, ours, batch(name))
    finally:
        report.undo()
