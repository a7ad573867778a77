"""Pictures as cameras and programs write them, and what a folder of them holds."""

import io
import itertools
import json
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from encache.errors import EncacheError
from encache.model.pictures import (
    UnreadablePictureError,
    list_files,
    list_pictures,
    read_captions,
    read_picture,
)

WHITE = (255, 255, 255)
#: What older versions call unreadable.
SINCE_13 = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow")


def saved(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def read_pixels(content):
    """The picture's [H, W, 3] levels."""
    image = read_picture(io.BytesIO(content))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def assert_shows(content, *expected, tolerance=0):
    """The first pixels of the first row, up to a rounding."""
    shown = read_pixels(content)[0][: len(expected)]
    assert np.abs(shown - np.array(expected)).max() <= tolerance, shown.tolist()


def png(width, bits, colour_type, row, **chunks):
    """A PNG of one row, byte for byte: of more kinds than Pillow writes."""

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(name.encode(), body) for name, body in chunks.items())]
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(width, bits, photometric, row, sample_format=1, orientation=1, alpha=None):
    """A little-endian TIFF of one row, grey with or without a kind of alpha."""
    row += bytes(len(row) % 2)
    samples = 1 if alpha is None else 2
    entries = [(256, width), (257, 1), (258, *[bits] * samples), (259, 1), (262, photometric)]
    entries += [(273, 8), (274, orientation), (277, samples), (278, 1), (279, len(row))]
    entries += [(338, alpha)] * (samples - 1) + [(339, *[sample_format] * samples)]
    directory = b"".join(
        struct.pack(f"<HHI{len(values)}H", tag, 3, len(values), *values).ljust(12, b"\0")
        for tag, *values in entries
    )
    start = struct.pack("<2sHI", b"II", 42, 8 + len(row)) + row
    return start + struct.pack("<H", len(entries)) + directory + bytes(4)


def test_what_hides_under_transparency_is_not_seen():
    hidden = Image.new("RGBA", (2, 1), (200, 30, 60, 0))
    hidden.putpixel((1, 0), (0, 0, 0, 128))
    for form in ("PNG", "TIFF"):
        assert_shows(saved(hidden, form), WHITE, (127, 127, 127), tolerance=1)
    assert_shows(saved(hidden, "WEBP", lossless=True, exact=True), WHITE)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_alpha_beside_other_modes(mode):
    image = Image.new("RGB", (2, 1), (51, 51, 51)).convert(mode)
    alpha = Image.new("L", (2, 1), 0)
    alpha.putpixel((1, 0), 255)
    image.putalpha(alpha)
    assert image.mode == {"L": "LA", "P": "PA", "RGB": "RGBA"}[mode]
    assert_shows(saved(image, "TIFF"), WHITE, (51, 51, 51))


@pytest.mark.parametrize(("alpha", "level"), [pytest.param(1, 20, marks=SINCE_13), (2, 100)])
def test_grey_on_white_premultiplied_or_not(alpha, level):
    content = tiff(2, 8, 1, bytes([level, 51, 0, 0]), alpha=alpha)
    assert_shows(content, (224, 224, 224), WHITE, tolerance=1)


@pytest.mark.parametrize(
    ("bits", "colour_type", "row", "key", "other"),
    [
        (1, 0, b"\x80", b"\0\0", 255),
        (2, 0, b"\x10", b"\0\1", 0),
        (4, 0, b"\x05", b"\0\5", 0),
        (8, 0, b"\x07\x09", b"\0\x09", 7),
        (16, 0, b"\x40\x00\x40\x01", b"\x40\x01", 64),
        (8, 2, b"\7\7\7\1\2\3", b"\0\1\0\2\0\3", 7),
        (16, 2, b"\7\0" * 3 + b"\x80\x10" * 3, b"\x80\x10" * 3, 7),
    ],
)
def test_a_colour_that_counts_as_transparent(bits, colour_type, row, key, other):
    content = png(2, bits, colour_type, row, tRNS=key)
    assert_shows(content, (other,) * 3, WHITE, tolerance=1)
    assert_shows(png(2, bits, colour_type, row), (other,) * 3, tolerance=1)


def test_palettes_with_transparency():
    palette = bytes([255, 0, 0, 0, 255, 0])
    for key, second in ((b"\xff\x00", WHITE), (b"\xff\x80", (127, 255, 127))):
        content = png(2, 8, 3, b"\0\1", PLTE=palette, tRNS=key)
        assert_shows(content, (255, 0, 0), second, tolerance=1)
    image = Image.new("P", (2, 1), 1)
    image.putpalette(palette)
    image.putpixel((0, 0), 0)
    assert_shows(saved(image, "GIF", transparency=1), (255, 0, 0), WHITE)


@pytest.mark.parametrize(
    "content",
    [
        png(3, 16, 0, struct.pack(">3H", 0, 0x8080, 0xFFFF)),
        tiff(3, 16, 1, struct.pack("<3H", 0, 0x8080, 0xFFFF)),
        tiff(3, 16, 0, struct.pack("<3H", 0xFFFF, 0x7F7F, 0)),
        tiff(3, 12, 1, bytes([0x00, 0x08, 0x08, 0xFF, 0xF0])),
        b"P5 3 1 65535\n" + struct.pack(">3H", 0, 0x8080, 0xFFFF),
        b"P5 3 1 4095\n" + struct.pack(">3H", 0, 0x808, 0xFFF),
        saved(Image.fromarray(np.array([[0, 0x8080, 0xFFFF]], np.uint16)), "JPEG2000"),
    ],
)
def test_many_bits_are_scaled_not_clipped(content):
    assert_shows(content, (0, 0, 0), (128, 128, 128), WHITE, tolerance=1)


@pytest.mark.parametrize(
    "content",
    [
        tiff(2, 32, 1, struct.pack("<2I", 2**31, 2**32 - 1)),
        tiff(2, 16, 1, struct.pack("<2h", 100, -3), sample_format=2),
        tiff(2, 32, 1, struct.pack("<2f", 0.5, 1), sample_format=3),
        b"Pf\n2 1\n-1.0\n" + struct.pack("<2f", 0.5, 1),
        saved(Image.new("I", (1, 1), 70_000), "TIFF"),
    ],
)
def test_levels_without_an_agreed_white_are_unreadable(content):
    with pytest.raises(UnreadablePictureError):
        read_pixels(content)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.parametrize(("orientation", "corner"), [(3, (3, 2)), (6, (2, 0)), (8, (0, 3))])
def test_pictures_are_turned_as_the_camera_was_held(form, orientation, corner):
    image = Image.new("RGB", (64, 48), "white")
    image.paste("black", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_pixels(saved(image, form, exif=exif))
    column, row = corner
    assert pixels.shape[:2] == ((48, 64) if orientation == 3 else (64, 48))
    assert pixels[row * 16 + 8, column * 16 + 8].max() < 40
    assert (pixels < 128).mean() == pytest.approx(1 / 12, abs=0.02)


def test_a_16_bit_picture_is_turned():
    content = tiff(2, 16, 1, struct.pack("<2H", 0x4040, 0xFFFF), orientation=6)
    assert read_pixels(content)[:, :, 0].tolist() == [[64], [255]]


@pytest.mark.parametrize("exif", [b"junk", b"II", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff\x01"])
def test_damaged_exif_turns_nothing(exif):
    assert_shows(png(2, 8, 4, b"\7\xff\7\0", eXIf=exif), (7, 7, 7), WHITE)


def curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IHxx", 1, round(gamma * 256))


def xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def icc(space, connection="XYZ ", **tags):
    """A profile of version 2."""
    tags = {"wtpt": xyz((0.9642, 1, 0.8249)), **tags}
    offset = 132 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, body in tags.items():
        table += struct.pack(">4sII", name.encode(), offset + len(data), len(body))
        data += body
    header = struct.pack(">I4xI", offset + len(data), 0x02400000) + b"mntr"
    header += space.encode() + connection.encode() + bytes(12) + b"acsp"
    header += bytes(28) + xyz((0.9642, 1, 0.8249))[8:]
    return header.ljust(128, b"\0") + table + data


#: Rows are the primaries, adapted to D50.
SRGB = np.array([[0.4361, 0.2225, 0.0139], [0.3851, 0.7169, 0.0971], [0.1431, 0.0606, 0.7141]])
DISPLAY_P3 = np.array(
    [[0.5151, 0.2412, -0.0011], [0.292, 0.6922, 0.0419], [0.1571, 0.0666, 0.7841]]
)
ADOBE_RGB = np.array([[0.6097, 0.3111, 0.0195], [0.2053, 0.6257, 0.0609], [0.1492, 0.0632, 0.7446]])


def icc_rgb(primaries, gamma=2.2):
    columns = {f"{name}XYZ": xyz(row) for name, row in zip("rgb", primaries, strict=True)}
    return icc("RGB ", **columns, **{f"{name}TRC": curve(gamma) for name in "rgb"})


def to_srgb(levels, primaries, gamma=2.2):
    """What the levels look like in sRGB, by the definition of both spaces."""
    linear = (np.array(levels) / 255) ** gamma @ primaries @ np.linalg.inv(SRGB)
    linear = linear.clip(0, 1)
    encoded = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple((255 * encoded).round().astype(int))


@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_wide_colours_are_converted(primaries, form):
    colour = (100, 180, 90)
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    image = Image.new("RGB", (16, 16), colour)
    content = saved(image, form, icc_profile=icc_rgb(primaries), **options)
    expected = to_srgb(colour, primaries)
    assert np.abs(np.array(expected) - colour).max() > 15
    assert_shows(content, expected, tolerance=3)


def test_profiles_of_palettes_and_transparent_pictures():
    colour = (100, 180, 90)
    profile = icc_rgb(ADOBE_RGB)
    palette = Image.new("RGB", (2, 1), colour).quantize(2)
    assert_shows(saved(palette, icc_profile=profile), to_srgb(colour, ADOBE_RGB), tolerance=2)
    image = Image.new("RGBA", (2, 1), (*colour, 255))
    image.putpixel((1, 0), (9, 9, 9, 0))
    expected = (to_srgb(colour, ADOBE_RGB), WHITE)
    assert_shows(saved(image, icc_profile=profile), *expected, tolerance=2)


@pytest.mark.parametrize("profile", [icc("GRAY", kTRC=curve(1)), icc_rgb(SRGB, 1)])
@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_pictures_take_profiles_of_grey_and_of_rgb(profile, mode):
    image = Image.new(mode, (4, 4), 128 if mode == "L" else (128, 255))
    assert_shows(saved(image, icc_profile=profile), (188, 188, 188), tolerance=1)


def icc_cmyk():
    """Black ink is black, and any other on the white paper is the same middle grey."""
    levels = [
        0 if inks[3] else 128 if any(inks) else 255 for inks in itertools.product((0, 1), repeat=4)
    ]
    table = b"".join(bytes([level, 128, 128]) for level in levels)
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    ramps = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + 4 * ramps + table + 3 * ramps
    return icc("CMYK", "Lab ", A2B0=lut)


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_ink(form):
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert_shows(saved(image, form), (0, 255, 255), tolerance=2)
    assert_shows(saved(image, form, icc_profile=icc_cmyk()), (119, 119, 119), tolerance=2)
    paper = Image.new("CMYK", (16, 16), 0)
    assert_shows(saved(paper, form, icc_profile=icc_cmyk()), WHITE, tolerance=2)


@pytest.mark.parametrize(
    "profile", [b"no profile", icc_rgb(ADOBE_RGB)[:300], icc_cmyk(), icc("GRAY", kTRC=curve(1))]
)
def test_profiles_that_do_not_fit_are_ignored(profile):
    image = Image.new("RGBA", (2, 1), (10, 200, 90, 255))
    image.putpixel((1, 0), (10, 200, 90, 0))
    assert_shows(saved(image, icc_profile=profile), (10, 200, 90), WHITE)


@pytest.mark.parametrize(
    ("mode", "colour"),
    [
        ("1", 255),
        ("L", 255),
        ("LAB", (255, 128, 128)),
        pytest.param("YCbCr", (255, 128, 128), marks=SINCE_13),
    ],
)
def test_other_modes(mode, colour):
    assert_shows(saved(Image.new(mode, (16, 16), colour), "TIFF"), WHITE, tolerance=2)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(form):
    frames = [Image.new("RGBA", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].paste((0, 0, 0, 0), (2, 0, 6, 8))
    options = {"lossless": True} if form == "WEBP" else {}
    content = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert_shows(content, *[(255, 0, 0)] * 2, *[WHITE] * 4, *[(255, 0, 0)] * 2)


@pytest.mark.parametrize(
    ("form", "start", "stop"),
    [("AVIF", 81, 85), ("DDS", 80, 84)],
)
def test_damaged_pictures_are_unreadable_and_nothing_worse(form, start, stop):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    try:
        content = bytearray(saved(Image.fromarray(noise), form))
    except KeyError:
        pytest.skip(f"this Pillow writes no {form}")
    content[start:stop] = bytes(len(content[start:stop]))
    with pytest.raises(UnreadablePictureError):
        read_pixels(bytes(content))


def test_files_that_a_person_would_count(tmp_path):
    names = ["b.PNG", "a.jpg", "a.txt", "c/d.tiff", "c.d/e.jfif", "._a.jpg", ".hidden/f.jpg"]
    names += ["__MACOSX/c/d.tiff", "c/.DS_Store", "Thumbs.db", "@eaDir/a.jpg/thumb.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert list_files(tmp_path) == sorted([*names[:5], "Thumbs.db"])
    assert list_pictures(tmp_path) == ["a.jpg", "b.PNG", "c.d/e.jfif", "c/d.tiff"]


def test_linked_folders_are_looked_into_once(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "inner").mkdir(parents=True)
    (elsewhere / "inner" / "a.jpg").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "one").symlink_to(elsewhere)
    (folder / "two").symlink_to(elsewhere / "inner")
    (elsewhere / "inner" / "up").symlink_to(folder)
    assert list_files(folder) == ["one/inner/a.jpg"]


def write_metadata(folder, text, encoding="utf-8", name="metadata.jsonl"):
    for picture in ("a.png", "sub/b.png"):
        (folder / picture).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / picture)
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_captions_by_any_editor(tmp_path, encoding, end):
    lines = [
        '{"file_name": "a.png", "text": "café\u2028next\x85line"}',
        '{"file_name": "sub/b.png", "text": "b"}',
    ]
    path = write_metadata(tmp_path, end.join(lines) + end, encoding)
    assert read_captions(path) == ([("a.png", "café\u2028next\x85line"), ("sub/b.png", "b")], 0)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_a_table(tmp_path, encoding):
    text = 'file_name,text\r\na.png,"red, ""and""\nround"\r\nsub\\b.png,\r\nnone.png,c\r\n'
    path = write_metadata(tmp_path, text, encoding, "metadata.csv")
    assert read_captions(path) == ([("a.png", 'red, "and"\nround'), ("sub/b.png", "")], 1)


def test_names_that_lead_out_of_the_folder_name_no_picture(tmp_path):
    outside = tmp_path / "outside.png"
    outside.touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    names = ["../outside.png", str(outside), "sub/../../outside.png", "none.png", "sub", "a.png\0"]
    names += ["x" * 300, "\ud800.png", ""]
    inside = ["a.png", "./a.png", "sub/../a.png", "sub\\b.png", str(folder / "a.png")]
    rows = [json.dumps({"file_name": name, "text": "t"}) for name in [*names, *inside]]
    path = write_metadata(folder, "\n".join(rows))
    found, num_without_picture = read_captions(path)
    assert [name for name, _ in found] == ["a.png", "a.png", "a.png", "sub/b.png", "a.png"]
    assert num_without_picture == len(names)


def test_half_an_emoji_is_no_caption(tmp_path):
    lines = ['{"file_name": "a.png", "text": "cut \\ud83d"}', '{"file_name": "a.png", "text": "t"}']
    path = write_metadata(tmp_path, "\n".join(lines))
    assert read_captions(path) == ([("a.png", ""), ("a.png", "t")], 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "metadata.jsonl",
            b'{"file_name": "a.png",\n "text": "caf\xe9"}',
            "not UTF-8 text .line 2",
        ),
        ("metadata.jsonl", b'{"file_name": "none.png", "text": "t"}', "none of its 1 is one"),
        ("metadata.jsonl", b"[" * 10_000, "none of its 1 is one"),
        ("metadata.csv", b"file;text\na.png;red\n", "columns file_name and text"),
        ("metadata.csv", b'file_name,text\na.png,"' + b"x" * 200_000, "no table with commas"),
    ],
)
def test_metadata_that_is_of_no_use(tmp_path, name, content, message):
    path = write_metadata(tmp_path, "", name=name)
    path.write_bytes(content)
    with pytest.raises(EncacheError, match=message):
        read_captions(path)
