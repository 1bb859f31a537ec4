"""A whole engine that is made in a split second: random weights, a tokenizer trained here."""

import io
from functools import lru_cache

import numpy as np
import torch

from internvl_engine import InternVL, InternVLConfig, InternVLModel, InternVLProcessor
from internvl_engine.processing import InternVLImageProcessor, InternVLTokenizer

SENTENCES = [
    "summarize: a photo of a red panda on the beach", "English caption: two blue dogs, one cat",
    "Question: What colour is it? Answer: violet", "the quick brown fox jumps over the lazy dog",
    "0123456789 ABCDEFGHIJKLMNOPQRSTUVWXYZ .:;!?",
] * 5  # fmt: skip


def tokenizer() -> InternVLTokenizer:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="bpe", vocab_size=460,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    return InternVLTokenizer(model.getvalue())


@lru_cache
def tiny_engine(seed: int = 0, dtype: torch.dtype = torch.float32) -> InternVL:
    """An engine of the nano size; weights large enough that every input matters."""
    words = tokenizer()
    config = InternVLConfig.from_preset("nano")
    config.qllama_config.vocab_size = len(words)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InternVLModel(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.15)
    processor = InternVLProcessor(InternVLImageProcessor(config.image_size), words)
    return InternVL(model, processor, name=f"tiny-{seed}", accelerate=False)


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    """Different uint8 images (height, width, 3) of different sizes."""
    random = np.random.default_rng(seed)
    sizes = random.integers(20, 60, (count, 2))
    return [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes]


def saved(tmp_path_factory) -> str:
    """The folder of the first engine as a checkpoint; written once."""
    folder = tmp_path_factory.getbasetemp() / "tiny-checkpoint"
    if not folder.exists():
        engine = tiny_engine()
        engine.model.save_pretrained(folder)
        engine.processor.save_pretrained(folder)
    return str(folder)
