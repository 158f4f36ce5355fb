"""From an image file to the pixels that a model sees."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageColor, ImageOps
from torch import Tensor

from mmpeft.errors import ConfigError, DataError

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def open_image(path: Path, background: str = "white") -> Image.Image:
    """Open an image file as 8-bit RGB, the right way up and without transparency.

    The EXIF orientation is applied; an embedded colour profile (also of CMYK) is converted to sRGB, and CMYK
    without one by the plain formula; transparency of any kind is put on `background`; 16-bit grey is scaled to 8 bit
    (65535 becomes 255), 32-bit integers likewise when they hold 16-bit values, floats when they lie in [0, 1]; of
    several frames the first is taken.

    Args:
        path: the file.
        background: any colour that Pillow knows: "white", "#808080", "rgb(0,0,0)".

    Raises:
        DataError: the file is missing, broken, too large to be decoded safely, or holds values of no known scale.
        ConfigError: `background` is no colour.
    """
    try:
        return decode(path, background)[0]
    except DataError as error:
        raise DataError(f"{path} {error}") from error


def decode(path: Path, background: str) -> tuple[Image.Image, tuple[str, ...]]:
    """Do the work of `open_image`, and tell in sentences what the picture lost; errors do not name the file."""
    colour = rgb(background)
    try:
        with Image.open(path) as image:
            remarks = _choose_frame(image)
            image.load()
            profiled, more_remarks = _to_srgb(_to_eight_bit(ImageOps.exif_transpose(image)))
            return _flatten(profiled, colour), (*remarks, *more_remarks)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"has more pixels than are decoded safely, make it smaller: {error}") from error
    # Decoders of broken files raise nearly everything: OSError, SyntaxError, struct.error, ValueError, ...
    except Exception as error:
        if path.suffix.lower() in (".heic", ".heif"):
            raise DataError(
                "is a HEIC image, which Pillow reads with a plugin only; save it as .jpg or .png"
            ) from error
        raise DataError(f"cannot be read as an image: {getattr(error, 'strerror', None) or error}") from error


def rgb(colour: str) -> tuple[int, int, int]:
    """Read a colour in any form that Pillow knows; an alpha value in it is left off.

    Raises:
        ConfigError: it is none.
    """
    try:
        red, green, blue = ImageColor.getrgb(colour)[:3]
    except ValueError:
        raise ConfigError(f"{colour!r} is no colour; try white, black, or #808080") from None
    return red, green, blue


def fit(image: Image.Image, width: int, height: int, left: float = 0.5, top: float = 0.5) -> Image.Image:
    """Scale an image so that it covers a rectangle, and crop what stands over.

    The aspect ratio stays. Lanczos downwards, bicubic upwards; an image of the right size passes unchanged.

    Args:
        image: RGB.
        width: of the result, pixels.
        height: of the result, pixels.
        left: where the crop lies in what stands over, 0 at the left edge, 1 at the right, 0.5 centred.
        top: the same from top (0) to bottom (1).
    """
    scale = max(width / image.width, height / image.height)
    # Whole pixels of the result: a picture that needs no scaling is then cropped without being blurred.
    x = round(left * (image.width * scale - width)) / scale
    y = round(top * (image.height * scale - height)) / scale
    x, y = (max(0.0, min(x, image.width - width / scale)), max(0.0, min(y, image.height - height / scale)))
    box = (x, y, min(image.width, x + width / scale), min(image.height, y + height / scale))
    return image.resize(
        (width, height), Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC, box
    )


def pixels(image: Image.Image) -> Tensor:
    """Turn an RGB image into a model's input, (3, H, W), float32, 0 becoming -1 and 255 becoming 1."""
    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).contiguous() / 127.5 - 1


def difference_hash(image: Image.Image) -> int:
    """Hash what a picture looks like in 64 bit: pictures that look alike differ in few bits.

    Each bit says whether one of 8 x 8 cells is darker than its right neighbour. Krawetz 2013, "Kind of Like That".
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


def thumbnail(image: Image.Image) -> bytes:
    """Shrink a picture to 16 x 16 RGB cells, 768 bytes, whatever its shape; to compare what pictures look like."""
    return image.resize((16, 16), Image.Resampling.BOX).tobytes()


def _choose_frame(image: Image.Image) -> tuple[str, ...]:
    count = getattr(image, "n_frames", 1)
    # Cameras store a preview behind the photo (MPO): the first frame is all that anybody means.
    if count == 1 or image.format == "MPO":
        return ()
    image.seek(0)
    return (f"has {count} frames; only the first is used",)


def _to_eight_bit(image: Image.Image) -> Image.Image:
    """Bring deep greys to L, or LA where one value of them means transparent."""
    if image.mode not in (*_SIXTEEN_BIT, "I", "F"):
        return image
    values = np.asarray(image)
    highest = 1.0 if image.mode == "F" else 65535.0
    if not (values.min() >= 0 and values.max() <= highest):
        raise DataError(
            f"has {'32-bit float' if image.mode == 'F' else '32-bit integer'} pixels from {values.min()} to "
            f"{values.max()}, of which nobody can tell what is white; save it with 8 or 16 bit"
        )
    grey = Image.fromarray(np.rint(values.astype(np.float64) * (255 / highest)).astype(np.uint8))
    if image.info.get("transparency") is not None:
        grey.putalpha(
            Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
        )
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey


def _to_srgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Make RGB, or RGBA when something is transparent, from any 8-bit mode."""
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("CMYK", "L", "RGB"):
        image = image.convert("RGB")
    target = "RGBA" if image.mode == "RGBA" else "RGB"
    if not profile:
        return image.convert(target), ()
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if image.mode != "CMYK" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert(target), ()
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode=target
        )
    except (ImageCms.PyCMSError, ImportError, OSError):
        return image.convert(target), (
            "has a colour profile that cannot be used; its colours are taken as sRGB",
        )
    return (converted or image).convert(target), ()


def _flatten(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    if image.mode != "RGBA":
        return image
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image).convert("RGB")
