"""Captures: when they are made and dropped, and what a graph owns."""

import weakref

import pytest
import torch
from torch import nn

from internvl_engine import capture
from internvl_engine.capture import Captured, HostReadError, weights_of


def test_shapes_and_keys_have_their_own_captures_and_the_oldest_goes():
    calls = []

    def function(x):
        calls.append(x.shape)
        return x + 1

    captured = Captured(function, limit=2, replay=True)
    for size in (1, 2, 1, 2):
        assert captured(torch.zeros(size)).tolist() == [1.0] * size
    assert len(calls) == len(captured) == 2
    captured(torch.zeros(1), key="other")  # 2 was used after 1, so 1 goes
    captured(torch.zeros(2))
    assert len(calls) == 3
    captured(torch.zeros(1))
    assert len(calls) == 4 and len(captured) == 2


def test_without_replay_the_cpu_calls_the_function():
    x = torch.zeros(2, requires_grad=True)
    captured = Captured(lambda x: x * 2)
    assert not captured(x).requires_grad and len(captured) == 0


@pytest.mark.parametrize(
    "function",
    [lambda x: x * int(x.max()), lambda x: x if x.sum() > 0 else -x, lambda x: x[x > 0]],
    ids=["item", "branch", "shape"],
)
def test_reading_a_value_on_the_host_is_an_error(function):
    with pytest.raises(HostReadError):
        Captured(function, replay=True)(torch.ones(2))


def test_captures_are_dropped_where_weights_were_replaced():
    linear = nn.Linear(2, 2)
    captured = Captured(linear, replay=True)
    x = torch.randn(1, 2)
    for change in (
        lambda: None,
        lambda: linear.weight.data.zero_(),
        lambda: setattr(linear, "weight", nn.Parameter(torch.ones(2, 2))),
        lambda: linear.register_forward_hook(lambda *_: None),
    ):
        captured.keep(weights_of(linear))
        captured(x)
        change()
        captured.keep(weights_of(linear))
        torch.testing.assert_close(captured(x), linear(x), rtol=0, atol=0)


def test_a_graph_reads_and_writes_tensors_of_its_own(monkeypatch):
    """With stand-ins for the driver: a graph here is the function, run on its own inputs."""
    events = []

    class Graph:
        def replay(self):
            events.append("replay")
            self.outputs.copy_(self.run())

    class Region:
        def __init__(self, graph, pool):
            events.append(f"capture in {pool}")

        __enter__ = __exit__ = lambda self, *_: None

    tables, weight = [torch.ones(2)], nn.Parameter(torch.ones(2))

    def function(x):
        tables[0].add_(0)  # read and written
        return (x + tables[0].view(2).clone()) * weight * 2 - 2 * tables[0]

    table = weakref.ref(tables[0])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Region)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: type("S", (), {"wait_stream": id})())
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: torch.no_grad())
    graph = capture._Graph(function, [torch.ones(2)], pool="pool")
    graph.graph.outputs, graph.graph.run = graph.outputs, lambda: function(*graph.inputs)
    x = torch.tensor([3.0, 4.0])
    assert graph(x).tolist() == [6.0, 8.0] and graph(x) is graph.outputs
    assert graph.inputs[0] is not x
    assert [each is tables[0] for each in graph.read] == [True]
    tables[0] = None
    assert table() is not None  # the graph reads it still
    assert events == ["capture in pool", "replay", "replay"]
