"""Files of labels as people save them."""

import pytest
import typer

from internvl_engine.cli.labels import read_labels


@pytest.mark.parametrize(
    "content, labels",
    [
        (b"cat\ndog\n", ["cat", "dog"]),
        (b"cat\r\n\r\ndog\r\ncat", ["cat", "", "dog", "cat"]),
        (b"cat\rdog\r", ["cat", "dog"]),
        (b"\n\ncat\n\n", ["", "", "cat", ""]),
        ("\ufeffcat\ncafé\n".encode(), ["cat", "café"]),
        ("cat\nkatt\u2028er\x0b\n".encode(), ["cat", "katt\u2028er"]),  # lines end at \\n alone
        ("cat\r\ncafé\r\n".encode("utf-16"), ["cat", "café"]),
        ("cat\ncafé".encode("utf-16-be").join([b"\xfe\xff", b""]), ["cat", "café"]),
    ],
)
def test_lines_are_labels_in_order(tmp_path, content, labels):
    (tmp_path / "labels.txt").write_bytes(content)
    assert read_labels([f"@{tmp_path / 'labels.txt'}"]) == labels
    assert read_labels(["a, b,,c", f"@{tmp_path / 'labels.txt'}"]) == ["a", "b", "c", *labels]


@pytest.mark.parametrize(
    "content, message",
    [
        ("cat\ncafé\n".encode("cp1252"), "is not UTF-8: byte 0xe9 in line 2; save it as UTF-8"),
        ("cat\n".encode("utf-16-le"), "is not text in UTF-8"),
        (b"\xff\xfec", "is not UTF-16"),
    ],
)
def test_other_encodings_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"labels.txt {message}"):
        read_labels([f"@{tmp_path / 'labels.txt'}"])


def test_nothing_is_no_label(tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"\n\n")
    for given in ([" , "], [f"@{tmp_path / 'labels.txt'}"]):
        with pytest.raises(typer.BadParameter, match="no label"):
            read_labels(given)
    with pytest.raises(FileNotFoundError, match="absent.txt"):
        read_labels(["@absent.txt"])
