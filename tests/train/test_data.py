"""Captioned pictures: what is read, what is skipped, and what a step draws."""

import io
import json
import tarfile
import zlib

import pytest
import torch
from PIL import Image

from encache.errors import EncacheError
from encache.model.pictures import UnreadablePictureError, crop_to
from encache.train import data
from encache.train.data import Draws, Steps, open_pictures

COLOURS = ("red", "green", "blue", "yellow")
DRAWS = Draws(resolution=16, latent_shape=(4, 8, 8), num_timesteps=1000, delta_max=10)


def picture(colour, size=(40, 24)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def write_folder(folder, rows):
    folder.mkdir(exist_ok=True)
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(picture(colour))
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path):
    rows = [{"file_name": f"{colour}.png", "text": f"{colour} square"} for colour in COLOURS]
    return write_folder(tmp_path / "pictures", rows)


def write_shard(path, files):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    red, green = picture("red"), picture("green")
    first = {"00000.png": red, "00000.txt": b"red square", "00000.json": b'{"caption": "other"}'}
    second = {
        "00001.png": green,
        "00001.json": json.dumps({"caption": "green square"}).encode(),
        "00002.png": red,
    }
    write_shard(folder / "00000.tar", first)
    write_shard(folder / "00001.tar", second)
    return folder


def captions_and_colours(pictures):
    read = [pictures.read(index, torch.Generator()) for index in range(len(pictures.names))]
    return [(caption, image.getpixel((3, 3))) for image, caption in read]


def test_image_folder(folder):
    pictures = open_pictures(folder)
    assert captions_and_colours(pictures)[:2] == [
        ("red square", (255, 0, 0)),
        ("green square", (0, 128, 0)),
    ]


def test_shards(shards):
    pictures = open_pictures(shards)
    assert captions_and_colours(pictures) == [
        ("red square", (255, 0, 0)),
        ("green square", (0, 128, 0)),
    ]
    assert pictures.num_without_caption == 1


def test_missing_captions_are_counted(tmp_path):
    rows = [{"file_name": "red.png", "text": "red"}, {"file_name": "blue.png"}, "not json", "7"]
    rows += [{"file_name": 3, "text": "three"}, {"file_name": "green.png", "text": None}]
    pictures = open_pictures(write_folder(tmp_path / "pictures", rows))
    assert pictures.names == ["red.png"]
    assert pictures.num_without_caption == 5


def test_shards_of_other_tools(tmp_path):
    """GNU tar writes ./ before names, and folders may hold dots."""
    files = {"./v1.0/a.png": picture("red"), "./v1.0/a.txt": b"red", "./b.png": picture("blue")}
    files["./b.json"] = b'{"caption": null}'
    write_shard(tmp_path / "0.tar", files)
    pictures = open_pictures(tmp_path)
    assert pictures.names == ["0.tar:v1.0/a", "0.tar:b"]
    assert pictures.read(0, torch.Generator())[1] == "red"
    with pytest.raises(ValueError, match="no caption"):
        pictures.read(1, torch.Generator())


def test_captions_are_part_of_the_fingerprint(tmp_path):
    prints = [
        open_pictures(
            write_folder(tmp_path / text, [{"file_name": "red.png", "text": text}])
        ).fingerprint
        for text in ("red", "blue")
    ]
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "is no training set"),
        (lambda folder: write_folder(folder, [{"file_name": "red.png"}]), r"none of its 1 is one"),
        (lambda folder: (folder / "0.tar").write_bytes(b"x" * 2000), "not a complete"),
    ],
)
def test_unusable_folders(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(EncacheError, match=message):
        open_pictures(tmp_path)


def with_broken_chunk(png):
    """The data torn in two chunks, of which the second has no name: Pillow raises SyntaxError."""
    start = png.index(b"IDAT") - 4
    length = int.from_bytes(png[start : start + 4], "big")
    body = png[start + 8 : start + 8 + length]
    chunk = b"IDAT" + body[: length // 2]
    first = (length // 2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return png[:start] + first + bytes(12) + body[length // 2 :]


@pytest.mark.parametrize("facts", [b"null", b"[]", b"{", b'{"caption": ""}'])
def test_facts_without_caption(tmp_path, facts):
    write_shard(tmp_path / "0.tar", {"0.png": picture("red"), "0.json": facts})
    with pytest.raises(UnreadablePictureError, match="caption"):
        open_pictures(tmp_path).read(0, torch.Generator())


def test_a_sliver_is_cropped_before_it_is_enlarged():
    sliver = Image.new("RGB", (1, 60_000), "red")  # whole, at this width it would take 90 GB
    assert crop_to(sliver, 512, 512).getpixel((511, 511)) == (255, 0, 0)


def test_unreadable_pictures_are_replaced_and_named(folder):
    (folder / "red.png").write_bytes(b"no picture")
    (folder / "green.png").write_bytes(picture("green")[:40])
    (folder / "blue.png").write_bytes(with_broken_chunk(picture("blue", (300, 300))))
    steps = Steps(open_pictures(folder), DRAWS, batch_size=16)
    examples = steps[0]
    assert {example.caption for example in examples} <= {"yellow square", ""}
    unreadable = {name for example in examples for name in example.unreadable}
    assert unreadable == {"red.png", "green.png", "blue.png"}
    (folder / "yellow.png").unlink()
    for num_workers in (0, 1):
        with pytest.raises(EncacheError, match=r"^20 pictures in a row could not be read, the"):
            next(data.batches(steps, 0, num_workers))


def test_an_arrangement_of_a_batch_does_not_change_it(folder):
    pictures = open_pictures(folder)
    whole = Steps(pictures, DRAWS, 8)[3]
    accumulated = Steps(pictures, DRAWS, 4, accumulation=2)
    spread = [Steps(pictures, DRAWS, 2, 2, process, 2) for process in range(2)]
    parts = [*accumulated[6], *accumulated[7]]
    shares = [*spread[0][6], *spread[1][6], *spread[0][7], *spread[1][7]]
    for other in (parts, shares):
        for left, right in zip(whole, other, strict=True):
            assert torch.equal(left.noise, right.noise)
            assert torch.equal(left.pixels, right.pixels)
            assert (left.caption, left.timestep, left.delta) == (
                right.caption,
                right.timestep,
                right.delta,
            )


def test_workers_read_the_same_batches(folder):
    steps = Steps(open_pictures(folder), DRAWS, 3, accumulation=2)
    alone = data.batches(steps, 5, 0)
    helped = data.batches(steps, 5, 2)
    for _ in range(3):
        left, right = next(alone), next(helped)
        assert all(torch.equal(a.noise, b.noise) for a, b in zip(left, right, strict=True))
    assert torch.equal(next(data.batches(steps, 5, 0))[0].noise, steps[10][0].noise)


def test_draws_cover_their_ranges(folder):
    steps = Steps(open_pictures(folder), DRAWS, 200)
    examples = steps[0]
    assert {example.delta for example in examples} == set(range(1, 11))
    assert min(example.timestep for example in examples) < 50
    assert max(example.timestep for example in examples) > 950
    assert 5 < sum(example.caption == "" for example in examples) < 40
    assert len({example.caption for example in examples}) == 5


def test_pixels_are_the_middle_of_the_picture():
    image = Image.new("RGB", (60, 20), "white")
    image.paste("black", (20, 0, 40, 20))
    pixels = data.to_pixels(image, 10, mirror=False)
    assert pixels.shape == (3, 10, 10)
    assert (pixels[:, :, 2:8] < -0.9).all()
    image = Image.new("RGB", (10, 10), "white")
    image.paste("black", (0, 0, 5, 10))
    left = data.to_pixels(image, 10, mirror=False)
    assert left[0, 0, 0] == -1
    assert torch.equal(data.to_pixels(image, 10, mirror=True), left.flip(-1))
