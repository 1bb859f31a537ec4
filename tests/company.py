"""Models in company: small ones of every kind that `accelerate` serves, and what becomes of them.

A test builds one, puts a copy into a state, does to both what people do to models, and compares.
"""

import copy
from functools import cache

import torch
from foreign_decoders import llama
from foreign_towers import composite
from published_model import modeling_internvl
from torch import Tensor, nn

from internvl_engine import accelerate

from models import VISION, decoder, model

IDS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 2, 0, 0]])
STATES = ("inference", "training", "in train()", "after undo()")


@cache
def _built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "ours":
        return model(vision_config=VISION | {"drop_path_rate": 0.0})
    if kind == "published":
        return spread(modeling_internvl.InternVLModel(decoder().config, layers=2)).eval()
    if kind == "llm":
        return llama("Qwen2", heads=2)
    return spread(composite())


KINDS = ("ours", "chat", "published")
# Every kind, and every state; all of both would take minutes and find nothing more.
PAIRS = [*(("chat", state) for state in STATES), ("ours", "inference"), ("ours", "in train()"),
         ("published", "inference")]  # fmt: skip


def eager(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of its own, in evaluation."""
    return copy.deepcopy(_built(kind)).to(dtype)


def spread(built: nn.Module) -> nn.Module:
    """The same with weights that tell apart what is done with them."""
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


def put(built: nn.Module, state: str) -> nn.Module:
    """The model in a state of STATES, having been used in it."""
    report = accelerate(built, "training" if "training" in state else "inference")
    if state == "in train()":
        built.train()
    with torch.no_grad():
        run(built)
    if "undo" in state:
        report.undo()
    return built


def inputs(batch: int = 2) -> dict[str, Tensor]:
    """What InternVLForConditionalGeneration takes: four image tokens and five others."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 60, (batch, 5), generator=generator)
    ids = torch.cat((torch.full((batch, 4), 60), text), 1)
    pixels = torch.randn(batch, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def call(built: nn.Module) -> tuple[tuple, dict]:
    """Positional and other arguments of one forward."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(p.dtype for p in built.parameters() if p.is_floating_point())
    name = type(built).__name__
    if name == "InternVL_G":
        return (torch.randn(2, 3, 28, 28, generator=generator).to(dtype), IDS), {}
    if name == "InternVLForConditionalGeneration":
        asked = inputs()
        return (), asked | {"pixel_values": asked["pixel_values"].to(dtype)}
    if name == "Qwen2ForCausalLM":
        return (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    return (torch.randn(2, 17, 48, generator=generator).to(dtype),), {}


def tensor(output) -> Tensor:
    """What a forward gives, as one tensor (B, ...)."""
    if isinstance(output, tuple):
        return torch.cat([each.flatten(1) for each in output], 1)
    return output.logits


def run(built: nn.Module) -> Tensor:
    """What the model, or one that wraps it, makes of its inputs."""
    inner = getattr(built, "module", built)  # of DDP and AveragedModel
    if hasattr(inner, "get_base_model"):  # peft's
        inner = inner.get_base_model()
    args, kwargs = call(inner)
    return tensor(built(*args, **kwargs))


def close(found: Tensor, expected: Tensor) -> None:
    """Asserts that two results differ by roundings only."""
    # Norms are float32 in every dtype; of a few dozen bfloat16 numbers the error is a draw.
    wide = {torch.float32: 2e-5, torch.float64: 2e-6}.get(expected.dtype, 0.1)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = (found.double() - expected.double()).norm()
    assert error <= wide * expected.double().norm(), float(error / expected.double().norm())


def gradients(built: nn.Module) -> dict[str, Tensor]:
    """After one backward pass, by name."""
    built.zero_grad()
    run(built).float().square().mean().backward()
    return {name: p.grad for name, p in built.named_parameters() if p.grad is not None}


def step(built: nn.Module, optimizer: torch.optim.Optimizer, times: int = 2) -> None:
    """Trains."""
    for _ in range(times):
        optimizer.zero_grad()
        run(built).float().square().mean().backward()
        optimizer.step()


def assert_same_weights(found: nn.Module, expected: nn.Module, rtol: float = 1e-3) -> None:
    """Asserts equal names and, within rtol of the norm, equal values of two state dicts.

    The default is for a few steps of training, which enlarge roundings up to 1e-4; a step that is
    left out, or made twice, shows as 1e-2.
    """
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    wrong = {
        name: float((ours[name].double() - t.double()).norm() / (1e-12 + t.double().norm()))
        for name, t in theirs.items()
        if (ours[name].double() - t.double()).norm() > rtol * t.double().norm() + 1e-7
    }
    assert not wrong, wrong


def trainable(built: nn.Module) -> dict[str, int]:
    """The parameters to train, and their sizes."""
    return {name: p.numel() for name, p in built.named_parameters() if p.requires_grad}


def assert_same_outputs(built: nn.Module, expected: nn.Module) -> None:
    """Of two trained models, with the weights of one."""
    expected.load_state_dict(built.state_dict())
    with torch.no_grad():
        close(run(built.eval()), run(expected.eval()))
