"""Published checkpoints for the tests of loading, written once."""

import pytest
from published_layout import write_published

from golden_vectors import Golden, load_golden


@pytest.fixture(scope="session")
def golden_g() -> Golden:
    return load_golden("encode_image_G")


@pytest.fixture(scope="session")
def published(tmp_path_factory, golden_g):
    """A published directory in three shards; not to be changed."""
    return write_published(tmp_path_factory.mktemp("published"), golden_g)
