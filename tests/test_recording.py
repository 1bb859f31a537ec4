"""Recordings: the same operators in the same order, and what they leave out."""

import pytest
import torch
from torch import nn

from internvl_engine.recording import record


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


@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_of_what_changes_is_made_anew(inference):
    """`reshape` is a view by its schema, and a copy where it must be."""
    with torch.inference_mode(inference):  # whose tensors show `reshape` itself to a mode
        table = torch.zeros(2, 3)

    def function(x):
        table.view(6).copy_(x.view(6))
        repeated = table[:, None].expand(2, 2, 3)
        return repeated.reshape(4, 3), repeated.flatten(0, 1) + 0, table.contiguous().view(6)

    with torch.inference_mode(inference):
        run, _ = record(function, torch.ones(2, 3))
        x = torch.randn(2, 3)
        found = run(x)
        for ours, right in zip(found, function(x), strict=True):
            assert torch.equal(ours, right)
