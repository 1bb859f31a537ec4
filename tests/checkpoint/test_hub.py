"""Checkpoints by their id on the hub: from the cache of downloads, and what is asked for."""

import fnmatch
import json
import shutil

import pytest
import torch
from published_layout import write_published

from internvl_engine.checkpoint import CheckpointError, CheckpointNotFoundError
from internvl_engine.modeling import InternVisionModel, InternVL_G

from golden_vectors import load_golden

NAME = "OpenGVLab/InternVL-14B-224px"
FP32 = {"dtype": torch.float32}


@pytest.fixture
def cache(tmp_path, published):
    """The hub's cache of downloads, as huggingface_hub lays it out."""
    repository = tmp_path / "hub" / "models--OpenGVLab--InternVL-14B-224px"
    commit = "0" * 40
    shutil.copytree(published, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "hub"


def test_from_the_cache_without_a_network(cache, golden_g):
    model = InternVL_G.from_pretrained(NAME, cache_dir=cache, **FP32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, golden_g.state[name]), name
    with pytest.raises(CheckpointNotFoundError, match=f"{NAME}: "):
        InternVL_G.from_pretrained(NAME, cache_dir=cache, revision="v2")


def test_a_cache_that_lacks_a_shard(cache):
    next(cache.rglob("model-00002-of-00003.safetensors")).unlink()
    with pytest.raises(CheckpointNotFoundError, match="model-00002-of-00003.safetensors: this we"):
        InternVL_G.from_pretrained(NAME, cache_dir=cache)


class Hub:
    """In place of the hub: a folder, and a list of what was downloaded from it."""

    def __init__(self, repository, downloads):
        self.repository, self.downloads, self.options = repository, downloads, []

    def snapshot_download(self, name, allow_patterns, **options):
        self.options.append(options)
        for path in self.repository.rglob("*.*"):
            relative = path.relative_to(self.repository)
            if any(fnmatch.fnmatch(str(relative), pattern) for pattern in allow_patterns):
                (self.downloads / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.downloads / relative)
        return str(self.downloads)

    @property
    def files(self) -> set[str]:
        return {path.name for path in self.downloads.rglob("*.*")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "repository", tmp_path / "downloads")
    hub.downloads.mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.snapshot_download)
    return hub


def by_tower(folder, state):
    """Shards that hold one tower each, as far as the published ones do."""
    write_published(folder, load_golden("lora_encode_G"), state)
    index = folder / "model.safetensors.index.json"
    old = json.loads(index.read_text())["weight_map"]
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in set(old.values()):
        tensors |= load_file(folder / file)
        (folder / file).unlink()
    weight_map = {name: f"{name.split('.')[0]}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        part = {n: t.clone() for n, t in tensors.items() if weight_map[n] == file}
        save_file(part, folder / file)
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("case", ["encode_image_G", "lora_encode_G"])
def test_only_the_shards_that_are_needed_come_down(hub, case):
    state = load_golden(case).state
    by_tower(hub.repository, state)
    merge = {"merge_lora": case.startswith("lora")}
    tower = InternVisionModel.from_pretrained(NAME, **merge, **FP32)
    assert hub.files == {
        "config.json", "model.safetensors.index.json", "vision_model.safetensors",
    }  # fmt: skip
    assert tower.embeddings.class_embedding.shape == (1, 1, 48)
    InternVL_G.from_pretrained(NAME, parts="text", token="secret", revision="main")
    assert {"qllama.safetensors", "text_projection.safetensors"} <= hub.files
    assert "clip_projector2.safetensors" not in hub.files
    assert hub.options[-1] == {"token": "secret", "revision": "main"}
    InternVL_G.from_pretrained(NAME)
    assert "clip_projector2.safetensors" in hub.files


def test_a_folder_of_the_repository(hub, golden_g):
    write_published(hub.repository / "weights", golden_g, shards=1)
    model = InternVL_G.from_pretrained(NAME, subfolder="weights", **FP32)
    assert torch.equal(model.query_tokens, golden_g.state["query_tokens"])
    local = InternVL_G.from_pretrained(hub.repository, subfolder="weights", **FP32)
    assert torch.equal(local.query_tokens, golden_g.state["query_tokens"])


def test_a_chat_is_refused_before_its_weights_come_down(hub, golden_g):
    write_published(hub.repository, golden_g)
    config = {"model_type": "internvl_chat", "vision_config": {}, "llm_config": {}}
    (hub.repository / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="this is a chat checkpoint"):
        InternVL_G.from_pretrained(NAME)
    assert hub.files == {"config.json", "model.safetensors.index.json"}
