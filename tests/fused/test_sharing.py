"""What layers leave for each other is right or is not taken: modes, changes in place, threads."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

from internvl_engine import accelerate, kernels
from internvl_engine.fused import FusedVisionLayer
from internvl_engine.fused.sharing import Handoff, Shared, counted

from models import VISION, model, pixels

IDS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 2, 0, 0]])
MODES = [torch.no_grad, torch.inference_mode]


def near(actual, expected):
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_what_layers_share_is_computed_once_a_pass_and_forgotten():
    shared, x, made = Shared(), torch.randn(2, 5), []

    def read(reader, x):
        return shared.get(x, lambda: made.append(reader) or len(made), reader)

    assert [read(name, x) for name in "abc"] == [1, 1, 1] and made == ["a"]
    assert [read(name, x) for name in "bac"] == [2, 2, 2]  # the next pass
    x.mul_(2)
    assert read("d", x) == 3  # another tensor by now
    assert read("e", x.clone()) == 4
    assert read("f", x) == 5
    with torch.enable_grad():
        assert read("g", x) == 6
    assert copy.deepcopy(shared)._known is None
    read("h", x)
    del x
    assert shared._known is None


@pytest.mark.parametrize("mode", MODES)
def test_what_counts_no_changes_is_not_shared(mode):
    shared, made = Shared(), []
    with mode():
        for x, once in ((torch.randn(2), mode is torch.no_grad), (counted(torch.randn, 2), True)):
            made.clear()
            for reader in "abc":
                shared.get(x, lambda: made.append(1), reader)
            assert len(made) == (1 if once else 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_handoff_serves_only_the_same_unchanged_tensor(mode):
    handoff = Handoff(nn.Identity())
    with mode():
        hidden, normed = counted(torch.zeros, 2), torch.ones(2)
        handoff.put(hidden, normed)
        assert handoff.take(hidden) is normed and handoff.take(hidden) is None
        handoff.put(hidden, normed)
        assert handoff.take(hidden.clone()) is None
        handoff.put(hidden, normed)
        hidden[0].add_(1)
        assert handoff.take(hidden) is None
        handoff.put(hidden, normed)
    with torch.enable_grad():
        assert not handoff.is_open and handoff.take(hidden) is None
    handoff.put(hidden, normed)
    for copied in (copy.deepcopy(handoff), pickle.loads(pickle.dumps(handoff))):
        assert copied._left is None


# (what is computed, the module that gives its states to the next, which output, their width)
BETWEEN = {
    "vision": (lambda m: m.vision_model.encoder(STATES)[0], "vision_model.encoder.layers.0", 48),
    "text": (lambda m: m.encode_text(IDS), "qllama.model.layers.1", 64),
    "last norm": (lambda m: m.encode_text(IDS), "qllama.model.layers.2", 64),
}
STATES = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", BETWEEN)
def test_who_changes_the_states_between_two_layers_is_heard(where, mode):
    run, name, width = BETWEEN[where]
    built = model()
    fused, steer = copy.deepcopy(built), torch.randn(width)  # no multiple: RMSNorm cancels that
    accelerate(fused)

    def in_place(module, args, output):
        (output[0] if isinstance(output, tuple) else output).add_(steer)

    with mode():
        plain = run(fused)
        for one in (fused, built):
            one.get_submodule(name).register_forward_hook(in_place)
        found = run(fused)
        near(found, run(built))
        assert (found - plain).norm() > 1e-2 * plain.norm()
        if where == "vision":  # Dynamo is slow
            torch._dynamo.reset()
            near(torch.compile(run, backend="eager", fullgraph=True)(fused), found)


@pytest.mark.parametrize("mode", MODES)
def test_who_calls_the_layers_himself_may_change_their_states(mode):
    built, direction = model(), torch.randn(48)
    fused, found = copy.deepcopy(built), []
    accelerate(fused)
    with mode():
        for one in (fused, built):
            states = STATES
            for layer in one.vision_model.encoder.layers:
                states = layer(states)
                states.add_(direction)
            found.append(states)
    near(*found)


@pytest.mark.parametrize("mode", MODES)
def test_norms_are_handed_on_where_nobody_looks(mode, monkeypatch):
    built, alone = model(vision_config=VISION | {"num_hidden_layers": 4}), []
    normalize = kernels.rms_norm
    accelerate(built)
    monkeypatch.setattr(
        kernels, "rms_norm", lambda x, *rest: alone.append(x.shape[-1]) or normalize(x, *rest)
    )
    with mode():
        states = built.vision_model(pixels(2)).last_hidden_state
        assert alone == [48]  # the first layer's
        alone.clear()
        built.encode_text(IDS)
        assert alone == [64]  # the last norm is the last layer's
        built.get_image_features(pixels(2))
    assert alone.count(48) == 1 + 1  # the image's, once for all layers that read it
    assert not states.is_inference()
    assert isinstance(built.vision_model.encoder.layers[0], FusedVisionLayer)


@pytest.mark.parametrize("mode", MODES)
def test_threads_that_call_one_model_get_their_own(mode):
    built = model(vision_config=VISION | {"num_hidden_layers": 4})
    fused, wrong = copy.deepcopy(built), []
    accelerate(fused)
    images = [pixels(2) for _ in range(3)]
    with mode():
        expected = [built.get_image_features(x)[1] for x in images]

    def work(index):
        with mode():
            for _ in range(25):
                try:
                    found = fused.get_image_features(images[index])[1]
                    near(found, expected[index])
                except Exception as error:  # noqa: BLE001  told by the test's own thread
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong, wrong[0]
