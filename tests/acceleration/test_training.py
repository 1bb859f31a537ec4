"""Training an accelerated model: what is frozen stays, what is not moves as in the eager one."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from company import (
    KINDS,
    PAIRS,
    STATES,
    assert_same_weights,
    call,
    close,
    eager,
    gradients,
    put,
    run,
    step,
    tensor,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from internvl_engine import accelerate

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = {
    "ours": ["qkv", "fc1", "q_proj", "down_proj"],
    "chat": ["q_proj", "fc1", "down_proj"],
    "published": ["qkv", "fc2", "v_proj", "gate_proj"],
}


@pytest.fixture(params=STATES)
def state(request):
    return request.param


def lora(kind, **options):
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=TARGETS[kind], **options)


ADAPTERS = {
    "LoRA": lora,
    "LoRA with dropout": lambda kind: lora(kind, lora_dropout=0.3),
    "DoRA": lambda kind: lora(kind, use_dora=True),
    "rsLoRA": lambda kind: lora(kind, use_rslora=True),
    "modules_to_save": lambda kind: lora(kind, modules_to_save=["fc2"]),
    "IA3": lambda kind: peft.IA3Config(
        target_modules=TARGETS[kind], feedforward_modules=[TARGETS[kind][-1]]
    ),
    "LoHa": lambda kind: peft.LoHaConfig(r=2, target_modules=TARGETS[kind]),
    "OFT": lambda kind: peft.OFTConfig(
        oft_block_size=8, target_modules=TARGETS[kind], use_cayley_neumann=False
    ),
}


def adapted(built, config):
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(built, config)
    with torch.no_grad():  # adapters begin with zeros, which would hide what they do
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrapped


def trainable(built):
    return {name: p.numel() for name, p in built.named_parameters() if p.requires_grad}


def trained(built, seed=2):
    """After three steps of what an optimizer finds to train."""
    torch.manual_seed(seed)
    wanted = [p for p in built.parameters() if p.requires_grad]
    step(built.train(), torch.optim.SGD(wanted, lr=0.02), 3)
    return built


def assert_same_outputs(built, expected):
    """Of two trained models, with the weights of one."""
    expected.load_state_dict(built.state_dict())
    with torch.no_grad():
        close(run(built.eval()), run(expected.eval()))


CASES = [("chat", name) for name in ADAPTERS] + [(k, "LoRA") for k in ("ours", "published")]


@pytest.mark.parametrize("state", ["inference", "training", "in train()"])
@pytest.mark.parametrize("kind, adapter", CASES)
def test_adapters_train_and_nothing_else(kind, adapter, state):
    expected, built = eager(kind), put(eager(kind), state)
    config = ADAPTERS[adapter](kind)
    expected, built = adapted(expected, config), adapted(built, copy.deepcopy(config))
    assert trainable(built) == trainable(expected)
    base = {k: t.clone() for k, t in built.state_dict().items() if k not in trainable(built)}
    assert_same_weights(trained(built), trained(expected))
    now = built.state_dict()
    assert all(torch.equal(now[name], t) for name, t in base.items())
    assert_same_outputs(built, expected)


@pytest.mark.parametrize("adapter", ["prefix", "prompt"])
def test_prefixes_and_prompts_train_and_nothing_else(adapter, state):
    expected, built = eager("llm"), put(eager("llm"), state)
    cls = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[adapter]
    models = []
    for one in (expected, built):
        torch.manual_seed(3)
        config = cls(task_type="CAUSAL_LM", num_virtual_tokens=3)
        models.append(trained(peft.get_peft_model(one, config)))
    assert trainable(models[0]) == trainable(models[1])
    assert_same_weights(*reversed(models))


@pytest.mark.parametrize("after", ["merge", "unmerge", "set_adapter", "unload", "merge_and_unload",
                                   "disable_adapter", "delete_adapter"])  # fmt: skip
@pytest.mark.parametrize("used", [True, False], ids=["used", "unused"])
@pytest.mark.parametrize("kind, state", PAIRS[:2] + PAIRS[4:5])
@torch.no_grad()
def test_what_peft_does_to_weights_is_what_computes(kind, used, after, state):
    """Equal to a model that was never accelerated, with and without a run between."""
    outputs = []
    for one in (eager(kind), put(eager(kind), state)):
        one = adapted(one, lora(kind)).eval()
        one.add_adapter("other", lora(kind, init_lora_weights=False))
        if used:
            run(one)
        one = PEFT[after](one, used)
        outputs.append(run(one))
        if isinstance(one, peft.PeftModel) and used:
            one.unmerge_adapter()
            outputs.append(run(one))
    half = len(outputs) // 2
    for theirs, ours in zip(outputs[:half], outputs[half:], strict=True):
        close(ours, theirs)


def _merge(one, used):
    one.merge_adapter()
    return one


def _unmerge(one, used):
    one.merge_adapter()
    if used:
        run(one)
    one.unmerge_adapter()
    return one


def _set_adapter(one, used):
    one.set_adapter("other")
    return one


def _disable(one, used):
    with one.disable_adapter():
        run(one)
    return one


def _delete(one, used):
    one.set_adapter("other")
    one.delete_adapter("default")
    return one


PEFT = {
    "merge": _merge,
    "unmerge": _unmerge,
    "set_adapter": _set_adapter,
    "unload": lambda one, used: one.unload(),
    "merge_and_unload": lambda one, used: one.merge_and_unload(),
    "disable_adapter": _disable,
    "delete_adapter": _delete,
}


@pytest.mark.parametrize("mode", ["inference", "training"])
@torch.no_grad()
def test_undo_gives_the_objects_back_after_an_adapter_came_and_went(mode):
    built = eager("chat")
    expected, objects = run(built), dict(built.named_modules())
    report = accelerate(built, mode)
    run(built)
    wrapped = adapted(built, lora("chat", modules_to_save=["fc2"]))
    merged = wrapped.unload()
    assert merged is built
    assert report.replaced
    report.undo()
    assert not report.replaced
    now = dict(built.named_modules())
    kept = {name for name in objects if "fc2" not in name}  # which peft put elsewhere itself
    assert all(now[name] is objects[name] for name in kept)
    assert not [m for m in built.modules() if "internvl_engine" in type(m).__module__]
    close(run(built), expected)


def test_our_own_lora_is_merged_into_what_computes(state):
    models = [eager("ours"), put(eager("ours"), state)]
    (pixels, _), _ = call(models[0])
    outputs = []
    for one in models:
        torch.manual_seed(4)
        one.wrap_qllama_lora(r=2, lora_alpha=4, lora_dropout=0.0)
        wanted = [p for p in one.parameters() if p.requires_grad]
        step(one.train(), torch.optim.SGD(wanted, lr=0.5))
        one.eval().qllama = one.qllama.merge_and_unload()
        with torch.no_grad():
            outputs.append(one.encode_image(pixels))
    close(*reversed(outputs))
    with torch.no_grad():
        assert (eager("ours").encode_image(pixels) - outputs[0]).norm() > 1e-3


@pytest.mark.parametrize("kind, state", PAIRS)
def test_frozen_weights_stay_and_an_optimizer_made_in_eval_has_all(kind, state):
    expected, built = eager(kind), put(eager(kind), state)
    built.eval()
    for one in (expected, built):
        one.requires_grad_(False)
        for name, parameter in one.named_parameters():
            if "norm" in name or "down_proj" in name or "fc1" in name:
                parameter.requires_grad_(True)
        wanted = [p for p in one.parameters() if p.requires_grad]
        step(one.train(), torch.optim.SGD(wanted, lr=0.02, momentum=0.9))
    assert trainable(built) == trainable(expected)
    assert_same_weights(built, expected)


@pytest.mark.parametrize("kind, state", PAIRS)
def test_an_optimizer_made_in_eval_trains_every_weight(kind, state):
    expected, built = eager(kind), put(eager(kind), state)
    built.eval()
    count = sum(p.numel() for p in expected.parameters())
    assert sum(p.numel() for p in built.parameters()) == count
    for one in (expected, built):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
        step(one.train(), optimizer)
        assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == count
    assert_same_weights(built, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_gradient_is_there(kind, mode, training):
    """Of a model in train mode as constructed, and in evaluation, back-propagated at once."""
    expected, built = eager(kind).train(training), eager(kind).train(training)
    accelerate(built, mode)
    ours, theirs = gradients(built), gradients(expected)
    assert ours.keys() == theirs.keys()
    scale = torch.stack([grad.norm() for grad in theirs.values()]).norm()
    for name, grad in theirs.items():
        assert ours[name].shape == grad.shape and type(ours[name]) is torch.Tensor
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name


def test_train_and_eval_by_turns(state):
    expected, built = eager("chat"), put(eager("chat"), state)
    for one in (expected, built):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02)
        for _ in range(2):
            step(one.train(), optimizer, 1)
            with torch.no_grad():
                run(one.eval())
    assert_same_weights(built, expected)
    assert_same_outputs(built, expected)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_moving_averages_average(state, device):
    expected, built = eager("chat"), put(eager("chat"), state)
    averages = []
    for one in (expected, built):
        average = AveragedModel(one, device, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for _ in range(2):
            step(one.train(), torch.optim.SGD(one.parameters(), lr=0.02), 1)
            average.update_parameters(one)
        averages.append(average.eval())
    assert_same_weights(*reversed(averages))
    assert_same_outputs(*reversed(averages))


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


@pytest.fixture
def group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist
    dist.destroy_process_group()


def test_ddp_reduces_every_gradient(group, state):
    expected, built = eager("chat"), put(eager("chat"), state)
    for one in (expected, built):
        wrapped = nn.parallel.DistributedDataParallel(one)
        step(wrapped.train(), torch.optim.SGD(wrapped.parameters(), lr=0.02))
    assert_same_weights(built, expected)


def test_ddp_keeps_two_ranks_together(tmp_path):
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (tests, tests / "modeling", os.environ.get("PYTHONPATH", ""))))
    ranks = [
        subprocess.Popen(
            [sys.executable, tests / "two_ranks.py", str(rank), tmp_path],
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    expected = eager("chat")
    step(expected.train(), torch.optim.SGD(expected.parameters(), lr=0.02))
    for name, t in expected.state_dict().items():
        assert (first[name] - t).norm() <= 1e-4 * t.norm() + 1e-7, name


@pytest.mark.parametrize("state", ["inference", "training"])
def test_the_trainer_of_transformers_trains_as_eager(state, tmp_path):
    from transformers import Trainer, TrainingArguments

    class Loss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            return tensor(model(**inputs)).square().mean()

    models = [eager("chat"), put(eager("chat"), state)]
    rows = call(models[0])[1]
    data = [{name: t[index % 2] for name, t in rows.items()} for index in range(4)]
    for index, one in enumerate(models):
        arguments = TrainingArguments(
            output_dir=tmp_path / str(index), max_steps=2, per_device_train_batch_size=2,
            report_to=[], save_strategy="no", use_cpu=True, learning_rate=1e-3, optim="sgd",
            remove_unused_columns=False, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Loss(model=one, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(tmp_path / str(index))
    assert_same_weights(models[1], models[0])
    first, second = (type(models[0]).from_pretrained(tmp_path / str(index)) for index in (0, 1))
    assert_same_weights(second, first)
    assert_same_weights(first, models[0], rtol=0)


def test_accelerators_prepare_and_clip(state):
    from accelerate import Accelerator

    models = [eager("chat"), put(eager("chat"), state)]
    for one in models:
        accelerator = Accelerator(cpu=True)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.02)
        prepared, optimizer = accelerator.prepare(one.train(), optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            accelerator.backward(run(prepared).square().mean())
            accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
            optimizer.step()
    assert_same_weights(models[1], models[0])


def test_hooks_and_flags_of_parameters_are_kept():
    built, seen = eager("chat"), []
    weight = built.model.language_model.layers[0].self_attn.q_proj.weight
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    weight.my_flag = "kept"
    report = accelerate(built)
    gradients(built.train())
    now = built.model.language_model.layers[0].self_attn.q_proj.weight
    assert now is weight and weight.my_flag == "kept" and len(seen) == 1 and seen[0] is weight
    report.undo()
    gradients(built)
    assert len(seen) == 2


def test_pruning_and_parametrizations_are_what_computes(state):
    from torch.nn.utils import parametrizations, prune

    outputs = []
    for one in (eager("chat"), put(eager("chat"), state)):
        layers = one.model.language_model.layers
        prune.l1_unstructured(layers[0].mlp.gate_proj, "weight", amount=0.5)
        parametrizations.weight_norm(layers[1].self_attn.k_proj)
        with torch.no_grad():
            outputs.append(run(one))
    close(*reversed(outputs))
