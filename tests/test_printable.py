"""What a message may show of a text from outside."""

from pathlib import Path

import pytest

from internvl_engine.printable import printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("photo.jpg", "photo.jpg"),
        ("熊猫 – naïve\u3000\u200d", "熊猫 – naïve\u3000\u200d"),  # as it is in any language
        ("a\x1b[31mb\nc\x07", r"a\x1b[31mb\nc\x07"),
        ("moc\u202egpj.exe", r"moc\u202egpj.exe"),
        ("\udce9.jpg", r"\udce9.jpg"),
        (Path("a\tb"), r"a\tb"),
        (b"caf\xc3\xa9.jpg", "café.jpg"),
        (7, "7"),
    ],
)
def test_control_characters_are_escaped_and_letters_are_not(text, shown):
    assert printable(text) == shown


def test_long_texts_lose_their_middle():
    text = "data:image/png;base64," + "A" * 3_000_000 + "end"
    assert len(printable(text)) == 120
    assert printable(text).startswith("data:image/png;base64,AAA") and printable(text)[-3:] == "end"
    assert printable(text, None) == text
