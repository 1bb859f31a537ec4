"""Towers of pre-norm blocks that are not InternVL's, small: built as timm and open_clip build them,
from their description, and transformers' own."""

import pytest
import torch
from torch import nn

WIDTH, HEADS, TOKENS = 64, 4, 17


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if not self.training:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


class Attention(nn.Module):
    """With q, k and v in one weight."""

    def __init__(self, width, heads, bias=True, norm=None, dropout=0.0):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width)
        self.q_norm = norm(width // heads) if norm else nn.Identity()
        self.k_norm = norm(width // heads) if norm else nn.Identity()
        self.attn_drop = nn.Dropout(dropout)

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)
        q, k = self.q_norm(q) * self.scale, self.k_norm(k)
        scores = q @ k.mT if attn_mask is None else q @ k.mT + attn_mask
        if is_causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        return self.proj((self.attn_drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width, act):
        super().__init__()
        self.fc1, self.act = nn.Linear(width, 2 * width), act()
        self.drop1, self.fc2 = nn.Dropout(0.0), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.fc2(self.drop1(self.act(self.fc1(x))))


class Block(nn.Module):
    """As timm's."""

    def __init__(self, scales=True, act=nn.GELU, norm=nn.LayerNorm, drop_path=0.0, **attention):
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.attn, self.mlp = Attention(WIDTH, HEADS, **attention), MLP(WIDTH, act)
        self.ls1, self.ls2 = (Scale(WIDTH) if scales else nn.Identity() for _ in range(2))
        paths = (DropPath(drop_path) if drop_path else nn.Identity() for _ in range(2))
        self.drop_path1, self.drop_path2 = paths

    def forward(self, x, attn_mask=None, is_causal=False):
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).to(x.dtype)


class ResidualAttentionBlock(nn.Module):
    """As open_clip's."""

    def __init__(self, batch_first=True, act=QuickGELU, scales=False):
        super().__init__()
        self.ln_1, self.ln_2 = LayerNorm(WIDTH), LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.ls_1, self.ls_2 = (Scale(WIDTH) if scales else nn.Identity() for _ in range(2))
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 2 * WIDTH))
        self.mlp.add_module("gelu", act())
        self.mlp.add_module("c_proj", nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
        x = self.ln_1(q_x)
        k, v = x if k_x is None else k_x, x if v_x is None else v_x
        attended = self.attn(x, k, v, need_weights=False, attn_mask=attn_mask)[0]
        x = q_x + self.ls_1(attended)
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class Tower(nn.Module):
    """Blocks one after the other: (B, N, C) to the same."""

    def __init__(self, build, **options):
        super().__init__()
        self.blocks = nn.ModuleList(build(**options) for _ in range(2))

    def forward(self, x, *args, **kwargs):
        for block in self.blocks:
            x = block(x, *args, **kwargs)
            x = x[0] if isinstance(x, tuple) else x
        return x


def _of_transformers(model, layer, **changes):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    configuration = pytest.importorskip(f"transformers.models.{model}.configuration_{model}")
    kind = layer.removesuffix("EncoderLayer").removesuffix("Layer")
    name = kind + ("VisionConfig" if kind in ("CLIP", "Siglip", "Siglip2") else "Config")
    fields = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH}
    config = getattr(configuration, name)(**(fields | changes))
    config._attn_implementation = "sdpa"
    return Tower(lambda: getattr(modeling, layer)(config))


TOWERS = {
    "timm": lambda: Tower(Block),
    "timm, plain": lambda: Tower(Block, scales=False, bias=False),
    "timm, tanh": lambda: Tower(Block, act=lambda: nn.GELU(approximate="tanh")),
    "open_clip": lambda: Tower(ResidualAttentionBlock, scales=True),
    "open_clip, (N, B, C)": lambda: Tower(ResidualAttentionBlock, batch_first=False, act=nn.GELU),
    "CLIP": lambda: _of_transformers("clip", "CLIPEncoderLayer"),
    "SigLIP": lambda: _of_transformers("siglip", "SiglipEncoderLayer"),
    "SigLIP 2": lambda: _of_transformers("siglip2", "Siglip2EncoderLayer"),
    "DINOv2": lambda: _of_transformers("dinov2", "Dinov2Layer", mlp_ratio=2),
    "ViT": lambda: _of_transformers("vit", "ViTLayer"),
}


def tower(name: str) -> nn.Module:
    """One of TOWERS in evaluation, with weights that tell apart what they do."""
    torch.manual_seed(0)
    built = TOWERS[name]()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return built.eval()


def call(name: str, built: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None):
    """The tower's states, with a mask that is added to the scores (N, N) where one is given."""
    if name in ("CLIP", "SigLIP", "SigLIP 2"):
        return built(x, None if mask is None else mask.expand(len(x), 1, -1, -1))
    return built(x) if mask is None else built(x, attn_mask=mask)
