"""Captures: recordings on the CPU, and what they bake in."""

import pytest
import torch
from torch import nn

from internvl_engine import capture
from internvl_engine.capture import Captured, HostReadError, record, weights_of


def test_a_recording_computes_what_the_function_does():
    weight, table = torch.randn(4, 3), torch.zeros(5, 3)

    def function(x, rows):
        table.index_copy_(0, rows, x)  # written in place, as a cache
        y = torch.cat([x @ weight.T, table[rows, :1]], dim=1)
        a, b = y.chunk(2, dim=1)
        return {"sum": a.relu() + 0.5, "rest": (b, table)}

    rows = torch.tensor([0, 2])
    run, first = record(function, torch.ones(2, 3), rows)
    x, rows = torch.randn(2, 3), torch.tensor([4, 1])
    found = run(x, rows)
    torch.testing.assert_close(table[rows], x)
    wanted = function(x, rows)
    torch.testing.assert_close(found["sum"], wanted["sum"], rtol=0, atol=0)
    assert found["rest"][1] is table and first["rest"][1] is table
    torch.testing.assert_close(found["rest"][0], wanted["rest"][0], rtol=0, atol=0)


def test_a_recording_sees_new_values_in_the_weights():
    linear = nn.Linear(3, 2)
    run, _ = record(linear, torch.ones(1, 3))
    with torch.no_grad():
        linear.weight.mul_(3)
    x = torch.randn(1, 3)
    torch.testing.assert_close(run(x), linear(x), rtol=0, atol=0)
    assert not run(x).requires_grad


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


def test_what_nobody_reads_is_not_computed_again():
    ran = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ran.append(str(func))
            return func(*args, **(kwargs or {}))

    storage = torch.arange(6.0).view(2, 3)

    def function(x):
        x.exp()  # nobody reads it
        return x + storage[1].view(3)  # a view of what does not change

    run, _ = record(function, torch.zeros(3))
    x = torch.ones(3)
    with Count():
        found = run(x)
    assert found.tolist() == [4.0, 5.0, 6.0]
    assert ran == ["aten.add.Tensor"]


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

    def function(x):
        return x * 2

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
    assert events == ["capture in pool", "replay", "replay"]
