"""device_map and offloading: the same answers, and nothing stays where it should not.

An offloaded weight is on the meta device until its block runs: where a hook does not fire, as on
`forward_train` with hooks of the usual kind, there is no weight to give the right answer with.
"""

import copy

import pytest
import torch
from published_layout import write_published

from internvl_engine.checkpoint.placement import blocks, parse_size
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVisionModel, InternVL_G
from internvl_engine.modeling.qllama import LlamaForCausalLM

from golden_vectors import load_golden

FP32 = {"dtype": torch.float32}
MAPS = {
    "all on disk": {"": "disk"},
    "a tower on disk": {"": "cpu", "qllama": "disk"},
    "some layers on disk": {
        "": "cpu", "vision_model.encoder.layers.1": "disk", "qllama.model.layers.0": "disk",
        "qllama.model.norm": "disk", "clip_projector2": "disk", "qllama.lm_head": "disk",
    },
}  # fmt: skip


def answers(model, image) -> list[torch.Tensor]:
    ids = torch.tensor([[1, 7, 9, 2], [1, 8, 2, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        return [
            model.encode_image(image, mode="InternVL-G"),
            model.encode_text(ids),
            *model(image, ids),
            *model.get_image_features(image),
            model(pixel_values=image, return_dict=True).vision_outputs.hidden_states[1],
            model.generate(
                pixel_values=image, input_ids=ids, attention_mask=mask, max_new_tokens=4,
                num_beams=2,
            ),
        ]  # fmt: skip


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.cpu(), other.cpu())


def offloaded(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@pytest.fixture(scope="module")
def plain(published, golden_g):
    model = InternVL_G.from_pretrained(published, **FP32)
    return model, answers(model, golden_g.inputs["image"])


@pytest.mark.parametrize("name", MAPS)
def test_answers_of_an_offloaded_model(published, golden_g, plain, name):
    model = InternVL_G.from_pretrained(published, device_map=MAPS[name], **FP32)
    away = offloaded(model)
    assert away
    assert_same(answers(model, golden_g.inputs["image"]), plain[1])
    assert offloaded(model) == away, "weights that were brought in must go again"
    own = {"query_tokens", "text_projection", "logit_scale"}
    assert not own & away
    assert model.device == model.qllama.device == model.vision_model.device == torch.device("cpu")


def test_weights_leave_after_a_failure_too(published):
    model = InternVL_G.from_pretrained(published, device_map={"": "disk"}, **FP32)
    away = offloaded(model)
    with pytest.raises(RuntimeError):
        model.vision_model.encoder.layers[0](torch.zeros(1, 2, 3))
    assert offloaded(model) == away


def test_reaching_past_a_block_is_an_error(published):
    model = InternVL_G.from_pretrained(published, device_map={"": "disk"}, **FP32)
    layer = model.qllama.model.layers[0]
    assert layer.mlp.up_proj.weight.shape == (112, 64)
    for call in (
        lambda: layer.mlp(torch.ones(1, 2, 64)),
        lambda: torch.ones(2, 64) @ layer.self_attn.q_proj.weight.t(),
        lambda: torch.nn.functional.embedding(
            torch.tensor([1]), model.qllama.model.embed_tokens.weight
        ),
        lambda: model.clip_projector.norm1_q(torch.ones(1, 48)),
    ):
        with pytest.raises(RuntimeError, match="call the block it belongs to|meta"):
            call()


def test_converted_weights_need_a_folder(tmp_path, published, golden_g):
    with pytest.raises(ValueError, match="goes to disk in another dtype .* give offload_folder"):
        InternVL_G.from_pretrained(published, device_map={"": "disk"}, dtype=torch.bfloat16)
    image = golden_g.inputs["image"].bfloat16()
    model = InternVL_G.from_pretrained(
        published, device_map={"": "disk"}, dtype="bfloat16", offload_folder=tmp_path / "away"
    )
    expected = InternVL_G.from_pretrained(published, dtype="bfloat16")
    assert_same(answers(model, image), answers(expected, image))
    assert len(list((tmp_path / "away").iterdir())) == len(offloaded(model))


@pytest.mark.parametrize("kind", ["auto", "balanced", "sequential"])
def test_automatic_maps_fill_memory_then_disk(published, golden_g, plain, kind):
    model = InternVL_G.from_pretrained(
        published, device_map=kind, max_memory={"cpu": "700KB"}, **FP32
    )
    kept = sum(p.numel() * 4 for p in model.parameters() if not p.is_meta)
    total = sum(p.numel() * 4 for p in plain[0].parameters())
    assert 350_000 < kept < 720_000 < total  # the layers that fit, and the model's own
    assert_same(answers(model, golden_g.inputs["image"]), plain[1])


def test_automatic_without_a_limit_is_all_in_one_place(published):
    model = InternVL_G.from_pretrained(published, device_map="auto", **FP32)
    assert not offloaded(model)
    assert len({parameter.device for parameter in model.parameters()}) == 1


def test_an_offloaded_model_saves_whole(tmp_path, published, golden_g):
    model = InternVL_G.from_pretrained(published, device_map={"": "disk"}, **FP32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, golden_g.state[name]), name
    model.save_pretrained(tmp_path)
    again = InternVL_G.from_pretrained(tmp_path, **FP32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, golden_g.state[name]), name
    with pytest.raises(RuntimeError, match="is offloaded and cannot take a state dict"):
        model.load_state_dict(golden_g.state)


def test_a_copy_of_an_offloaded_model(published, golden_g, plain):
    model = InternVL_G.from_pretrained(published, device_map={"": "disk"}, **FP32)
    twin = copy.deepcopy(model)
    del model
    assert_same(answers(twin, golden_g.inputs["image"]), plain[1])


@pytest.mark.parametrize("merge", [False, True])
def test_offloaded_lora(tmp_path, merge):
    pytest.importorskip("peft")
    golden = load_golden("lora_encode_G")
    write_published(tmp_path / "lora", golden)
    load = {"merge_lora": merge, **FP32}
    model = InternVL_G.from_pretrained(
        tmp_path / "lora", device_map={"": "disk"}, offload_folder=tmp_path / "away", **load
    )
    expected = InternVL_G.from_pretrained(tmp_path / "lora", **load)
    image = golden.inputs["image"]
    assert_same(answers(model, image), answers(expected, image))
    assert (tmp_path / "away").exists() == merge  # only merged weights are not in the checkpoint


@pytest.mark.parametrize("kind", [InternVisionModel, LlamaForCausalLM])
def test_offloaded_towers(published, golden_g, kind):
    model = kind.from_pretrained(published, device_map={"": "disk"}, **FP32)
    expected = kind.from_pretrained(published, **FP32)
    inputs = golden_g.inputs["image"] if kind is InternVisionModel else torch.tensor([[1, 5, 9, 2]])
    with torch.no_grad():
        assert torch.equal(model(inputs)[0], expected(inputs)[0])


def test_parts_with_offloading(published, golden_g):
    model = InternVL_G.from_pretrained(published, parts="g", device_map={"": "disk"}, **FP32)
    image = golden_g.inputs["image"]
    with torch.no_grad():
        expected = InternVL_G.from_pretrained(published, **FP32).encode_image(image)
        assert torch.equal(model.encode_image(image), expected)


def test_blocks_cover_the_14b():
    with torch.device("meta"):
        model = InternVL_G(InternVLConfig())
    found = dict(blocks(model))
    inside = {f"{b}.{n}" for b, m in found.items() for n, _ in m.named_parameters()}
    own = {"query_tokens", "text_projection", "logit_scale"}
    assert inside | own == set(model.state_dict())
    assert len(found) == 48 + 32 + 7  # layers; embeddings, norm, head, poolers, ITM head


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"device_map": {"qllama": "cpu"}}, "no entry for vision_model.embeddings"),
        (
            {"device_map": {"": "cpu", "qllama.model.layers.0.mlp": "disk"}},
            "qllama.model.layers.0 must be in one place, got cpu and disk",
        ),
        ({"device_map": "fastest"}, "must be a dict, a device or one of auto"),
        ({"device_map": "auto", "device": "cpu"}, "either device or device_map"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "a size as '20GiB', got 'lots'"),
    ],
)
def test_maps_that_cannot_be(published, arguments, message):
    with pytest.raises(ValueError, match=message):
        InternVL_G.from_pretrained(published, **arguments)


@pytest.mark.parametrize(
    "size, expected", [("20GiB", 20 << 30), ("1.5GB", 1_500_000_000), ("64 KB", 64_000), (7, 7)]
)
def test_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.gpu
@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        "cuda",
        {"": 0, "qllama": "cpu"},
        {"": 0, "vision_model": "disk", "qllama.model.norm": "cpu", "clip_projector2": "cpu"},
        {"": "cpu", "clip_projector": 0},
    ],
)
def test_on_a_gpu(published, golden_g, device_map):
    image = golden_g.inputs["image"].cuda()
    model = InternVL_G.from_pretrained(published, device_map=device_map, **FP32)
    expected = InternVL_G.from_pretrained(published, device="cuda", **FP32)
    assert_same(answers(model, image), answers(expected, image))
