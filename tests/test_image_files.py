"""Image files are read as what they show, whatever mode, depth and orientation they have."""

import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from torchdnr.data import load_dataset
from torchdnr.data.readers import read_batches

SIDE = 16
RAMP = torch.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)  # its mean is 0.5
DEEP = (RAMP.double() * 65535).round().numpy().astype(np.uint16)
ORIENTATION = 0x0112


def read(path, channels=1, expected_problems=0):
    problems = []
    shape = (channels, SIDE, SIDE)
    read = list(read_batches([path], shape, 4, lambda file, error: problems.append(str(error))))
    assert len(problems) == expected_problems, problems
    return read[0][1][0] if read else problems[0]


def in_folder(path):
    """Read the same file as a data set of two classes."""
    root = path.parent / f"{path.stem}-folder"
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (root / place).mkdir(parents=True)
        (root / place / path.name).write_bytes(path.read_bytes())
    data = load_dataset(f"folder:{root}", image_size=SIDE, progress=False)
    return data.select(torch.tensor([0]))[0][0]


def deep(order="<u2"):
    return Image.fromarray(DEEP.astype(order))


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (deep(), "png"),
        (deep(), "tiff"),
        (deep(">u2"), "tiff"),  # mode I;16B
        (Image.fromarray(RAMP.numpy()), "tiff"),  # mode F
        (Image.fromarray((RAMP * 255).round().byte().numpy()), "png"),
    ],
    ids=["16-bit PNG", "16-bit TIFF", "big-endian TIFF", "float TIFF", "8-bit PNG"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_ramp_of_any_depth_has_its_true_values(tmp_path, image, kind, channels):
    path = tmp_path / f"ramp.{kind}"
    image.save(path)
    pixels = read(path, channels)
    assert pixels.mean() == pytest.approx(0.5, abs=1e-3)
    torch.testing.assert_close(pixels, RAMP.expand(channels, -1, -1), atol=0.6 / 255, rtol=0)
    torch.testing.assert_close(in_folder(path), RAMP.expand(3, -1, -1), atol=0.6 / 255, rtol=0)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (RAMP.numpy() * 2, r"floating point, expected values in \[0, 1\], got 0 to 2"),
        (RAMP.numpy() * np.nan, "got nan to nan"),
        (RAMP.numpy() - 0.5, "got -0.5 to 0.5"),
        ((RAMP * 1e6).int().numpy(), "integers, expected unsigned ones of at most 16 bits, got"),
    ],
)
def test_a_file_of_unknown_scale_is_unreadable_with_the_reason(tmp_path, array, reason):
    path = tmp_path / "a.tiff"
    Image.fromarray(array).save(path)
    assert re.search(reason, read(path, expected_problems=1))


@pytest.mark.parametrize("kind", ["jpg", "png", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_is_read_as_the_upright_one(tmp_path, orientation, kind):
    """Bright at the top, dark on the right; stored as a camera held otherwise would."""
    upright = Image.new("L", (SIDE, SIDE), 128)
    upright.paste(255, (0, 0, SIDE, SIDE // 2))
    upright.paste(0, (SIDE // 2, 0, SIDE, SIDE))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"photo.{kind}"
    stored.save(path, exif=exif, **({"quality": 100} if kind == "jpg" else {}))
    expected = torch.from_numpy(np.array(upright)) / 255
    torch.testing.assert_close(read(path)[0], expected, atol=0.02, rtol=0)
    torch.testing.assert_close(in_folder(path)[0], expected, atol=0.02, rtol=0)


def transparent(mode):
    """Red on the left; on the right hidden black."""
    image = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (SIDE // 2, 0, SIDE, SIDE))
    if mode == "P":
        palette = Image.new("P", (SIDE, SIDE), 0)
        palette.putpalette([255, 0, 0, 0, 0, 0])
        palette.paste(1, (SIDE // 2, 0, SIDE, SIDE))
        palette.info["transparency"] = 1
        return palette
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white_not_the_colour_it_hides(tmp_path, mode):
    path = tmp_path / "a.png"
    transparent(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    pixels = read(path, 3)
    assert (pixels[:, :, SIDE // 2 :] == 1).all()
    left = pixels[:, :, : SIDE // 2].mean((1, 2))
    expected = [76 / 255] * 3 if mode == "LA" else [1.0, 0.0, 0.0]
    torch.testing.assert_close(left, torch.tensor(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["jpg", "tiff"])
def test_ink_comes_out_as_the_colour_it_prints(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)).save(path)  # magenta and yellow: red
    red, green, blue = read(path, 3).mean((1, 2)).tolist()
    assert red > 0.98 and max(green, blue) < 0.02


def tiff(path, values, bits, white_is_zero=False, signed=False):
    """Write a grey TIFF of any depth, as Pillow does not."""
    tags = [(256, 3, SIDE), (257, 3, SIDE), (258, 3, bits), (259, 3, 1)]
    tags += [(262, 3, 0 if white_is_zero else 1), (273, 4, 8), (277, 3, 1), (278, 3, SIDE)]
    tags += [(279, 4, len(values)), *([(339, 3, 2)] if signed else [])]
    entries = b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<HH" if kind == 3 else "<I", *number)
        for tag, kind, value in tags
        for number in [(value, 0) if kind == 3 else (value,)]
    )
    head = b"II*\0" + struct.pack("<I", 8 + len(values)) + values
    path.write_bytes(head + struct.pack("<H", len(tags)) + entries + bytes(4))


def twelve_bits():
    numbers = (RAMP * 4095).round().int().flatten().tolist()
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return b"".join((a << 12 | b).to_bytes(3, "big") for a, b in pairs)


def test_a_tiff_of_12_bits_is_scaled_from_4095(tmp_path):
    tiff(tmp_path / "a.tif", twelve_bits(), 12)
    torch.testing.assert_close(read(tmp_path / "a.tif")[0], RAMP, atol=1 / 255, rtol=0)


def test_a_tiff_of_16_bits_whose_white_is_zero_is_no_negative(tmp_path):
    tiff(tmp_path / "a.tif", (65535 - DEEP).astype("<u2").tobytes(), 16, white_is_zero=True)
    torch.testing.assert_close(read(tmp_path / "a.tif")[0], RAMP, atol=1 / 255, rtol=0)


def test_integers_of_unknown_range_are_counted_with_a_reason(tmp_path):
    tiff(tmp_path / "a.tif", (DEEP // 2).astype("<i2").tobytes(), 16, signed=True)
    Image.fromarray(DEEP.astype(np.int32) * 1000).save(tmp_path / "b.im")
    for name in ("a.tif", "b.im"):
        reason = read(tmp_path / name, expected_problems=1)
        assert "integers, expected unsigned ones of at most 16 bits" in reason


def test_what_is_transparent_in_16_bits_of_grey_shows_white(tmp_path):
    deep().save(tmp_path / "a.png", transparency=0)
    pixels = read(tmp_path / "a.png")[0].flatten()
    assert pixels[0] == 1 and pixels[1] < 0.01
