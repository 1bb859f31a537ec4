"""Fixtures of the tests of acceleration."""

import pytest
from company import STATES


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> str:
    """What became of a model: see company.put."""
    return request.param
