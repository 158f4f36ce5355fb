import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mmpeft.data.pictures import difference_hash, fit, open_image, pixels, thumbnail
from mmpeft.errors import ConfigError, DataError


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def only_colour(image):
    colours = image.getcolors()
    assert image.mode == "RGB"
    assert len(colours) == 1
    return colours[0][1]


@pytest.mark.parametrize(
    ("mode", "colour", "ending", "expected"),
    [
        ("RGB", (10, 20, 30), "png", (10, 20, 30)),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "tiff", (255, 0, 0)),
        ("YCbCr", (128, 128, 128), "tiff", (128, 128, 128)),
        ("RGBA", (10, 20, 30, 255), "png", (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), "png", (0, 0, 255)),
        ("RGBA", (255, 0, 0, 51), "png", (51, 0, 204)),
        ("LA", (200, 0), "png", (0, 0, 255)),
        ("LA", (200, 255), "png", (200, 200, 200)),
        ("I;16", 65535, "png", (255, 255, 255)),
        ("I;16", 0, "png", (0, 0, 0)),
        ("I;16", 257 * 100, "png", (100, 100, 100)),
        ("I;16", 257 * 100, "tiff", (100, 100, 100)),
        ("I", 257 * 100, "tiff", (100, 100, 100)),
        ("F", 0.2, "tiff", (51, 51, 51)),
    ],
)
def test_every_mode_becomes_rgb_with_the_right_colour(tmp_path, mode, colour, ending, expected):
    path = tmp_path / f"image.{ending}"
    Image.new(mode, (5, 4), colour).save(path)
    assert only_colour(open_image(path, "blue")) == expected


def test_transparent_palette_colour_is_put_on_the_background(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "image.png", transparency=1)
    opened = open_image(tmp_path / "image.png", "#0000ff")
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(("mode", "values"), [("RGB", [(9, 9, 9), (1, 2, 3)]), ("L", [40, 80])])
def test_transparency_by_a_colour_key_is_put_on_the_background(tmp_path, mode, values):
    image = Image.new(mode, (2, 1), values[0])
    image.putpixel((1, 0), values[1])
    image.save(tmp_path / "image.png", transparency=values[1])
    opened = open_image(tmp_path / "image.png", "red")
    assert opened.getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0))
    assert opened.getpixel((1, 0)) == (255, 0, 0)


def test_transparency_by_a_key_in_16_bit_grey_is_put_on_the_background(tmp_path):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0)
    data = zlib.compress(b"\0" + struct.pack(">HH", 257 * 50, 257 * 60))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(">H", 257 * 60))
    (tmp_path / "image.png").write_bytes(png + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    opened = open_image(tmp_path / "image.png", "red")
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(50, 50, 50), (255, 0, 0)]


def test_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert only_colour(open_image(tmp_path / "image.gif")) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (3, 2))
    upright.putdata([(40 * n, 255 - 40 * n, n) for n in range(6)])
    # How a camera stores the upright picture: the inverse of what a viewer does for each orientation (EXIF 2.3, 4.6.4).
    transpose = Image.Transpose
    stored = {
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright.transpose(stored) if stored is not None else upright).save(tmp_path / "image.png", exif=exif)
    opened = open_image(tmp_path / "image.png")
    assert opened.size == (3, 2)
    assert opened.tobytes() == upright.tobytes()


def test_embedded_profile_is_converted_to_srgb(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same primaries with the first two colorants exchanged: red means green.
    count = struct.unpack(">I", profile[128:132])[0]
    tags = {profile[132 + 12 * n :][:4]: 132 + 12 * n for n in range(count)}
    swapped = bytearray(profile)
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    swapped[red + 4 : red + 12], swapped[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    swapped = bytes(swapped).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "image.png", icc_profile=swapped)
    red, green, blue = only_colour(open_image(tmp_path / "image.png"))
    assert green > 250
    assert red < 5
    assert blue < 5
    Image.new("RGB", (4, 4), "white").save(tmp_path / "white.png", icc_profile=swapped)
    assert min(only_colour(open_image(tmp_path / "white.png"))) > 250


def test_broken_profile_leaves_the_colours(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "image.png", icc_profile=b"no profile at all")
    assert only_colour(open_image(tmp_path / "image.png")) == (255, 0, 0)


def test_values_of_unknown_scale_are_refused(tmp_path):
    Image.new("F", (2, 2), 400.0).save(tmp_path / "image.tiff")
    with pytest.raises(DataError, match=r"image\.tiff has 32-bit float pixels from 400\.0 to 400\.0"):
        open_image(tmp_path / "image.tiff")
    Image.new("I", (2, 2), 70000).save(tmp_path / "image.tiff")
    with pytest.raises(DataError, match="32-bit integer pixels from 70000"):
        open_image(tmp_path / "image.tiff")


def test_torn_file_is_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    noise(64, 64, seed=0).save(buffer, "PNG")
    (tmp_path / "torn.png").write_bytes(buffer.getvalue()[:1000])
    with pytest.raises(DataError, match=r"torn\.png cannot be read as an image: .*truncated"):
        open_image(tmp_path / "torn.png")


def test_heic_says_what_to_do(tmp_path):
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(DataError, match=r"photo\.heic is a HEIC image.*save it as"):
        open_image(tmp_path / "photo.heic")


def test_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"absent\.png cannot be read.*No such file"):
        open_image(tmp_path / "absent.png")


def test_decompression_bomb_is_refused(tmp_path):
    side = 20000  # 400 million pixels, past Pillow's limit, in a header without any data
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(
        png + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )
    with pytest.raises(DataError, match=r"bomb\.png has more pixels than are decoded safely"):
        open_image(tmp_path / "bomb.png")


def test_unknown_background_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'whit' is no colour"):
        open_image(tmp_path / "any.png", "whit")


def gradient(width, height):
    """An image whose red is the column and whose green is the row."""
    values = np.zeros((height, width, 3), np.uint8)
    values[..., 0], values[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(values)


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 60),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_fit_gives_the_asked_size_wherever_the_crop_lies(
    width, height, target_width, target_height, left, top
):
    image = Image.new("RGB", (width, height), (12, 34, 56))
    fitted = fit(image, target_width, target_height, left, top)
    assert fitted.size == (target_width, target_height)
    assert only_colour(fitted) == (12, 34, 56)


@pytest.mark.parametrize(("left", "first"), [(0, 0), (0.5, 18), (1, 36)])
def test_crop_without_scaling_copies_pixels(left, first):
    image = gradient(100, 64)
    assert fit(image, 64, 64, left).tobytes() == image.crop((first, 0, first + 64, 64)).tobytes()


@pytest.mark.parametrize(("top", "first"), [(0, 0), (0.5, 10), (1, 20)])
def test_crop_runs_from_top_to_bottom(top, first):
    image = gradient(30, 50)
    assert fit(image, 30, 30, top=top).tobytes() == image.crop((0, first, 30, first + 30)).tobytes()


def test_fit_keeps_the_aspect_ratio():
    image = Image.new("RGB", (400, 200), "white")
    image.paste("black", (150, 50, 250, 150))  # a square of half the height in the middle
    dark = np.asarray(fit(image, 64, 64).convert("L")) < 128
    assert dark.any(axis=0).sum() == dark.any(axis=1).sum() == 32


def test_pixels_run_from_minus_one_to_one():
    image = Image.new("RGB", (3, 2), (0, 255, 0))
    image.putpixel((2, 1), (255, 0, 255))
    tensor = pixels(image)
    assert tensor.shape == (3, 2, 3)
    assert tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == [-1, 1, -1]
    assert tensor[:, 1, 2].tolist() == [1, -1, 1]


def test_pixels_invert_to_the_same_bytes():
    values = torch.arange(256, dtype=torch.uint8).repeat(3, 1).T.reshape(16, 16, 3)
    back = ((pixels(Image.fromarray(values.numpy())) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(back.permute(1, 2, 0), values)


def test_looks_survive_another_size_and_differ_between_pictures():
    one, other = (noise(16, 12, seed).resize((512, 384), Image.Resampling.BICUBIC) for seed in (0, 1))
    smaller = one.resize((200, 150), Image.Resampling.LANCZOS)
    assert (difference_hash(one) ^ difference_hash(smaller)).bit_count() <= 3
    assert (difference_hash(one) ^ difference_hash(other)).bit_count() > 12
    assert len(thumbnail(one)) == 16 * 16 * 3


def test_difference_hash_of_a_ramp_sets_every_bit():
    ramp = Image.linear_gradient("L").rotate(90)  # from one side to the other
    flipped = ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert {difference_hash(ramp), difference_hash(flipped)} == {0, 2**64 - 1}
