"""Tokenizers and folders of chat checkpoints, made in a split second; pictures for them."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from internvl_engine.processing.special_tokens import SPECIAL_TOKENS

SIDE, TOKENS = 28, 4  # of a tile
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>",
           "<|end|>", "<human>", "<bot>", "</s>")  # fmt: skip
SENTENCES = [
    "What is this? A cat. And the colour? It is red, on the beach.", "Image-1: Image-2: Frame-1: ",
    "system user assistant You are a helpful assistant.", "0123456789 ABCDEFGHIJ abcdefghij 你好",
] * 5  # fmt: skip
JINJA = (  # as transformers' InternVL checkpoints have it
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_JINJA = (  # of a language model that knows no pictures, and has a sentence of its own
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Owl.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "downsample_ratio": 0.5, "dynamic_image_size": True, "force_image_size": SIDE,
    "max_dynamic_patch": 4, "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1,
    "template": "internvl2_5", "use_thumbnail": True, "system_message": "Be brief.",
    "vision_config": {
        "model_type": "intern_vit_6b", "hidden_size": 32, "image_size": SIDE, "patch_size": 7,
        "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True,
    },
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 48,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": 2, "max_position_embeddings": 512, "vocab_size": 400,
        "rope_theta": 1e6, "tie_word_embeddings": False,
    },
}  # fmt: skip


@lru_cache
def _trained() -> str:
    """A byte-level BPE tokenizer as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(SENTENCES, trainer)
    return words.to_str()


def tokenizer(*, added: bool = True, chat_template: str | None = None, **options):
    """A fast tokenizer of transformers' that knows all templates' markers."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **options}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), **settings)
    words.add_tokens(list(MARKERS), special_tokens=True)
    if added:
        words.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    words.chat_template = chat_template
    return words


def published_folder(folder: Path, *, chat_template: str | None = None, **changes) -> Path:
    """A folder with the configuration and the tokenizer of a published chat checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(chat_template=chat_template).save_pretrained(folder)
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def transformers_folder(folder: Path) -> Path:
    """The same in the layout of transformers' InternVL."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer(chat_template=JINJA)
    words.save_pretrained(folder)
    config = {
        "model_type": "internvl", "architectures": ["InternVLForConditionalGeneration"],
        "image_seq_length": TOKENS, "downsample_ratio": 0.5, "text_config": {"model_type": "qwen2"},
        "image_token_id": words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "vision_config": {"image_size": [SIDE, SIDE], "patch_size": [7, 7]},
    }  # fmt: skip
    images = {"image_processor_type": "GotOcr2ImageProcessorFast", "min_patches": 1,
              "max_patches": 4, "crop_to_patches": False, "size": {"height": SIDE, "width": SIDE},
              "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def picture(width: int = 60, height: int = 30, seed: int = 0) -> np.ndarray:
    """A uint8 image (height, width, 3); 60 x 30 is two tiles and a thumbnail."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


IMAGE, ASKED = picture(), {"type": "text", "text": "What is this?"}
USER = "<|im_start|>user\n"


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def shown(processor, inputs, row=0):
    """A row as text, with <n> for n placeholders in a row."""
    ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row].bool()
    text = processor.decode(ids[mask], skip_special_tokens=False)
    for count in range(60, 0, -1):
        text = text.replace("<IMG_CONTEXT>" * count, f"<{count}>")
    return text


@lru_cache
def tiny_chat(seed: int = 0, accelerate: bool = False):
    """A whole engine of random weights, large enough that every input matters."""
    import torch

    from internvl_engine import InternVLChat, VisionLanguageConfig, VisionLanguageModel
    from internvl_engine.processing import InternVLTileProcessor, VisionLanguageProcessor

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VisionLanguageModel(VisionLanguageConfig.from_dict(CONFIG))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
    images = InternVLTileProcessor(SIDE, max_tiles=4)
    options = {"num_image_token": TOKENS, "template": "internvl2_5", "system_message": "Be brief."}
    processor = VisionLanguageProcessor(images, tokenizer(), **options)
    return InternVLChat(model, processor, name=f"tiny-{seed}", accelerate=accelerate)
