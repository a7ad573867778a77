"""Files that outlive a power failure, and text files as people's editors write them."""

import os

import pytest

from encache.errors import EncacheError
from encache.files import decode_text, read_lines, read_text, write_atomically, write_new

MARKS = {"utf-8": b"", "utf-8-sig": b"", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


@pytest.mark.parametrize(("encoding", "mark"), MARKS.items())
@pytest.mark.parametrize("text", ["", "a café", "snow ☃, 🦊", "one\r\ntwo"])
def test_the_mark_of_an_encoding_is_no_text(tmp_path, encoding, mark, text):
    path = tmp_path / "text"
    path.write_bytes(mark + text.encode(encoding))
    assert read_text(path) == text


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_where_an_editor_ends_them(tmp_path, end):
    wanted = [f"before{between}after" for between in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    path = tmp_path / "prompts.txt"
    path.write_bytes(end.join(["", *wanted, "  spaced ", " ", ""]).encode("utf-8-sig"))
    assert read_lines(path) == [*wanted, "spaced"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ntwo\ncaf\xe9\n", r"name is not UTF-8 text \(line 3: "),
        (b"\xef\xbb\xbfone\ncaf\xe9", r"name is not UTF-8 text \(line 2: "),
        (b"\xff\xfea\0\n\0b", r"name is not UTF-8 text \(line 2: "),
        ("café".encode("utf-16-le"), "name is not UTF-8 text"),
        ("cafe".encode("utf-16-be"), "zero bytes"),
        ("cafe".encode("utf-32"), "zero bytes"),
        (b"GIF89a\1\0\1\0", "zero bytes"),
    ],
)
def test_what_is_no_text(content, message):
    with pytest.raises(EncacheError, match=message):
        decode_text(content, "name")


@pytest.mark.parametrize("write", [write_new, write_atomically])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, write):
    path, flushed = tmp_path / "file", []

    def fsync(descriptor):
        assert not path.exists()
        flushed.append(os.pread(descriptor, 99, 0))

    monkeypatch.setattr(os, "fsync", fsync)
    write(path, b"content")
    assert path.read_bytes() == b"content"
    assert flushed == [b"content"]
    assert [*tmp_path.iterdir()] == [path]
