"""Puts the eyes of one model in front of another: trains a query bridge on handwriting.

python examples/query_bridge.py                QLLaMA's queries alone; needs scikit-learn
python examples/query_bridge.py --patches      with the patches beside them, as LLaVA reads them

The embedded model lends its vision tower, its queries and their cross-attention. The language model
is another: a plain LLaMA of transformers that has never seen a picture, and stays as it is (it has
the embedded model's words, so that it can speak). The queries, their cross-attention and the
projector learn to tell it what they see.
"""

import argparse
import random
from collections.abc import Callable

import nano_digits
import torch
from nano_words import DIALOGUES, dialogue_tokens
from torch import Tensor
from train_nano import batches, share
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from internvl_engine import InternVL_G, InternVLProcessor, LlavaTower, QueryBridge, freeze
from internvl_engine.assets import held_out, nano_directory
from internvl_engine.modeling.image_prompt import image_prompt

STEPS, LEARNING_RATE = 150, 3e-3
Eyes = Callable[[Tensor], Tensor]  # pixels (B, 3, S, S) to embeddings (B, Q, D)


def main() -> None:
    """Trains, then asks about the pictures that were held out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", action="store_true", help="a LlavaTower: patches too")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # at these widths a second one gains little
    model = InternVL_G.from_pretrained(nano_directory(), dtype="float32")
    processor = InternVLProcessor.from_pretrained(nano_directory())
    language = speaker(model).requires_grad_(False)
    bridge, eyes = build(model, language, options.patches)
    print(freeze(bridge, cross_attention=True))
    train(bridge, eyes, language, processor, options.steps)
    for name, score in evaluate(eyes, language, processor).items():
        print(f"{name} {score:.1%} of the held-out pictures are right")


def speaker(model: InternVL_G) -> PreTrainedModel:
    """transformers' LLaMA with QLLaMA's weights, all but those that look at pictures."""
    language = LlamaForCausalLM(LlamaConfig(**model.config.qllama_config.to_dict()))
    words = {n: t for n, t in model.qllama.state_dict().items() if "cross_attn" not in n}
    language.load_state_dict(words)
    return language.eval()


def build(
    model: InternVL_G, language: PreTrainedModel, patches: bool
) -> tuple[torch.nn.Module, Eyes]:
    """The bridge, and what makes embeddings for the language model of pictures."""
    width = language.config.hidden_size
    if patches:
        tower = LlavaTower.from_internvl(model, width, copy_weights=True)
        return tower, tower
    bridge = QueryBridge.from_internvl(model, width, copy_weights=True)
    return bridge, lambda pixels: bridge(model.vision_model(pixels)[0].detach())


def train(
    bridge: torch.nn.Module,
    eyes: Eyes,
    language: PreTrainedModel,
    processor: InternVLProcessor,
    steps: int,
) -> None:
    """AdamW with warm-up and cosine, on captions and answers about pictures varied anew."""
    samples, _ = nano_digits.load()
    wanted = [p for p in bridge.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps + 1)
    rng = random.Random(0)
    for step, (pixels, shown) in enumerate(batches(samples, processor.image_processor, steps, 0)):
        ids, mask, labels = dialogue_tokens(processor.tokenizer, shown, rng)
        loss = language(**image_prompt(language, eyes(pixels), ids, mask, labels)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step:4}  loss {loss.item():.3f}")


@torch.inference_mode()
def evaluate(eyes: Eyes, language: PreTrainedModel, processor: InternVLProcessor) -> dict:
    """Shares of captions and answers that are right to the letter."""
    images, pairs = held_out()
    embeds = eyes(processor(images)["pixel_values"])
    scores = {}
    for dialogue in DIALOGUES:
        prompt = processor(prompts=dialogue.prompts[0])
        inputs = image_prompt(language, embeds, prompt["input_ids"])
        said = processor.batch_decode(
            language.generate(**inputs, max_new_tokens=8, do_sample=False)
        )
        right = [dialogue.answer.format(colour=colour, digit=digit) for colour, digit in pairs]
        equal = [a == b for a, b in zip(said, right, strict=True)]
        scores[dialogue.prompts[0]] = share(torch.tensor(equal))
    return scores


if __name__ == "__main__":
    main()
