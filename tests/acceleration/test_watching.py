"""Hooks, counters and readers see of an accelerated model what they see of the eager one."""

import pytest
import torch
from company import (
    PAIRS,
    close,
    eager,
    inputs,
    put,
    run,
)
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind, state", PAIRS)
def test_flops_are_counted(kind, state):
    counts = []
    for one in (eager(kind), put(eager(kind), state).eval()):
        one.requires_grad_(False)  # or the counter looks for gradients of the query tokens
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(one)
        counts.append(counter.get_total_flops())
    # Attention that is not PyTorch's is not among what the counter knows, and the pooler projects
    # one query instead of every token; the products are.
    assert 0.75 * counts[0] <= counts[1] <= counts[0] and counts[0] > 1e6


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("kind, state", PAIRS)
def test_global_hooks_see_every_module(kind, register, state):
    from torch.nn.modules import module as nn_module

    found = []
    for one in (eager(kind), put(eager(kind), state)):
        names, seen = {m: name for name, m in one.named_modules()}, set()
        where = {
            "forward": nn_module.register_module_forward_hook,
            "forward_pre": nn_module.register_module_forward_pre_hook,
            "full_backward": nn_module.register_module_full_backward_hook,
        }[register]
        handle = where(lambda module, *_, names=names, seen=seen: seen.add(names.get(module)))
        try:
            one.eval()
            run(one).square().mean().backward()
        finally:
            handle.remove()
        found.append(seen - {None})
    assert found[0] == found[1] and len(found[0]) > 20


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook"])  # fmt: skip
@pytest.mark.parametrize("kind, state", PAIRS)
def test_hooks_on_every_module_see_what_they_did(kind, register, state):
    found = []
    for one in (eager(kind), put(eager(kind), state)):
        seen, handles = [], []
        for name, module in one.eval().named_modules():
            handles.append(
                getattr(module, register)(lambda *_, name=name, seen=seen: seen.append(name))
            )
        run(one).square().mean().backward()
        for handle in handles:
            handle.remove()
        found.append(sorted(seen))
    assert found[0] == found[1]


LINEARS = {
    "ours": "qllama.model.layers.0.self_attn.k_proj",
    "chat": "model.vision_tower.encoder.layer.0.attention.v_proj",
    "published": "qllama.model.layers.0.self_attn.q_proj",
}


@pytest.mark.parametrize("kind, state", PAIRS)
@torch.no_grad()
def test_a_hook_may_change_what_goes_through(kind, state):
    path = LINEARS[kind]
    outputs = []
    for one in (eager(kind), put(eager(kind), state)):
        handle = one.get_submodule(path).register_forward_hook(lambda m, args, y: y * 0.5)
        outputs.append(run(one))
        handle.remove()
        outputs.append(run(one))
    close(outputs[2], outputs[0])
    close(outputs[3], outputs[1])
    assert (outputs[0] - outputs[1]).norm() > 1e-4 * outputs[1].norm()


@torch.no_grad()
def test_observers_of_operators_see_plain_tensors(state):
    """TorchDispatchMode and TorchFunctionMode, as profilers and loggers are made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    expected, built = run(eager("chat")), put(eager("chat"), state)
    names = []
    with Log():
        close(run(built), expected)
    assert len(names) > 20
    with torch.profiler.profile() as profile:
        run(built)
    assert len(profile.key_averages()) > 10


@torch.no_grad()
def test_generation_attentions_and_states_of_the_composite(state):
    expected, built = eager("chat"), put(eager("chat"), state).eval()
    for one in (expected, built):
        one.set_attn_implementation("eager")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    asked = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": 1}
    theirs, ours = (one.generate(**inputs(), **options, **asked) for one in (expected, built))
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("attentions", "hidden_states"):
        for row, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert len(row) == len(other)
            for a, b in zip(row, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for beams in (1, 3):
        tokens = [one.generate(**inputs(), **options, num_beams=beams) for one in (expected, built)]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("kind, state", PAIRS)
@torch.no_grad()
def test_weights_can_be_read_as_tensors(kind, state):
    expected, built = eager(kind), put(eager(kind), state)
    theirs = dict(expected.named_parameters())
    before = run(built)
    for name, p in built.named_parameters():
        q = theirs[name]
        assert torch.equal(p.norm(), q.norm()) and torch.equal(p.float().sum(), q.float().sum())
        assert p.numel() == q.numel() and p.shape == q.shape and p.device == q.device
        assert p.stride() == q.stride() and p.is_contiguous() and not p.is_meta
        assert (p.detach().numpy() == q.detach().numpy()).all()
        assert torch.equal(p.flatten()[:7], q.flatten()[:7]) and p.ndim == q.ndim
        assert torch.equal(p.t() if p.ndim == 2 else p, q.t() if q.ndim == 2 else q)
        assert torch.equal(torch.stack((p, p)).mean(0), q) and p.tolist() == q.tolist()
        assert p.is_leaf and p.requires_grad == q.requires_grad and p.element_size() == 4
    assert torch.equal(run(built), before)  # reading changes nothing
