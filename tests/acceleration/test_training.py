"""Training an accelerated model: what is frozen stays, what is not moves as in the eager one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from company import (
    KINDS,
    PAIRS,
    assert_same_outputs,
    assert_same_weights,
    call,
    close,
    eager,
    gradients,
    put,
    run,
    step,
    tensor,
    trainable,
)
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from internvl_engine import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")


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
