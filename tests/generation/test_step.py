"""The step: one function of tensors, traced once and replayed for every later step."""

import gc
import weakref

import pytest
import torch
from foreign_decoders import IDS, LEFT, llama
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from internvl_engine import accelerate, capture
from internvl_engine.generation import KVCache, decode, step
from internvl_engine.generation.storage import Storage
from internvl_engine.modeling.qllama import LlamaForCausalLM

from models import model

IMAGES = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
PROMPTS = torch.tensor([[1, 9, 17, 5], [0, 0, 1, 9], [0, 1, 8, 30]])
MASK = (PROMPTS > 0).long()
OTHERS = {
    "llama": lambda: llama(heads=2),
    "llama eager": lambda: llama(heads=2, attention="eager"),
    "llama linear": lambda: llama(rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "qwen2": lambda: llama("Qwen2", heads=2),
    "qwen3": lambda: llama("Qwen3", heads=1),
    "mistral": lambda: llama("Mistral", heads=2, sliding_window=64),
    "phi3": lambda: llama("Phi3", heads=2, pad_token_id=0),
}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HOWS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 9, "temperature": 3.0},
}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["eager", "accelerated"])
def built(request):
    made = model()
    if request.param == "accelerated":
        accelerate(made)
    return made


class NoHostReads(TorchDispatchMode):
    """Fails where a value of a tensor comes to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def traced(monkeypatch):
    """Every step is traced by make_fx, which bakes what the host knows, at its first call and
    replayed at the later ones, in place of a recording; how often either happened."""
    counts = {"traced": 0, "replayed": 0}

    class Traced:
        def __init__(self, function, replay):
            assert replay
            self.function, self.graph = function, None

        def __call__(self, *tensors):
            if self.graph is None:
                self.graph = make_fx(self.function)(*tensors)
                counts["traced"] += 1
            counts["replayed"] += 1
            return self.graph(*tensors)

    monkeypatch.setattr(step, "Captured", Traced)
    return counts


@pytest.fixture
def recorded(monkeypatch):
    """The recordings that were made."""
    made, record = [], capture.record
    monkeypatch.setattr(capture, "record", lambda *args: made.append(1) or record(*args))
    return made


@pytest.mark.parametrize("how", HOWS)
def test_one_trace_serves_every_later_step(built, traced, how):
    options = GREEDY | HOWS[how]
    torch.manual_seed(1)
    expected = built.generate(IMAGES, PROMPTS, MASK, **options)
    torch.manual_seed(1)
    found = built.generate(IMAGES, PROMPTS, MASK, **options, custom_generate=decode)
    assert torch.equal(found, expected)
    assert traced == {"traced": 1, "replayed": 8}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("kind", OTHERS)
def test_language_models_of_transformers(kind, accelerated, recorded):
    built = OTHERS[kind]()
    if accelerated:
        accelerate(built, strict=True)
    for mask in (None, LEFT):
        for how in HOWS.values():
            options = {"attention_mask": mask, **GREEDY, **how}
            torch.manual_seed(1)
            expected = built.generate(IDS, **options)
            torch.manual_seed(1)
            assert torch.equal(built.generate(IDS, **options, custom_generate=decode), expected)
    assert len(recorded) == 6  # one a call


def test_one_trace_serves_transformers_own_forward(traced):
    built = OTHERS["llama"]()
    options = {"attention_mask": LEFT, **GREEDY}
    expected = built.generate(IDS, **options)
    assert torch.equal(built.generate(IDS, **options, custom_generate=decode), expected)
    assert traced == {"traced": 1, "replayed": 8}


def first_step(language, rows=3, slots=32):
    """A step on a storage of some positions, and inputs for it."""
    config = language.config
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    keys = torch.randn(1, heads, 1, dim, dtype=language.dtype)
    storage = Storage(keys, config.num_hidden_layers, rows, slots)
    storage.tensor.normal_()
    return step.step_of(language, storage.tensor), storage


def test_nothing_in_a_step_reads_a_value_on_the_host(built):
    run, _ = first_step(built.language_model)
    with NoHostReads():
        run(torch.full((3, 1), 5), torch.tensor([20, 3, 31]))


def test_a_row_reads_and_writes_what_it_holds(built):
    """What lies behind the position of a row changes nothing, and only its slot is written."""
    run, storage = first_step(built.language_model)
    ids, positions = torch.tensor([[5], [6], [7]]), torch.tensor([20, 3, 31])
    before = storage.tensor.clone()
    expected = run(ids, positions)
    changed = (storage.tensor != before).any(-1).any(3).any(1).any(0)  # (B, S)
    assert changed.nonzero().tolist() == [[row, int(p)] for row, p in enumerate(positions)]
    for row, position in enumerate(positions):
        storage.tensor[:, :, row, :, int(position) + 1 :] = 1e4
    assert torch.equal(run(ids, positions), expected)


def test_a_growing_storage_keeps_what_it_holds(built, monkeypatch):
    monkeypatch.setattr(step, "BLOCK", 4)
    options = GREEDY | {"max_new_tokens": 30}
    expected = built.generate(IMAGES, PROMPTS, MASK, **options)
    grown, grow = [], Storage.grow
    monkeypatch.setattr(Storage, "grow", lambda self, to: grown.append(to) or grow(self, to))
    found = built.generate(IMAGES, PROMPTS, MASK, **options, custom_generate=decode)
    assert torch.equal(found, expected)
    assert len(grown) > 2 and grown[-1] <= built.config.num_query_token + 4 + 30


def test_the_engine_goes_on_in_a_disposable_cache(built, monkeypatch):
    config = built.config.qllama_config
    monkeypatch.setattr(Storage, "load", None)
    for beams in (1, 3):
        options = GREEDY | {"num_beams": beams}
        expected = built.generate(IMAGES, PROMPTS, MASK, **options)
        cache = KVCache(config, 24, disposable=True)
        options["past_key_values"] = cache
        found = built.generate(IMAGES, PROMPTS, MASK, **options, custom_generate=decode)
        assert torch.equal(found, expected)
        assert cache.get_seq_length() == 0 and cache.storage is None
        again = built.generate(IMAGES, PROMPTS, MASK, **options)  # as an empty one
        assert torch.equal(again, expected)


@pytest.mark.parametrize("beams", [1, 3])
def test_keys_and_values_go_with_the_call(built, beams, monkeypatch):
    """Without a collection of cycles: they may be gigabytes."""
    seen, init = [], Storage.__init__

    def made(self, *args):
        init(self, *args)
        seen.append(weakref.ref(self.tensor))

    monkeypatch.setattr(Storage, "__init__", made)
    gc.collect()
    gc.disable()
    try:
        built.generate(IMAGES, PROMPTS, MASK, **GREEDY, num_beams=beams, custom_generate=decode)
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()


def check(built):
    expected = built.generate(IMAGES, PROMPTS, MASK, **GREEDY)
    found = built.generate(IMAGES, PROMPTS, MASK, **GREEDY, custom_generate=decode)
    assert torch.equal(found, expected)
    return expected


def test_weights_that_change_between_calls_are_followed():
    built, other = model(), model()
    report = accelerate(built)
    seen = [check(built)]
    built.load_state_dict(other.state_dict())
    seen.append(check(built))
    built.train().eval()
    seen.append(check(built))
    assert torch.equal(seen[1], seen[2]) and not torch.equal(seen[0], seen[1])
    report.undo()
    assert torch.equal(check(built), seen[1])
    built.language_model.lm_head.weight.mul_(-1)
    assert not torch.equal(check(built), seen[1])
    built.language_model.lm_head.weight.mul_(-1)
    built.bfloat16().float()
    check(built)


def test_adapters_are_part_of_the_step():
    pytest.importorskip("peft")
    built = model()
    accelerate(built)
    plain = check(built)
    built.wrap_qllama_lora(r=4)
    assert torch.equal(check(built), plain)
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    changed = check(built)
    assert not torch.equal(changed, plain)
    built.qllama.merge_and_unload()
    check(built)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_quantized_weights_are_unwrapped_in_the_trace(scheme):
    built = model()
    accelerate(built, quantize=scheme)
    check(built)


def test_a_watched_model_is_called_in_every_step(built):
    calls = []
    built.language_model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    check(built)
    assert len(calls) == 2 * GREEDY["max_new_tokens"]


def test_a_step_that_reads_on_the_host_is_not_captured(built, monkeypatch):
    forward = LlamaForCausalLM.forward

    def reading(self, *args, **kwargs):
        assert kwargs["position_ids"].max().item() >= 0
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(built.language_model), "forward", reading)
    check(built)


def test_a_step_costs_a_third_of_the_calls_of_generate():
    """Python calls a token, with real proportions of heads and panels; see benchmarks/decode.py
    for times."""
    import cProfile
    import pstats

    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_hidden_layers=4, intermediate_size=256,
        vocab_size=64, num_query_token=4, vision_hidden_size=48,
    )  # fmt: skip
    language = LlamaForCausalLM(config).eval()
    accelerate(language)

    def calls(new, **how):
        profile = cProfile.Profile()
        options = GREEDY | {"max_new_tokens": new, "min_new_tokens": None}
        profile.runcall(language.generate, IDS.clamp(max=63), **options, **how)
        return pstats.Stats(profile).total_calls

    engine, loop = (
        (calls(40, **how) - calls(20, **how)) / 20 for how in ({"custom_generate": decode}, {})
    )
    # A third; the loops of other versions of transformers cost less.
    assert engine <= loop * 0.4, (engine, loop)
