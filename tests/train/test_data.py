"""Captioned pictures: what is read, what is skipped, and what a step draws."""

import gzip
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


RED = picture("red")


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


def write_shard(path, files, others=()):
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in others:
            archive.addfile(info)


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
    assert pictures.num_without_caption == 3  # yellow.png stands in no line
    assert pictures.num_without_picture == 3


def test_lines_whose_picture_is_elsewhere_are_counted(tmp_path):
    (tmp_path / "outside.png").write_bytes(picture("red"))
    names = ["none.png", "../outside.png", str(tmp_path / "outside.png"), "red.png", "red.png"]
    rows = [{"file_name": name, "text": f"{index}"} for index, name in enumerate(names)]
    folder = write_folder(tmp_path / "pictures", rows)
    (folder / "red.depth.png").write_bytes(RED)
    pictures = open_pictures(folder)
    assert (pictures.names, pictures.captions) == (["red.png"] * 2, ["3", "4"])
    assert (pictures.num_without_caption, pictures.num_without_picture) == (3, 3)


def test_tables_of_captions(tmp_path):
    folder = write_folder(tmp_path / "pictures", [])
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\nred.png,red square\nblue.png,\n")
    pictures = open_pictures(folder)
    assert captions_and_colours(pictures) == [("red square", (255, 0, 0))]
    assert pictures.num_without_caption == 3


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_shard_in(folder, files):
    write_shard(folder / "0.tar", files)


#: Name: (files, captions that are found, pictures without one).
PAIRS = {
    "dots": (
        {"v1.0.png": RED, "v1.0.txt": b"a", "v1.1.png": RED, "v1.png": RED, "v1.txt": b"b"},
        ["a", "b"],
        1,
    ),
    "folders with dots": ({"v1.0/x.png": RED, "v1.0/x.txt": b"a", "v1.png": RED}, ["a"], 1),
    "companions": (
        {"1.png": RED, "1.txt": b"a", "1.seg.png": RED, "1.depth.0.png": RED, "1.webp": RED},
        ["a"],
        0,
    ),
    "companions of a picture without caption": ({"1.png": RED, "1.seg.png": RED}, [], 1),
    "a companion with its own caption": (
        {"1.png": RED, "1.txt": b"a", "1.b.png": RED, "1.b.txt": b"b"},
        ["a", "b"],
        0,
    ),
    "capitals": ({"A.PNG": RED, "A.TXT": b"a", "b.Jpg": RED, "b.Json": b"{}"}, ["a"], 1),
    "empty captions": (
        {"1.png": RED, "1.txt": b"", "2.png": RED, "2.txt": b" \n\t", "3.png": RED, "3.txt": b"c"},
        ["c"],
        2,
    ),
    "an empty caption beside facts": (
        {"1.png": RED, "1.txt": b"\n", "1.json": b'{"caption": "facts"}'},
        ["facts"],
        0,
    ),
    "facts without caption": (
        {f"{index}.png": RED for index in range(6)}
        | {"0.json": b"null", "1.json": b"[]", "2.json": b"{", "3.json": b'{"caption": " "}'}
        | {"4.json": b'{"caption": "half an emoji \\ud83d"}'}
        | {"5.json": b"[" * 10_000},
        [],
        6,
    ),
    "marks of encodings": (
        {
            "1.png": RED,
            "1.txt": "é".encode("utf-8-sig"),
            "2.png": RED,
            "2.txt": "ü".encode("utf-16"),
        }
        | {"3.png": RED, "3.json": '{"caption": "ñ"}'.encode("utf-8-sig")},
        ["é", "ñ", "ü"],
        0,
    ),
    "other endings": (
        {
            "1.jfif": RED,
            "1.txt": b"a",
            "2.TIFF": RED,
            "2.caption": b"b",
            "3.gif": RED,
            "3.txt": b"c",
        }
        | {"4.bmp": RED, "5.avif": RED, "6.heic": RED},
        ["a", "b", "c"],
        3,
    ),
    "what programs leave": (
        {"1.png": RED, "1.txt": b"a", "._1.png": b"", "._1.txt": b"", "__MACOSX/2.png": RED}
        | {".DS_Store": b"", "Thumbs.db": b"", ".trash/3.png": RED, "README.txt": b"read"},
        ["a"],
        0,
    ),
}


@pytest.mark.parametrize("write", [write_files, write_shard_in])
@pytest.mark.parametrize(("files", "captions", "num_without"), PAIRS.values(), ids=PAIRS.keys())
def test_captions_beside_pictures(tmp_path, write, files, captions, num_without):
    write(tmp_path, files)
    if not captions:
        with pytest.raises(EncacheError, match=f"no picture with a caption .{num_without} without"):
            open_pictures(tmp_path)
        return
    pictures = open_pictures(tmp_path)
    assert sorted(captions_and_colours(pictures)) == [(text, (255, 0, 0)) for text in captions]
    assert pictures.num_without_caption == num_without


@pytest.mark.parametrize("write", [write_files, write_shard_in])
def test_a_caption_that_is_no_text_is_named(tmp_path, write):
    write(tmp_path, {"1.png": RED, "1.txt": b"one\ncaf\xe9"})
    with pytest.raises(EncacheError, match=r"1.txt is not UTF-8 text \(line 2"):
        open_pictures(tmp_path)


def test_samples_lie_in_one_order_wherever_they_were_written(tmp_path):
    names = ["b", "a.b", "a/c", "B", "é", "10", "9"]
    prints = []
    for place in ("first", "second"):
        names.reverse()
        write_files(tmp_path / place, {f"{name}.png": RED for name in names})
        write_files(tmp_path / place, {f"{name}.txt": name.encode() for name in names})
        prints.append(open_pictures(tmp_path / place).fingerprint)
    assert prints[0] == prints[1]


def test_shards_of_other_tools(tmp_path):
    """GNU tar writes ./ before names, folders have members of their own and may hold dots."""
    files = {"./v1.0/a.png": picture("red"), "./v1.0/a.txt": b"red", "./b.png": picture("blue")}
    files["./b.json"] = b'{"caption": null}'
    folder = tarfile.TarInfo("./v2.jpg")
    folder.type = tarfile.DIRTYPE
    write_shard(tmp_path / "0.tar", files, [folder])
    pictures = open_pictures(tmp_path)
    assert pictures.names == ["0.tar:v1.0/a.png"]
    assert captions_and_colours(pictures) == [("red", (255, 0, 0))]
    assert pictures.num_without_caption == 1


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_in_shards(tmp_path):
    files = {"store/x": picture("red"), "store/y": b"y", "1.png": picture("blue"), "1.txt": b"one"}
    links = [link("2.png", "1.png", tarfile.LNKTYPE), link("2.txt", "store/y", tarfile.LNKTYPE)]
    links += [link("1.png", "1.png", tarfile.LNKTYPE)]  # GNU tar's, for a name given twice
    links += [link("a/3.png", "../store/x"), link("a/3.txt", "../2.txt")]
    links += [link("4.png", "/elsewhere/4.png"), link("4.txt", "1.txt"), link("5.png", "none.png")]
    write_shard(tmp_path / "0.tar", files, links)
    pictures = open_pictures(tmp_path)
    assert pictures.num_without_caption == 1
    assert sorted(zip(pictures.names, pictures.captions, strict=True)) == [
        ("0.tar:1.png", "one"),
        ("0.tar:2.png", "y"),
        ("0.tar:4.png", "one"),
        ("0.tar:a/3.png", "y"),
    ]
    colours = dict.fromkeys(pictures.names)
    for index, name in enumerate(pictures.names):
        if name == "0.tar:4.png":
            with pytest.raises(UnreadablePictureError):
                pictures.read(index, torch.Generator())
        else:
            colours[name] = pictures.read(index, torch.Generator())[0].getpixel((3, 3))
    assert colours["0.tar:1.png"] == colours["0.tar:2.png"] == (0, 0, 255)
    assert colours["0.tar:a/3.png"] == (255, 0, 0)


def test_of_members_of_one_name_the_last_counts(tmp_path):
    write_shard(tmp_path / "0.tar", {"1.0.png": picture("red"), "1.0.txt": b"old"})
    with tarfile.open(tmp_path / "0.tar", "a") as archive:
        for name, content in {"1.0.png": picture("blue"), "1.0.txt": b"new"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    pictures = open_pictures(tmp_path)
    assert captions_and_colours(pictures) == [("new", (0, 0, 255))]


def test_names_in_another_encoding(tmp_path):
    write_shard(tmp_path / "0.tar", {"caf\udce9.png": RED, "caf\udce9.txt": b"a"})
    pictures = open_pictures(tmp_path)
    assert captions_and_colours(pictures) == [("a", (255, 0, 0))]
    assert len(pictures.fingerprint) == 64


def test_sparse_members_are_not_read_wrongly(tmp_path):
    """As GNU tar writes them with --sparse: what lies in the archive is a list of pieces first."""
    info = tarfile.TarInfo("1.png")
    info.size = 512 + len(RED)
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    info.pax_headers |= {"GNU.sparse.name": "1.png", "GNU.sparse.realsize": str(len(RED))}
    pieces = f"1\n0\n{len(RED)}\n".encode().ljust(512, b"\0")
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(pieces + RED))
        caption = tarfile.TarInfo("1.txt")
        caption.size = 1
        archive.addfile(caption, io.BytesIO(b"a"))
    pictures = open_pictures(tmp_path)
    assert pictures.names == ["0.tar:1.png"]
    with pytest.raises(UnreadablePictureError):
        pictures.read(0, torch.Generator())


def pack_compressed(folder, shard):
    (folder / "1.tar.gz").write_bytes(gzip.compress(shard))


def cut(folder, shard):
    (folder / "1.tar").write_bytes(shard[:-10_500])


def damage(folder, shard):
    (folder / "1.tar").write_bytes(shard[:1024] + b"x" * 512 + shard[1536:])


def put_together(folder, shard):
    (folder / "1.tar").write_bytes(shard + shard)


@pytest.mark.parametrize("prepare", [pack_compressed, cut, damage, put_together])
def test_shards_that_would_be_read_in_part_are_refused(tmp_path, prepare):
    write_shard(
        tmp_path / "0.TAR", {"1.png": RED, "1.txt": b"a", "2.png": RED, "2.txt": b"b" * 900}
    )
    prepare(tmp_path, (tmp_path / "0.TAR").read_bytes())
    with pytest.raises(EncacheError, match=r"1.tar(.gz)? is not a complete, uncompressed tar file"):
        open_pictures(tmp_path)


def test_what_a_mac_leaves_beside_shards(tmp_path):
    write_shard(tmp_path / "0.tar", {"1.png": RED, "1.txt": b"a"})
    (tmp_path / "._0.tar").write_bytes(b"double")
    assert open_pictures(tmp_path).names == ["0.tar:1.png"]


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
