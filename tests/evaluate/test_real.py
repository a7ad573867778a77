"""Which pictures of a folder count as real ones, and what is made of them."""

import numpy as np
import pytest
from PIL import Image

from encache.errors import EncacheError
from encache.evaluate.extractors import Extracted
from encache.evaluate.real import read_real
from encache.evaluate.store import Store


class MeanColour:
    name = "mean colour"

    def __call__(self, pictures):
        return Extracted(pictures.mean((2, 3)), None)


def read(folder, tmp_path):
    return read_real(folder, MeanColour(), (8, 8), Store(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "real"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.JPG", "c.tiff", "sub/d.jfif", "sub/e.bmp", "f.gif"]):
        form = {"jfif": "JPEG", "JPG": "JPEG"}.get(name.rpartition(".")[2])
        Image.new("L", (9, 9), 40 * index).save(folder / name, form)
    return folder


def test_all_that_are_pictures_count_and_nothing_else(folder, tmp_path):
    (folder / "._a.png").write_bytes(b"double")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_bytes(b"double")
    (folder / "folder.png").mkdir()
    (folder / "g.png").symlink_to(tmp_path / "gone.png")
    (folder / "h.heic").write_bytes(b"no picture")
    real = read(folder, tmp_path)
    assert real.unreadable == ("g.png", "h.heic")
    levels = np.array([0, 40, 80, 200, 120, 160]) / 255
    np.testing.assert_allclose(real.features[:, 0], levels, atol=0.02)
    assert real.captions is None


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", 'file_name,text\n.\\a.png,"red, round"\nsub\\d.jfif,blue\n'),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "red, round"}\n'
            '{"file_name": "sub\\\\d.jfif", "text": "blue"}\n',
        ),
    ],
)
def test_captions_find_their_pictures(folder, tmp_path, name, text, encoding):
    (folder / name).write_bytes(text.encode(encoding))
    assert read(folder, tmp_path).captions == ("red, round", "", "", "", "blue", "")


def test_a_listed_picture_needs_no_ending(folder, tmp_path):
    (folder / "b.JPG").rename(folder / "b")
    (folder / "metadata.jsonl").write_text('{"file_name": "b", "text": "dark"}\n')
    real = read(folder, tmp_path)
    assert (len(real.features), real.captions[1]) == (6, "dark")


def test_too_few_are_refused(folder, tmp_path):
    for name in ("a.png", "b.JPG", "c.tiff"):
        (folder / name).write_bytes(b"no picture")
    with pytest.raises(EncacheError, match="holds 3 readable pictures"):
        read(folder, tmp_path)
