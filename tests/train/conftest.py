from tokenizer_fixtures import (  # noqa: F401
    golden_text,
    published,
    tiny,
    tiny_model,
    tiny_unk,
    tokenizer,
)
