"""Batches of conversations for train_nano_chat.py, and the vocabulary they are written in."""

import random
from typing import Any, NamedTuple

import torch
from nano_chat_scenes import SYSTEM, Scene, all_words, converse, draw_scenes
from nano_digits import Samples
from torch import Tensor

from internvl_engine.processing.chat_templates import published_template

SIDE = 28
BATCH, WITHOUT_PICTURE = 48, 3  # rows of a batch, and those of them that are text alone
VOCABULARY = 448
TEMPLATE = published_template("internvl2_5")
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """ids, mask, labels (B, L) int64; tiles (T, 3, S, S) and a flag (T,) for each: 0 is a dummy."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    tiles: Tensor | None = None
    flags: Tensor | None = None


class Rows:
    """Draws batches, the same ones from the same seed.

    Args:
        samples: the digits to draw from.
        tokenizer: of transformers.
        seed: of everything random.
    """

    def __init__(self, samples: Samples, tokenizer: Any, seed: int) -> None:
        self.samples, self.tokenizer = samples, tokenizer
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def described(self) -> Batch:
        """Conversations about pictures in words."""
        _, scenes = draw_scenes(self.samples, BATCH, 1, self.rng, self.generator)
        prefixes = [f"<img>{', '.join(map(str, scene))}</img>\n" for scene in scenes]
        return self._tokens(scenes, prefixes)

    def pictured(self, tokens: int) -> Batch:
        """Conversations about pictures.

        Args:
            tokens: of a tile.
        """
        tiles, scenes = draw_scenes(self.samples, BATCH, SIDE, self.rng, self.generator)
        prefixes = [f"<img>{'<IMG_CONTEXT>' * (tokens * len(each))}</img>\n" for each in tiles]
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        pixels, flags = torch.cat(tiles), []
        for row, each in enumerate(tiles):
            flags += [int(row >= WITHOUT_PICTURE)] * len(each)
        batch = self._tokens(scenes, prefixes)
        return batch._replace(tiles=(pixels - mean) / std, flags=torch.tensor(flags))

    def _tokens(self, scenes: list[Scene], prefixes: list[str]) -> Batch:
        rows = []
        for row, (scene, prefix) in enumerate(zip(scenes, prefixes, strict=True)):
            alone = row < WITHOUT_PICTURE
            turns = converse(None if alone else scene, self.rng)
            rows.append(self._row(turns, "" if alone else prefix))
        length = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (tokens, targets) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.tensor(targets)
            mask[row, : len(tokens)] = 1
        return Batch(ids, mask, labels)

    def _row(self, turns: list, prefix: str) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and its labels: answers and their ends alone."""
        ids: list[int] = []
        labels: list[int] = []
        text = TEMPLATE.system + SYSTEM + TEMPLATE.system_end
        for turn in turns:
            text += TEMPLATE.user + prefix + turn.question + TEMPLATE.user_end + TEMPLATE.assistant
            head, tail = (
                self.tokenizer.encode(part, add_special_tokens=False)
                for part in (text, turn.answer + TEMPLATE.separator)
            )
            ids += head + tail
            labels += [-100] * len(head) + tail
            text, prefix = TEMPLATE.assistant_end.removeprefix(TEMPLATE.separator), ""
        return ids, labels


def train_tokenizer() -> Any:
    """A byte-level BPE vocabulary of the conversations, which can write every other text too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_words() + ["system\nuser\nassistant\n"] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END_OF_TEXT, padding_side="left"
    )
