"""The loops that carry norms from layer to layer: who looks in between gets the eager loop."""

import copy
import sys
import threading

import pytest
import torch

from internvl_engine import accelerate, kernels
from internvl_engine.fused import FusedVisionLayer

from models import VISION, model, pixels

IDS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 2, 0, 0]])
MODES = [torch.no_grad, torch.inference_mode]


def near(actual, expected):
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


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


@pytest.fixture
def norms(monkeypatch):
    """The widths of the norms that are computed by themselves."""
    alone, normalize = [], kernels.rms_norm
    monkeypatch.setattr(
        kernels, "rms_norm", lambda x, *rest: alone.append(x.shape[-1]) or normalize(x, *rest)
    )
    return alone


@pytest.mark.parametrize("mode", MODES)
def test_norms_are_carried_where_nobody_looks(mode, norms):
    built = model(vision_config=VISION | {"num_hidden_layers": 4})
    accelerate(built)
    with mode():
        built.vision_model(pixels(2))
        assert norms == [48]  # the first layer's
        norms.clear()
        built.encode_text(IDS)
        assert norms == [64]
    assert isinstance(built.vision_model.encoder.layers[0], FusedVisionLayer)


WATCHED = {
    "gradients": lambda m: torch.enable_grad()(m.vision_model)(pixels(2)),
    "a hook": lambda m: (
        m.vision_model.encoder.layers[0].register_forward_hook(lambda *_: None)
        and m.vision_model(pixels(2))
    ),
}


@pytest.mark.parametrize("how", WATCHED)
@torch.no_grad()
def test_whoever_looks_gets_every_layer_by_itself(how, norms):
    built = model(vision_config=VISION | {"num_hidden_layers": 4})
    accelerate(built)
    WATCHED[how](built)
    assert norms == [48] * 4


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("mode", MODES)
def test_norms_are_carried_past_whoever_takes_all_states(mode, norm, monkeypatch):
    """As chat models with select_layer do."""
    built, x = model(vision_config=VISION | {"norm_type": norm, "num_hidden_layers": 4}), pixels(2)
    fused, alone, operator = copy.deepcopy(built), [], getattr(kernels, norm)
    accelerate(fused, strict=True)
    monkeypatch.setattr(kernels, norm, lambda x, *rest: alone.append(1) or operator(x, *rest))
    with mode():
        expected = built.vision_model(x, output_hidden_states=True)
        found = fused.vision_model(x, output_hidden_states=True)
        assert len(alone) == 1 and len(found.hidden_states) == 4 + 1
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            near(ours, theirs)
        assert fused.vision_model(x).hidden_states is None
        pair = fused.vision_model.encoder(STATES, output_hidden_states=True, return_dict=False)
        near(pair[1][-2], built.vision_model.encoder(STATES, True)[1][-2])
        fused.vision_model.encoder.config.output_hidden_states = True
        assert len(fused.vision_model.encoder(STATES).hidden_states) == 4 + 1


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
