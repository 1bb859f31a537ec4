import pytest
from tiny_chat import published_folder, transformers_folder
from tokenizer_fixtures import (  # noqa: F401
    golden_text,
    published,
    tiny,
    tiny_model,
    tiny_unk,
    tokenizer,
)

from internvl_engine import VisionLanguageProcessor


@pytest.fixture(scope="session")
def processor(tmp_path_factory):
    """Of a published chat checkpoint."""
    return VisionLanguageProcessor.from_pretrained(
        published_folder(tmp_path_factory.mktemp("published"))
    )


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """Of a chat checkpoint in transformers' layout."""
    return VisionLanguageProcessor.from_pretrained(
        transformers_folder(tmp_path_factory.mktemp("foreign"))
    )
