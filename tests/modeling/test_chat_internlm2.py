"""InternLM2 out of published files against its definition: packed wqkv, biases, rotary scaling.

The definition below computes one sequence from the stored tensors, and rotates every key once, with
the table of the time at which it is read.
"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from internvl_engine import VisionLanguageModel

from chat_models import chat_model

HEADS, KEY_HEADS, DIM, TRAINED = 6, 2, 8, 12


class Definition:
    def __init__(self, path, scaling):
        state = load_file(path / "model.safetensors")
        self.state = {n.removeprefix("language_model."): t for n, t in state.items()}
        self.scaling = scaling
        self.keys = {0: [], 1: []}
        self.values = {0: [], 1: []}

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name, x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        return x * scale * self.state[f"{name}.weight"]

    def rotate(self, x, positions, length):
        base, stretch = 100.0, 1.0
        if self.scaling and self.scaling["type"] == "linear":
            stretch = self.scaling["factor"]
        elif self.scaling and length > TRAINED:
            factor = self.scaling["factor"]
            base *= (factor * length / TRAINED - (factor - 1)) ** (DIM / (DIM - 2))
        angles = positions[:, None] / stretch / base ** (torch.arange(0, DIM, 2) / DIM)
        first, second = x.chunk(2, dim=-1)  # (heads, N, DIM / 2) each
        cosine, sine = angles.cos(), angles.sin()
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    def attention(self, layer, x):
        past = sum(k.shape[1] for k in self.keys[layer])
        packed = self.linear(f"model.layers.{layer}.attention.wqkv", x)
        groups = packed.unflatten(-1, (KEY_HEADS, HEADS // KEY_HEADS + 2, DIM))
        q = groups[:, :, :-2].flatten(1, 2).transpose(0, 1)
        k, v = groups[:, :, -2].transpose(0, 1), groups[:, :, -1].transpose(0, 1)
        length = past + len(x)
        positions = torch.arange(past, length)
        q, k = self.rotate(q, positions, length), self.rotate(k, positions, length)
        self.keys[layer].append(k)
        self.values[layer].append(v)
        k, v = (torch.cat(c[layer], 1).repeat_interleave(3, 0) for c in (self.keys, self.values))
        scores = q @ k.transpose(1, 2) / DIM**0.5
        later = torch.arange(length) > positions[:, None]
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
        return self.linear(f"model.layers.{layer}.attention.wo", mixed.transpose(0, 1).flatten(1))

    def logits(self, ids):
        x = self.state["model.tok_embeddings.weight"][ids]
        for layer in (0, 1):
            name = f"model.layers.{layer}"
            x = x + self.attention(layer, self.norm(f"{name}.attention_norm", x))
            inner = self.norm(f"{name}.ffn_norm", x)
            w1, w3 = (self.linear(f"{name}.feed_forward.{w}", inner) for w in ("w1", "w3"))
            x = x + self.linear(f"{name}.feed_forward.w2", F.silu(w1) * w3)
        return self.linear("output", self.norm("model.norm", x))


@pytest.mark.parametrize("bias", [False, True, None])  # None: the file says nothing
@pytest.mark.parametrize(
    "scaling",
    [None, {"type": "linear", "factor": 3.0}, {"type": "dynamic", "factor": 3.0}],
    ids=lambda scaling: scaling["type"] if scaling else "plain",
)
@torch.no_grad()
def test_published_internlm2(tmp_path, bias, scaling):
    llm = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": TRAINED,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "rope_scaling": scaling,
        **({} if bias is None else {"bias": bias}),
    }
    made = chat_model(llm=llm)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    made.save_pretrained(tmp_path, layout="published")
    model = VisionLanguageModel.from_pretrained(tmp_path, dtype=torch.float32)

    prompt = torch.randint(3, 60, (9,))
    definition = Definition(tmp_path, scaling)
    has_bias = "model.layers.0.attention.wqkv.bias" in definition.state
    assert has_bias == (bias is not False)  # the published default is True
    expected = definition.logits(prompt)
    torch.testing.assert_close(
        model(input_ids=prompt[None]).logits[0], expected, rtol=1e-4, atol=1e-4
    )
    answer = []
    for _ in range(12):  # across the trained length
        answer.append(int(expected[-1].argmax()))
        expected = definition.logits(torch.tensor(answer[-1:]))
    end = next(token for token in range(64) if token not in answer)
    options = {"max_new_tokens": 12, "eos_token_id": end}
    assert model.generate(input_ids=prompt[None], **options)[0].tolist() == answer

    long = torch.randint(3, 60, (20,))
    expected = Definition(tmp_path, scaling).logits(long)
    torch.testing.assert_close(
        model(input_ids=long[None]).logits[0], expected, rtol=1e-4, atol=1e-4
    )
