"""Where a text ends, and a warning where ids end in the wrong place."""

import warnings

import pytest
import torch

from internvl_engine.modeling.text_inputs import last_tokens

RIGHT = torch.tensor([[1, 7, 8, 2, 0], [1, 7, 8, 9, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
LEFT = torch.tensor([[0, 1, 7, 8, 2], [1, 7, 8, 9, 2]])
LEFT_MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
UNKNOWN = torch.tensor([[1, 0, 8, 2, 0]])  # an unknown piece has the id of the padding


@pytest.mark.parametrize(
    "ids, mask, last",
    [
        (RIGHT, None, [3, 4]),
        (RIGHT, MASK, [3, 4]),
        (RIGHT, MASK.bool(), [3, 4]),
        (LEFT, LEFT_MASK, [4, 4]),
        (UNKNOWN, torch.tensor([[1, 1, 1, 1, 0]]), [3]),
        (RIGHT[:0], None, []),
    ],
)
def test_the_last_token_is_found_silently(ids, mask, last):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, places = last_tokens(ids, mask, 2)
    assert places.tolist() == last
    assert torch.equal(found.long(), (ids > 0).long() if mask is None else mask.long())


@pytest.mark.parametrize(
    "ids, mask, message",
    [
        (LEFT, None, "an id 0 stands before another token"),
        (UNKNOWN, None, "an id 0 stands before another token"),
        (
            RIGHT[:, :4],
            None,
            "text 1 ends in id 9 at position 3, not in the end",
        ),
        (RIGHT, torch.ones_like(RIGHT), "text 0 ends in id 0 at position 4"),
        (RIGHT, torch.tensor([[1, 1, 1, 0, 0], [1] * 5]), "text 0 ends in id 8 at position 2"),
    ],
)
def test_a_wrong_end_is_warned_of(ids, mask, message):
    with pytest.warns(UserWarning, match=message):
        last_tokens(ids, mask, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if "id 0 stands" not in message:
            last_tokens(ids, mask, None)
            last_tokens(ids, mask, [2, 9, 8, 0])  # configurations may list several ends


def test_compiling_looks_at_no_value():
    """One graph for every batch, and no warning: it would break the graph."""
    shapes = []

    def count(graph, inputs):
        shapes.append(len(inputs))
        return graph.forward

    compiled = torch.compile(last_tokens, backend=count, dynamic=True, fullgraph=True)
    for ids in (RIGHT, RIGHT[:, :4].contiguous(), torch.cat([RIGHT] * 3)):
        mask, last = compiled(ids, None, 2)
        assert torch.equal(last, (ids > 0).sum(1) - 1)
    assert len(shapes) == 1
