"""`accelerate` on the pre-norm blocks of other vision towers: as eager, in every way of use."""

import copy
import pickle

import pytest
import torch
from foreign_blocks import (
    HEADS,
    TOKENS,
    TOWERS,
    WIDTH,
    Attention,
    Block,
    ResidualAttentionBlock,
    Tower,
    call,
    tower,
)
from torch import nn
from torch._dynamo.testing import CompileCounter

from internvl_engine import accelerate, kernels
from internvl_engine.fused import FusedModule, FusedPreNormBlock

STATES = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
each_tower = pytest.mark.parametrize("name", TOWERS)


def near(actual, expected, rtol=1e-5):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert (actual - expected).norm() <= rtol * expected.norm()


@each_tower
@torch.no_grad()
def test_every_block_is_fused_and_undone(name):
    built = tower(name)
    state, expected = copy.deepcopy(built.state_dict()), call(name, built, STATES)
    report = accelerate(built, strict=True)
    assert all(isinstance(block, FusedPreNormBlock) for block in built.blocks)
    assert report.replaced == ["blocks.0", "blocks.1"] and not any(e.reason for e in report.entries)
    near(call(name, built, STATES), expected)
    found = built.state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in state)
    report.undo()
    assert not any(isinstance(module, FusedModule) for module in built.modules())
    assert torch.equal(call(name, built, STATES), expected)


@each_tower
def test_gradients_are_those_of_eager(name):
    built = tower(name)
    fused, gradients = copy.deepcopy(built), []
    accelerate(fused, "training", strict=True)
    for one in (built, fused):
        x = STATES.clone().requires_grad_()
        call(name, one.train(), x).square().mean().backward()
        gradients.append([x.grad, *(p.grad for p in one.parameters())])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@each_tower
@torch.no_grad()
def test_copies_and_other_dtypes_follow(name):
    built = tower(name)
    fused = copy.deepcopy(built)
    accelerate(fused)
    copied = pickle.loads(pickle.dumps(fused))
    near(call(name, copied, STATES), call(name, built, STATES))
    wide = STATES.double()
    near(call(name, fused.double(), wide), call(name, built.double(), wide), 1e-12)
    state = {key: torch.roll(tensor, 1) for key, tensor in built.state_dict().items()}
    for one in (built, fused):
        one.float().load_state_dict(state)
    near(call(name, fused, STATES), call(name, built, STATES))


@each_tower
@torch.no_grad()
def test_whoever_hooks_a_part_is_heard(name):
    built = tower(name)
    fused, outputs = copy.deepcopy(built), []
    accelerate(fused)
    plain = call(name, fused, STATES)
    for one in (built, fused):
        attention = next(m for n, m in one.blocks[1].named_children() if "att" in n)

        def halved(module, args, output):
            if isinstance(output, tuple):
                return (output[0] / 2, *output[1:])
            return output / 2

        handle = attention.register_forward_hook(halved)
        outputs.append(call(name, one, STATES))
        handle.remove()
    near(*reversed(outputs))
    assert (outputs[0] - plain).norm() > 1e-2 * plain.norm()
    assert torch.equal(call(name, fused, STATES), plain)


@each_tower
@torch.no_grad()
def test_a_linear_that_is_replaced_is_called(name):
    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    built = tower(name)
    fused = copy.deepcopy(built)
    accelerate(fused)
    for one in (built, fused):
        path = next(n for n, m in one.named_modules() if m is _first_of_the_mlp(one.blocks[0]))
        one.set_submodule(path, Doubled(one.get_submodule(path)))
    near(call(name, fused, STATES), call(name, built, STATES))


def _first_of_the_mlp(block):
    wide = (m for m in block.modules() if isinstance(m, nn.Linear))
    return next(m for m in wide if (m.in_features, m.out_features) == (WIDTH, 2 * WIDTH))


@each_tower
@torch.no_grad()
def test_masks_are_what_they_were(name):
    """Causal, as text towers have them; served or eager, the same."""
    mask = torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
    built, x = tower(name), STATES
    if name == "open_clip, (N, B, C)":
        x = STATES.transpose(0, 1).contiguous()
    expected = call(name, built, x, mask) if name != "ViT" and name != "DINOv2" else None
    if expected is None:
        return
    accelerate(built)
    near(call(name, built, x, mask), expected)
    assert (call(name, built, x) - expected).norm() > 1e-2 * expected.norm()


@torch.no_grad()
def test_causal_calls_go_to_the_operator(monkeypatch):
    calls, attention = [], kernels.attention
    monkeypatch.setattr(
        kernels,
        "attention",
        lambda *args, **more: calls.append(args[3]) or attention(*args, **more),
    )
    for name in ("timm", "CLIP"):
        built = tower(name)
        mask = () if name == "timm" else (None,)
        if name == "CLIP":  # as transformers 5 calls it; 4.57 has masks
            pytest.importorskip("transformers", minversion="5.0")
        expected = built(STATES, *mask, is_causal=True)
        accelerate(built)
        near(built(STATES, *mask, is_causal=True), expected)
        assert calls == ["causal"] * 2
        calls.clear()


@torch.no_grad()
def test_what_a_block_does_not_serve_its_eager_form_does():
    built = tower("open_clip")
    fused, image = copy.deepcopy(built), torch.randn(3, 5, WIDTH)
    accelerate(fused)
    near(fused(STATES, image, image), built(STATES, image, image))
    hidden = torch.rand(TOKENS, TOKENS) > 0.7  # in nn.MultiheadAttention: what is not seen
    hidden.fill_diagonal_(False)
    near(fused(STATES, attn_mask=hidden), built(STATES, attn_mask=hidden))
    with pytest.raises(TypeError, match="wrong"):
        fused(STATES, wrong=1)
    near(fused.blocks[0](q_x=STATES), built.blocks[0](q_x=STATES))


@pytest.mark.parametrize("build", [
    lambda: Tower(Block, drop_path=0.5), lambda: Tower(Block, dropout=0.5),
    lambda: dropping(Tower(ResidualAttentionBlock)),
])  # fmt: skip
@torch.no_grad()
def test_dropout_draws_what_it_did(build):
    built = build()
    fused = copy.deepcopy(built)
    accelerate(fused, "training")
    for mode in (True, False):
        outputs = []
        for one in (built.train(mode), fused.train(mode)):
            torch.manual_seed(0)
            outputs.append(one(STATES))
        near(*reversed(outputs))


def dropping(built):
    for block in built.blocks:
        block.attn.dropout = 0.5
    return built


KEPT = {
    "it also holds attn.q_norm.weight": lambda: Block(norm=nn.LayerNorm),
    "its norm1 is BatchNorm1d, neither LayerNorm nor RMSNorm": lambda: Block(),
    "its mlp.act is SiLU, not a GELU": lambda: Block(act=nn.SiLU),
    "its MLP is not mlp.fc1 and mlp.fc2 with an activation between them": lambda: Block(),
    "its heads are 4 wide; the kernels take multiples of 8 up to 128": lambda: Block(),
    "computes something else than FusedTimmBlock": lambda: Shifted(),
    "its scores are scaled by a Tensor": lambda: Block(),
}


class Shifted(Block):
    def forward(self, x):
        return super().forward(x.roll(1, 1))


@pytest.mark.parametrize("reason", KEPT)
def test_what_is_not_served_says_why(reason):
    block = KEPT[reason]()
    if "q_norm" in reason:
        block.attn = Attention(WIDTH, HEADS, norm=nn.LayerNorm)
    elif "BatchNorm" in reason:
        block.norm1 = nn.BatchNorm1d(TOKENS)
    elif "MLP" in reason:
        block.mlp.fc2 = nn.Linear(WIDTH, WIDTH)
    elif "wide" in reason:
        block.attn.num_heads = 16
    elif "scaled" in reason:
        block.attn.scale = torch.ones(())
    report = accelerate(nn.ModuleList([block]))
    assert reason in report.kept["0"] and reason in str(report)
    assert not isinstance(block, FusedModule)


@pytest.mark.parametrize("name", ["timm", "open_clip", "CLIP", "DINOv2"])
@torch.no_grad()
def test_one_graph_serves_every_batch(name):
    built = tower(name)
    accelerate(built)
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(
        lambda x: call(name, built, x), fullgraph=True, dynamic=True, backend=graphs
    )
    for batch in (2, 3):
        near(compiled(STATES[:batch]), call(name, built, STATES[:batch]))
    assert graphs.frame_count == 1


@torch.no_grad()
def test_the_class_of_timm_itself_is_known_by_its_place():
    place = {"__module__": "timm.models.vision_transformer"}
    forward = type(Block.forward)(Block.forward.__code__, Block.forward.__globals__)
    forward.__module__ = place["__module__"]
    forward.__defaults__ = Block.forward.__defaults__
    kind = type("Block", (nn.Module,), {"forward": forward} | place)
    other, empty = kind(), kind()
    vars(other).update(vars(Block()))
    report = accelerate(nn.ModuleList([other, empty]))
    assert report.replaced == ["0"]
    assert report.kept == {"1": "it does not hold what this class is known to hold"}
