"""torch.func on an accelerated model: functional calls, ensembles, gradients of gradients."""

import pytest
import torch
from company import (
    KINDS,
    PAIRS,
    call,
    close,
    eager,
    put,
    run,
    tensor,
)

from internvl_engine import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")


def functional(one, weights, args, kwargs):
    return tensor(torch.func.functional_call(one, weights, args, kwargs))


@pytest.mark.parametrize("kind, state", PAIRS)
@torch.no_grad()
def test_stacked_models_compute_as_each(kind, state):
    """An ensemble by `stack_module_state` is that of the eager models."""
    models = [eager(kind) for _ in range(2)]
    for number, one in enumerate(models):
        for parameter in one.parameters():
            parameter.mul_(1 + 0.1 * number)
    expected = [run(one) for one in models]
    accelerated = [put(one, state) for one in models]
    weights, buffers = torch.func.stack_module_state(accelerated)
    assert all(type(t.detach()) is torch.Tensor for t in weights.values())
    args, kwargs = call(models[0])
    for number in range(2):
        chosen = {k: t[number] for k, t in (weights | buffers).items()}
        close(functional(accelerated[0], chosen, args, kwargs), expected[number])


@pytest.mark.parametrize("state", ["inference", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls_and_their_gradients(kind, state):
    expected, built = eager(kind), put(eager(kind), state)
    results = []
    for one in (expected, built):
        args, kwargs = call(one)
        weights = {name: p.detach() * 1.1 for name, p in one.named_parameters()}

        def loss(weights, one=one, args=args, kwargs=kwargs):
            return functional(one, weights, args, kwargs).square().mean()

        results.append(torch.func.grad(loss)(weights))
        assert not any(p.grad is not None for p in one.parameters())
    ours, theirs = results[1], results[0]
    scale = torch.stack([grad.norm() for grad in theirs.values()]).norm()
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name


def tower(kind, one):
    """The part of a model that takes pictures, or what is left of them, as a function."""
    args, kwargs = call(one)
    if kind == "ours":
        return one.vision_model, args[0], lambda output: output.last_hidden_state
    if kind == "chat":
        vision = one.model.vision_tower
        one.set_attn_implementation("eager")  # PyTorch's own has no second derivative on the CPU
        return vision, kwargs["pixel_values"], lambda output: output.last_hidden_state
    encoder = one.vision_model.encoder
    return encoder, args[0], lambda output: output.last_hidden_state


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(lambda one: f(one[None])[0])(x),
    "vmap of grad": lambda f, x: torch.func.vmap(
        torch.func.grad(lambda one: f(one[None]).square().sum())
    )(x),
    "twice": lambda f, x: torch.autograd.functional.hvp(
        lambda x: f(x).square().sum(), x, torch.ones_like(x)
    )[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_transforms_compute_as_eager_or_say_so(kind, mode, transform):
    expected, built = eager(kind), eager(kind)
    accelerate(built, mode)
    found = []
    for one in (expected, built):
        module, x, pick = tower(kind, one)
        try:
            found.append(TRANSFORMS[transform](lambda x, m=module, p=pick: p(m(x)), x))
        except (RuntimeError, NotImplementedError) as error:
            assert one is built, error
            assert transform in ("jvp", "vmap of grad"), error
            assert "; use " in str(error) and len(str(error)) < 200  # one sentence, what to do
            return
    assert (found[1] - found[0]).norm() <= 1e-4 * found[0].norm()


def test_gradients_twice_in_training_mode():
    expected, built = eager("ours").train(), eager("ours").train()
    accelerate(built, "training")
    seconds = []
    for one in (expected, built):
        module, x, pick = tower("ours", one.eval())
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(pick(module(x)).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert (seconds[1] - seconds[0]).norm() <= 1e-4 * seconds[0].norm()
